"""The parts of a step as programs of their own, each timed alone.

Their sum is more than the step: a program of its own writes out what the step passes on, and inside the
step the compiler may run independent parts side by side. Over several devices the compiler places the
collectives of these programs, where the step has its own.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vapi_jax.bench.setup import Setup, Spread, spread, timed
from vapi_jax.methods import vapi
from vapi_jax.methods.corruption import purpose_keys
from vapi_jax.methods.objective import Judged, objective
from vapi_jax.models.head import Head, draw
from vapi_jax.parallel import compiler
from vapi_jax.training import train

PHASES = ("encode", "forward", "sampling", "decode", "lpips", "backward", "optimizer")
POLICY_PHASES = ("forward", "sampling", "backward")


@dataclasses.dataclass(frozen=True)
class _Parts:
    """The jitted parts, over one microbatch."""

    encode: Any
    forward: Any
    sampling: Any
    decode: Any
    rewards: Any
    backward: Any
    optimizer: Any


def _parts(setup: Setup) -> _Parts:
    policy, pixels, method = setup.method.policy, setup.method.pixels, setup.method.options

    def forward(params: Any, condition: Any, context: Any) -> Any:
        return jax.vjp(lambda p: policy.hidden(p, condition, context), params)

    def sampling(hidden: Any, head: Head, keys: Any, tokens: Any) -> Any:
        uniforms = vapi.group_uniforms(keys, tokens, policy.vocab_size, method)
        return draw(hidden, head, uniforms, method.temperature)

    def backward(
        pull: Callable[..., Any], hidden: Any, params: Any, found: Any, entropy: Any, keys: Any
    ) -> Any:
        judged = Judged(**found)

        def loss(hidden: Any, params: Any) -> Any:
            head = policy.head(params)
            logps, true_logps = vapi.score(hidden, head, judged.samples, judged.tokens, method)
            no_base = dataclasses.replace(method, kl_weight=0.0, monitor_kl=False)
            old_logps, ce = jax.lax.stop_gradient(logps), -true_logps.mean(axis=-1)
            mask = vapi.token_mask(keys[3], judged.samples, no_base)
            lost = objective(logps, old_logps, entropy, judged.advantages, no_base, mask=mask)
            return vapi.with_prior(*lost, ce, judged, no_base)[0]

        to_hidden, to_head = jax.grad(loss, argnums=(0, 1))(hidden, params)
        return jax.tree.map(jnp.add, to_head, pull(to_hidden)[0])

    def optimizer(grads: Any, opt_state: Any, params: Any) -> Any:
        updates, opt_state = setup.optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, optax.tree.norm(grads)

    jit = functools.partial(jax.jit, compiler_options=compiler.options(setup.method.mesh))
    return _Parts(
        encode=jit(pixels.encode),
        forward=jit(forward),
        sampling=jit(sampling),
        decode=jit(pixels.decode),
        rewards=jit(
            lambda frozen, samples, tokens, batch, keys: vars(
                vapi.judge_samples(
                    samples, tokens, tokens, batch, keys, method, setup.method.terms,
                    setup.method.parts(frozen)["judge"],
                )
            )
        ),
        backward=jit(backward),
        optimizer=jit(optimizer),
    )  # fmt: skip


class PhaseTimer:
    """The phases of a setup's step, compiled at their first round.

    Images that come with their tokens have no phase "encode". "lpips" is the whole reward (decoder,
    LPIPS, MSE, advantages) less the decoder. "backward" has the head's scores and gradients and the
    layers' gradients.
    """

    def __init__(self, setup: Setup):
        config = setup.method.config
        micro = config.microbatch_size or config.batch_size
        self._repeats = config.batch_size // micro
        batch = train.split_microbatches(setup.batch, self._repeats, setup.method.mesh)
        self._batch = {name: jax.tree.map(lambda x: x[0], part) for name, part in batch.items()}
        self._keys = purpose_keys(jax.random.key(0), jnp.arange(micro))
        self._policy, self._frozen, self._parts = setup.method.policy, setup.frozen, _parts(setup)

    def once(self, state: train.TrainState) -> dict[str, float]:
        """Seconds that each phase takes in a step: those of one microbatch times their number."""
        parts, frozen, keys, batch = self._parts, self._frozen, self._keys, self._batch
        params, images, found = state.params, batch["image"], dict[str, float]()
        if "tokens" in batch:
            tokens = batch["tokens"]
        else:
            tokens, found["encode"] = timed(parts.encode, frozen, images)
        context = tokens[:, : self._policy.context_length]
        (hidden, pull), found["forward"] = timed(parts.forward, params, batch["condition"], context)
        head = self._policy.head(params)
        (samples, entropy), found["sampling"] = timed(parts.sampling, hidden, head, keys[1], tokens)
        flat = samples.reshape(-1, samples.shape[-1])
        _, found["decode"] = timed(parts.decode, frozen, flat)
        judged, rewarded = timed(parts.rewards, frozen, samples, tokens, batch, keys)
        found["lpips"] = max(rewarded - found["decode"], 0.0)
        grads, found["backward"] = timed(
            parts.backward, pull, hidden, params, judged, entropy, keys
        )
        del hidden, pull
        found = {name: seconds * self._repeats for name, seconds in found.items()}
        _, found["optimizer"] = timed(parts.optimizer, grads, state.opt_state, params)
        return found


def spreads(rounds: Sequence[Mapping[str, float]]) -> dict[str, Spread]:
    """Median and quartiles of each phase over rounds."""
    return {name: spread([found[name] for found in rounds]) for name in PHASES if name in rounds[0]}
