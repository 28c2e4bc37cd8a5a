"""What a training step will need of a device's memory, told from shapes: nothing is allocated.

Counted: the state in its layout; gradients; what differentiation keeps of one microbatch's forward pass
(by tracing it); the output layer's blocks of logits; and the decoding of one chunk of samples. Left out:
what is recomputed inside a layer, and the compiler's own room. An estimate, to
be compared with a device's size and not with its last megabyte.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vapi_jax.common.trees import flatten
from vapi_jax.methods import Method
from vapi_jax.methods.method import EMA
from vapi_jax.parallel import fsdp
from vapi_jax.parallel.sharding import tree_shardings
from vapi_jax.training import train


@dataclasses.dataclass(frozen=True)
class Part:
    """Bytes of a device's memory, and what they hold."""

    name: str
    bytes: int
    what: str


def tree_bytes(tree: Any) -> int:
    """Bytes of a tree of arrays or ShapeDtypeStructs."""
    return sum(_leaf_bytes(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree))


def _leaf_bytes(shape: tuple[int, ...], dtype: Any) -> int:
    if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
        return 8 * math.prod(shape)
    return math.prod(shape) * jnp.dtype(dtype).itemsize


def bytes_per_device(tree: Any, shardings: Any) -> int:
    """Bytes that each device holds of a tree in this layout."""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
    return sum(_leaf_bytes(layout.shard_shape(x.shape), x.dtype) for x, layout in pairs)


def estimate(method: Method, state: train.TrainState, frozen: Mapping[str, Any]) -> list[Part]:
    """The parts of a device's memory in a training step.

    Args:
      method: on its mesh.
      state: its shapes, from `train.abstract_state`.
      frozen: shapes of its frozen networks.
    """
    config, mesh = method.config, method.mesh
    layout = train.state_shardings(state, mesh, method.partition_rules)
    rows = max((config.microbatch_size or config.batch_size) // mesh.size, 1)
    shares = bytes_per_device(state.params, layout.params)
    parts = [
        Part("parameters", shares, "this device's share"),
        Part("optimizer", bytes_per_device(state.opt_state, layout.opt_state), "AdamW's moments"),
        Part(
            "frozen networks",
            bytes_per_device(
                dict(frozen), tree_shardings(dict(frozen), mesh, method.partition_rules)
            ),
            ", ".join(frozen) or "none",
        ),
    ]
    if method.keeps_start:
        parts.append(Part("base generator", shares, "frozen, for the KL term"))
    if EMA in state.extra:
        parts.append(Part("average", shares, "of the parameters, which follows them"))
    several = config.microbatch_size not in (0, config.batch_size)
    held = "a sum, and one microbatch's" if several else "in the parameters' layout"
    parts.append(Part("gradients", shares * (2 if several else 1), held))
    if method.independent_images:
        parts.append(_gathered(method, state.params, layout.params))
    kept = _kept_for_backward(method, state, frozen, rows)
    parts.append(Part("activations", kept, f"kept of {rows} image(s) for the backward pass"))
    return parts + [Part(*part) for part in method.memory(rows)]


def _gathered(method: Method, params: Any, layout: Any) -> Part:
    """Split parameters that are whole at once, and their gradients before they are scattered.

    One layer's in the compute dtype, and all that are not of the layers in float32.
    """
    specs, narrow = flatten(layout), jnp.dtype(method.compute_dtype).itemsize
    total = 0
    for path, leaf in flatten(params).items():
        if method.mesh.shape[fsdp.AXIS] > 1 and fsdp.AXIS in specs[path].spec:
            layers = path.startswith(fsdp.LAYERS)
            total += (narrow + 4) * leaf.size // leaf.shape[0] if layers else 8 * leaf.size
    return Part("gathered", total, "a layer and what is outside of layers, whole, with gradients")


def _kept_for_backward(
    method: Method, state: train.TrainState, frozen: Mapping[str, Any], rows: int
) -> int:
    """Bytes of the residuals of one device's microbatch, parameters not counted again."""
    batch: Any = {
        **method.example_batch(rows), "index": jax.ShapeDtypeStruct((rows,), jnp.int32)
    }  # fmt: skip
    alone = dataclasses.replace(method, local=True)
    weights = dict(frozen)
    if method.keeps_start:
        weights["base"] = alone.whole(state.params, weights)

    if method.rolls_out:
        whole = alone.whole(state.params, weights)
        batch = jax.eval_shape(alone.rollout, whole, weights, batch, state.rng, state.step)

    def pullback(params: Any, extra: Any, weights: Any, batch: Any, rng: Any, step: Any) -> Any:
        def loss(params: Any) -> Any:
            return alone.loss(alone.whole(params, weights), extra, weights, batch, rng, step)[0]

        return jax.vjp(loss, params)[1]

    residuals = jax.eval_shape(
        pullback, state.params, state.extra, weights, batch, state.rng, state.step
    )
    known = Counter((x.shape, x.dtype) for x in jax.tree.leaves((state.params, weights, batch)))
    total = 0
    for leaf in jax.tree.leaves(residuals):
        if known[leaf.shape, leaf.dtype] > 0:
            known[leaf.shape, leaf.dtype] -= 1
        else:
            total += tree_bytes(leaf)
    return total
