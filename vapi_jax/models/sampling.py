"""Free-running generation: what the policy draws on its own, token after token.

Only evaluation does this; training with VA-π never does. The loop has static shapes and runs
under one jit; sample i depends on (rng, its id, its condition) and not on the batch around it. That
is exact for batches of one size on the same devices; other shapes may round otherwise, which a draw
in float32 hardly ever notices (see `categorical.draw`) and one in bfloat16 sometimes does.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from vapi_jax.models.categorical import draw, entropy, num_choices, uniforms_24
from vapi_jax.models.conditions import Tree
from vapi_jax.models.policy import Params, Policy
from vapi_jax.parallel import compiler

SCHEDULES = ("constant", "interval", "cosine")
"""How the guidance scale runs over the tokens of an image: see `guidance_scales`."""


def guidance_scales(
    schedule: str, scale: float, num_tokens: int, *, power: float = 1.0, interval: int = -1
) -> Float[np.ndarray, " T"]:
    """The guidance scale of every token; 1 is no guidance.

    "constant": s for all tokens.
    "interval": s for tokens 0 .. interval + 1, then 1. LlamaGen's `cfg_interval`, which counts
      decoding steps, of which the first makes token 1; -1 means all tokens, as there.
    "cosine": s(t) = 1 + (s - 1) (1 - cos(π (t/T)^power)) / 2, from 1 at the first token to nearly s
      at the last: the power-cosine schedule of RAR (arXiv 2411.00776, `generate` in its
      modeling/rar.py, after MDT's). Its published pairs of scale and power hold here unchanged.

    Args:
      schedule: of `SCHEDULES`.
      scale: s.
      num_tokens: T.
      power: of the cosine; above 1 guidance comes later.
      interval: of the interval.

    Returns:
      float32 [T].

    Raises:
      ValueError: for an unknown schedule, a number outside its range, or one of another schedule.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"guidance schedule {schedule!r}: choose one of {', '.join(SCHEDULES)}")
    if not math.isfinite(scale):
        raise ValueError(f"cfg_scale {scale} must be finite; 1.0 is no guidance")
    if not 0.0 < power < math.inf:
        raise ValueError(f"cfg_power {power} must be finite and > 0")
    if interval < -1:
        raise ValueError(f"cfg_interval {interval} must be >= -1")
    if interval > -1 and schedule != "interval":
        raise ValueError(f"cfg_interval {interval} belongs to the schedule 'interval'")
    if power != 1.0 and schedule != "cosine":
        raise ValueError(f"cfg_power {power} belongs to the schedule 'cosine'")
    tokens = np.arange(num_tokens)
    if schedule == "cosine":
        share = (1.0 - np.cos(np.pi * (tokens / num_tokens) ** power)) / 2.0
    elif schedule == "interval" and interval > -1:
        share = (tokens < interval + 2).astype(np.float64)
    else:
        share = np.ones(num_tokens)
    return (1.0 + (scale - 1.0) * share).astype(np.float32)


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


def generate(
    policy: Policy,
    params: Params,
    condition: Tree,
    rng: PRNGKeyArray,
    *,
    temperature: float | Float[Array, ""] = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    cfg_scale: float = 1.0,
    cfg_interval: int = -1,
    cfg_schedule: str = "interval",
    cfg_power: float = 1.0,
    greedy: bool = False,
    sample_ids: Int[Array, " B"] | None = None,
    return_entropy: bool = False,
    given: Int[Array, "B T"] | None = None,
) -> Any:
    """Samples one token grid per condition.

    Args:
      policy, params, condition: the generator; the batch is the condition's.
      rng: one key. Sample i uses fold_in(rng, sample_ids[i]) and nothing else.
      temperature: divides the logits, before the filters; > 0. May be traced: no recompilation.
      top_k, top_p: see `filter_logits`. Static.
      cfg_scale: s of uncond + s·(cond - uncond); 1.0 is no guidance and costs half as much.
      cfg_interval, cfg_schedule, cfg_power: how s runs over the tokens, see `guidance_scales`; by
        default it is the same for all. Tokens after the last guided one cost half as much too.
      greedy: take the most probable token instead of drawing.
      sample_ids: [B], default 0 .. B-1. Give running numbers to make results independent of how
        samples are cut into batches.
      return_entropy: also return the entropies of the distributions really drawn from, guidance,
        temperature and filters included (0 where greedy).
      given: tokens that are taken as they are, -1 where the policy draws; None draws all.

    Returns:
      int32 tokens [B, T]; with `return_entropy`, a pair of them and Float[B, T] in nats.

    Raises:
      ValueError: for settings outside their range, or guidance without an unconditional embedding.
    """
    scales = guidance_scales(
        cfg_schedule, cfg_scale, policy.num_tokens, power=cfg_power, interval=cfg_interval
    )
    if top_k < 0 or not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_k {top_k} must be >= 0 and top_p {top_p} in (0, 1]")
    if isinstance(temperature, int | float) and temperature <= 0:
        raise ValueError(f"temperature {temperature} must be > 0; greedy=True is the limit 0")
    if sample_ids is None:
        sample_ids = jnp.arange(jax.tree.leaves(condition)[0].shape[0])
    # Tokens before the first guided one save nothing: the later ones attend to both halves' cache.
    guided = int(np.max(np.flatnonzero(scales != 1.0), initial=-1)) + 1
    read = params, condition, rng
    loop = jax.jit(_generate, static_argnames=_STATIC, compiler_options=compiler.options(read))
    tokens, entropies = loop(
        policy,
        params,
        condition,
        rng,
        sample_ids,
        jnp.float32(temperature),
        jnp.asarray(scales),
        given,
        top_k=top_k,
        top_p=top_p,
        guided=guided,
        greedy=greedy,
        with_entropy=return_entropy,
    )
    return (tokens, entropies) if return_entropy else tokens


SEGMENT = 16
"""Steps that make a loop of their own worth its compilation."""


def segments(steps: int) -> list[int]:
    """Where the loop over `steps` tokens makes room in the cache for more of them: 576 -> 144, 288, ..

    A step reads the whole buffers, filled or not. Four lengths save three eighths of that.
    """
    count = min(max(steps // SEGMENT, 1), 4)
    return [steps * n // count for n in range(1, count + 1)]


_STATIC = ("policy", "top_k", "top_p", "guided", "greedy", "with_entropy")


def _generate(
    policy: Policy,
    params: Params,
    condition: Tree,
    rng: PRNGKeyArray,
    sample_ids: Int[Array, " B"],
    temperature: Float[Array, ""],
    scales: Float[Array, " T"],
    given: Int[Array, "B T"] | None = None,
    *,
    top_k: int,
    top_p: float,
    guided: int,
    greedy: bool,
    with_entropy: bool,
) -> tuple[Int[Array, "B T"], Float[Array, "B T"]]:
    """The loop; the first `guided` tokens are drawn from guided logits.

    The cache is made and carried inside one program, where XLA updates every layer's buffer in
    place: there is nothing that a caller could donate. Its buffers grow between loops, so that early
    tokens read short ones.
    """
    batch, length = sample_ids.shape[0], policy.num_tokens
    params = policy.unstacked(params)
    keys = jax.vmap(lambda i: jax.random.fold_in(rng, i))(sample_ids)
    shape = length, num_choices(policy.vocab_size)
    uniforms = jax.vmap(lambda key: uniforms_24(key, shape))(keys).swapaxes(0, 1)  # [T, B, C]

    def pick(logits: Array, uniform: Array, scale: Array, index: Any) -> tuple[Array, Array]:
        if logits.shape[0] == 2 * batch:
            asked, without = logits.reshape(batch, 2, -1).swapaxes(0, 1)
            logits = without + scale * (asked - without)
        spread = jnp.zeros((batch,))
        if greedy:
            token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        else:
            logits = filter_logits(logits / temperature, top_k, top_p)
            spread = entropy(logits) if with_entropy else spread
            token = draw(uniform[:, None], logits)[:, 0]
        if given is not None:
            token = jnp.where(given[:, index] >= 0, given[:, index], token)
        return token, spread

    def step(carry: tuple[Array, Any], inputs: tuple[Array, ...]) -> tuple[Any, Any]:
        token, cache = carry
        index, uniform, scale = inputs
        fed = jnp.repeat(token, 2) if doubled else token
        logits, cache = policy.decode(params, cache, fed, index)
        token, spread = pick(logits, uniform, scale, index + 1)
        return (token, cache), (token, spread)

    doubled = guided > 0
    if doubled:
        # A sample's two rows are neighbours, so that they stay on its device.
        condition = jax.tree.map(
            lambda a, b: jnp.stack([a, b], axis=1).reshape(2 * batch, *a.shape[1:]),
            condition, policy.unconditional(condition),
        )  # fmt: skip
    logits, cache = policy.prefill(params, condition)
    token, spread = pick(logits, uniforms[0], scales[0], 0)
    tokens, spreads = [token[None]], [spread[None]]
    # A loop ends where guidance does, for after it only the conditional half is carried, and where the
    # buffers are full.
    start = 1
    for stop in sorted({*(1 + n for n in segments(length - 1)), max(guided, 1)}):
        if doubled and start >= guided:
            cache = jax.tree.map(lambda x: x[::2] if x.shape[0] == 2 * batch else x, cache)
            doubled = False
        if start == stop:
            continue
        room = next(n for n in segments(length - 1) if n >= stop - 1)
        cache = policy.with_room(cache, room)
        inputs = (jnp.arange(start - 1, stop - 1), uniforms[start:stop], scales[start:stop])
        (token, cache), (more, more_spreads) = jax.lax.scan(step, (token, cache), inputs)
        tokens.append(more)
        spreads.append(more_spreads)
        start = stop
    return jnp.concatenate(tokens).T, jnp.concatenate(spreads).T
