"""Free-running generation: what the policy draws on its own, token after token.

Only evaluation does this; training with VA-π never does. The loop has static shapes and runs
under one jit; sample i depends on (rng, its id, its condition) and not on the batch around it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from vapi_jax.categorical import cumulative, scaled_heights, uniforms_24
from vapi_jax.grpo import entropy
from vapi_jax.policy import Condition, Params, Policy


def filter_logits(
    logits: Float[Array, "*batch V"], top_k: int = 0, top_p: float = 1.0
) -> Float[Array, "*batch V"]:
    """Sets to -inf what top-k and then nucleus filtering (arXiv 1904.09751) leave out.

    Args:
      logits: any float dtype; returned in the same.
      top_k: keep the k largest and whatever ties with the k-th; 0 (or >= V) keeps all.
      top_p: keep the most probable tokens up to and including the one that lifts their sum above
        top_p, so always at least one; 1.0 keeps all. Among tied logits the lower index is first.
    """
    vocab = logits.shape[-1]
    if 0 < top_k < vocab:
        kth = jax.lax.top_k(logits, top_k)[0][..., -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if top_p < 1.0:
        order = jnp.argsort(-logits, axis=-1, stable=True)
        probs = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
        # A token goes when the tokens BEFORE it already hold more than top_p.
        before = jnp.cumsum(probs, axis=-1)[..., :-1]
        drop = jnp.pad(before > top_p, [(0, 0)] * (logits.ndim - 1) + [(1, 0)])
        drop = jnp.take_along_axis(drop, jnp.argsort(order, axis=-1), axis=-1)
        logits = jnp.where(drop, -jnp.inf, logits)
    return logits


def draw(uniforms: Float[Array, " B"], logits: Float[Array, "B V"]) -> Int[Array, " B"]:
    """One token a row by inverse CDF in float32: 1 uniform where Gumbel noise would take V."""
    cdf = cumulative(logits)
    heights = scaled_heights(uniforms[:, None], cdf)
    return jnp.sum(cdf <= heights, axis=-1, dtype=jnp.int32)


def generate(
    policy: Policy,
    params: Params,
    condition: Condition,
    rng: PRNGKeyArray,
    *,
    temperature: float | Float[Array, ""] = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    cfg_scale: float = 1.0,
    cfg_interval: int = -1,
    greedy: bool = False,
    sample_ids: Int[Array, " B"] | None = None,
    return_entropy: bool = False,
) -> Any:
    """Samples one token grid per condition.

    Args:
      policy, params, condition: the generator; the batch is the condition's.
      rng: one key. Sample i uses fold_in(rng, sample_ids[i]) and nothing else.
      temperature: divides the logits, before the filters; > 0. May be traced: no recompilation.
      top_k, top_p: see `filter_logits`. Static.
      cfg_scale: s of uncond + s·(cond - uncond); 1.0 is no guidance and costs half as much.
      cfg_interval: guide tokens 0 .. cfg_interval + 1 only (LlamaGen's convention: the prefill and
        decoding steps 0 .. cfg_interval); -1 guides all.
      greedy: take the most probable token instead of drawing.
      sample_ids: [B], default 0 .. B-1. Give running numbers to make results independent of how
        samples are cut into batches.
      return_entropy: also return the entropies of the distributions really drawn from, guidance,
        temperature and filters included (0 where greedy).

    Returns:
      int32 tokens [B, T]; with `return_entropy`, a pair of them and Float[B, T] in nats.

    Raises:
      ValueError: for settings outside their range, or guidance without an unconditional embedding.
    """
    if top_k < 0 or not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_k {top_k} must be >= 0 and top_p {top_p} in (0, 1]")
    if isinstance(temperature, int | float) and temperature <= 0:
        raise ValueError(f"temperature {temperature} must be > 0; greedy=True is the limit 0")
    if cfg_interval < -1:
        raise ValueError(f"cfg_interval {cfg_interval} must be >= -1")
    if sample_ids is None:
        sample_ids = jnp.arange(jax.tree.leaves(condition)[0].shape[0])
    guided = 0 if cfg_scale == 1.0 else policy.num_tokens
    if guided and cfg_interval > -1:
        guided = min(guided, cfg_interval + 2)
    tokens, entropies = _generate(
        policy,
        params,
        condition,
        rng,
        sample_ids,
        jnp.float32(temperature),
        jnp.float32(cfg_scale),
        top_k=top_k,
        top_p=top_p,
        guided=guided,
        greedy=greedy,
        with_entropy=return_entropy,
    )
    return (tokens, entropies) if return_entropy else tokens


@partial(jax.jit, static_argnames=("policy", "top_k", "top_p", "guided", "greedy", "with_entropy"))
def _generate(
    policy: Policy,
    params: Params,
    condition: Condition,
    rng: PRNGKeyArray,
    sample_ids: Int[Array, " B"],
    temperature: Float[Array, ""],
    cfg_scale: Float[Array, ""],
    *,
    top_k: int,
    top_p: float,
    guided: int,
    greedy: bool,
    with_entropy: bool,
) -> tuple[Int[Array, "B T"], Float[Array, "B T"]]:
    """The loop; the first `guided` tokens are drawn from guided logits."""
    batch, length = sample_ids.shape[0], policy.num_tokens
    keys = jax.vmap(lambda i: jax.random.fold_in(rng, i))(sample_ids)
    uniforms = jax.vmap(lambda key: uniforms_24(key, (length,)))(keys).T  # [T, B]

    def pick(logits: Array, uniform: Array) -> tuple[Array, Array]:
        if logits.shape[0] == 2 * batch:
            given, without = jnp.split(logits, 2)
            logits = without + cfg_scale * (given - without)
        if greedy:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32), jnp.zeros((batch,))
        logits = filter_logits(logits / temperature, top_k, top_p)
        spread = entropy(logits) if with_entropy else jnp.zeros((batch,))
        return draw(uniform, logits), spread

    def step(carry: tuple[Array, Any], inputs: tuple[Array, Array]) -> tuple[Any, Any]:
        token, cache = carry
        index, uniform = inputs
        fed = jnp.concatenate([token, token]) if doubled else token
        logits, cache = policy.decode(params, cache, fed, index)
        token, spread = pick(logits, uniform)
        return (token, cache), (token, spread)

    doubled = guided > 0
    if doubled:
        both = [condition, policy.unconditional(condition)]
        condition = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), *both)
    logits, cache = policy.prefill(params, condition)
    token, spread = pick(logits, uniforms[0])
    tokens, spreads = [token[None]], [spread[None]]
    # Two loops where guidance ends early: the second one carries the conditional half only.
    for start, stop in ((1, max(guided, 1)), (max(guided, 1), length)):
        if start == stop:
            continue
        if doubled and start >= guided:
            cache = jax.tree.map(lambda x: x[:batch] if x.shape[0] == 2 * batch else x, cache)
            doubled = False
        inputs = (jnp.arange(start - 1, stop - 1), uniforms[start:stop])
        (token, cache), (more, more_spreads) = jax.lax.scan(step, (token, cache), inputs)
        tokens.append(more)
        spreads.append(more_spreads)
    return jnp.concatenate(tokens).T, jnp.concatenate(spreads).T
