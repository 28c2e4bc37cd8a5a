"""The fixed held-out batch of a run, and what a method says of it."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from vapi_jax.common.host_calls import raise_failure
from vapi_jax.data import fixed_batch
from vapi_jax.methods import Method
from vapi_jax.parallel import compiler
from vapi_jax.parallel.sharding import replicate, shard_whole, whole_copy

HELD_OUT = "held_out/"


class HeldOut:
    """The fixed held-out batch of a run and its metrics, the same images and keys at every call.

    They are computed from a whole copy of the parameters on every device, as samples are drawn: with
    parameters as training splits them, the compiler would gather each of them wherever it is used.
    """

    def __init__(self, method: Method, frozen: Mapping[str, Any]):
        config = method.config
        batch = fixed_batch(config.data, config.eval.split, config.eval.images, config.seed)
        self._batch = shard_whole(method.prepare(batch), method.mesh)
        self._frozen = frozen
        self._rng = replicate(jax.random.key(config.seed), method.mesh)
        self._metrics = jax.jit(method.held_out, compiler_options=compiler.options(method.mesh))
        self._narrowed = jax.jit(method.narrowed)  # kept, or it would be compiled at every call
        self._whole = method.whole
        self._mesh, self._temperature = method.mesh, method.temperature

    def __call__(self, params: Any, temperature: float | None = None) -> dict[str, float]:
        """The metrics; samples are drawn at the configured temperature unless told otherwise."""
        drawn_at = self._temperature if temperature is None else temperature
        drawn_at = replicate(np.float32(drawn_at), self._mesh)
        params = whole_copy(params, self._mesh, self._narrowed)
        params = self._whole(params, self._frozen)
        metrics = self._metrics(params, self._frozen, self._batch, self._rng, drawn_at)
        found = {name: float(value) for name, value in jax.device_get(metrics).items()}
        raise_failure()
        return found
