"""Group-relative policy optimisation (Eq. 4, 5, 11) and what others have made of it: arrays in, arrays out.

Shapes: B images, G samples of each, T tokens, V vocabulary, R one or G. A sample's log-probabilities are
those of its tokens under ONE teacher-forced forward of its image. docs/methods.md has a line for each option:
formula, source, and when it does nothing.
"""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

RATIOS = ("token", "sequence", "sequence_mean")
Scale = Literal["group", "batch", "none", "rloo"]


def group_advantages(
    rewards: Float[Array, "B G *T"], clip: float = 5.0, eps: float = 1e-8
) -> Float[Array, "B G *T"]:
    """(R - mean) / (std + eps) inside each group (Eq. 4), with the unbiased std, clipped to ±clip.

    A group of equal rewards gets exactly zero. With G samples no advantage exceeds
    (G - 1)/sqrt(G), which is 2.47 at G = 8: the paper's clip at 5 acts from G = 27 on.
    """
    centred, offsets = _centred(rewards)
    std = jnp.std(offsets, axis=1, ddof=1, keepdims=True)
    return jnp.clip(centred / (std + eps), -clip, clip)


def _centred(rewards: Array) -> tuple[Array, Array]:
    """Rewards less their group's mean, and less its first."""
    # Relative to the first sample, so that rounding of the mean cannot pass for a signal.
    offsets = rewards - rewards[:, :1]
    return offsets - offsets.mean(axis=1, keepdims=True), offsets


def scaled_advantages(
    rewards: Float[Array, "B G *T"],
    scale: Scale = "group",
    clip: float = 5.0,
    axes: Sequence[str] = (),
    eps: float = 1e-8,
) -> Float[Array, "B G *T"]:
    """Advantages with another scale than the group's standard deviation, clipped to ±clip.

    Args:
      rewards: of each sample, or of each of its tokens.
      scale: "group", Eq. 4. "none", R - mean (Dr.GRPO, arXiv 2503.20783). "rloo", R - mean of the others
        = G/(G - 1) (R - mean) (arXiv 2402.14740). "batch", (R - mean)/(std + eps) with the std of R over
        all samples (Flow-GRPO, arXiv 2505.05470).
      clip: the largest advantage.
      axes: of the mesh, over which the batch is split where this runs inside `jax.shard_map`.
      eps: keeps equal rewards from a division by zero.
    """
    if scale == "group":
        return group_advantages(rewards, clip, eps)
    centred, _ = _centred(rewards)
    if scale == "rloo":
        centred = centred * (rewards.shape[1] / (rewards.shape[1] - 1))
    elif scale == "batch":
        centred = centred / (batch_std(rewards, axes) + eps)
    return jnp.clip(centred, -clip, clip)


def batch_std(values: Float[Array, "*s"], axes: Sequence[str] = ()) -> Float[Array, ""]:
    """The standard deviation of all numbers of a batch, over the devices of `axes` too."""
    mean = values.mean()
    if axes:
        mean = jax.lax.pmean(mean, axes)
    variance = jnp.square(values - mean).mean()
    return jnp.sqrt(jax.lax.pmean(variance, axes) if axes else variance)


def shuffled(rng: PRNGKeyArray, row: Float[Array, "G ..."]) -> Float[Array, "G ..."]:
    """One group's samples in random order, by the ranks of random numbers: compiled without a sort."""
    draws = jax.random.bits(rng, row.shape[:1], jnp.uint32)
    return row[_ranks(draws)]


def _ranks(values: Array) -> Array:
    """The place of each number among all in rising order, ties by position; quadratic, no sort."""
    places = jnp.arange(values.size)
    equal = (values[:, None] == values) & (places[:, None] > places)
    return ((values[:, None] > values) | equal).sum(axis=1)


def highest_entropy(entropy: Float[Array, "B T"], share: float) -> Bool[Array, "B 1 T"]:
    """The share of an image's tokens whose distributions have most entropy, at least one.

    "Beyond the 80/20 rule" (arXiv 2506.01939) keeps a fifth; here the quantile is each image's own, so
    that it does not depend on the batch.
    """
    count = max(round(share * entropy.shape[-1]), 1)
    return (jax.vmap(_ranks)(entropy) >= entropy.shape[-1] - count)[:, None]


def clipped_surrogate(
    logps: Float[Array, "B G T"],
    old_logps: Float[Array, "B G T"],
    advantages: Float[Array, "B G *t"],
    clip_epsilon: float = 0.2,
    ratio: str = "token",
    token_mask: Bool[Array, "B R T"] | None = None,
    token_penalty: Float[Array, "B R T"] | None = None,
    clip_epsilon_high: float = 0.0,
    weights: Float[Array, "B G T"] | None = None,
) -> Float[Array, "B G"]:
    """-min(ρ A, clip(ρ, 1 - ε, 1 + ε') A) of every sample: a loss to minimise.

    Args:
      logps: log-probabilities under the policy being updated.
      old_logps: the same tokens' under the policy that drew them.
      advantages: A of each sample, or of each of its tokens.
      clip_epsilon: ε.
      ratio: "token" takes ρ per token and the mean over tokens (the reference implementation);
        "sequence" takes ρ = π(x)/π_old(x) of the whole grid (Eq. 11 as written), whose gradient at
        ρ = 1 is T times larger; "sequence_mean" its T-th root (GSPO, arXiv 2507.18071), which wants a
        far smaller ε. Only "token" takes advantages of tokens.
      token_mask: tokens that count (token dropout of the loss); None counts all. A sample left with
        none keeps its first.
      token_penalty: added per token before the mean, for instance a weighted `k3_kl`.
      clip_epsilon_high: ε' of clip-higher (DAPO, arXiv 2503.14476); 0 for ε.
      weights: of tokens in the policy term, such as `importance_weights`; None for 1.

    Returns:
      The loss of each sample.
    """
    if ratio not in RATIOS:
        raise ValueError(f"ratio {ratio!r}: choose one of {RATIOS}")
    bounds = 1.0 - clip_epsilon, 1.0 + (clip_epsilon_high or clip_epsilon)
    if token_mask is None:
        counted = jnp.ones_like(logps)
    else:
        first = jnp.arange(logps.shape[-1]) == 0
        nothing = ~token_mask.any(axis=-1, keepdims=True)
        kept = (token_mask | (nothing & first)).astype(logps.dtype)
        counted = jnp.broadcast_to(kept, logps.shape)
    counts = counted.sum(axis=-1)
    share = counted if weights is None else counted * weights
    log_ratios = logps - old_logps
    if ratio == "token":
        of_tokens = advantages if advantages.ndim == 3 else advantages[..., None]
        per_token = _pessimistic(jnp.exp(log_ratios), of_tokens, bounds)
        loss = (per_token * share).sum(axis=-1) / counts
    else:
        whole = (log_ratios * counted).sum(axis=-1)
        whole = whole / counts if ratio == "sequence_mean" else whole
        loss = _pessimistic(jnp.exp(whole), advantages, bounds)
        if weights is not None:
            loss = loss * share.sum(axis=-1) / counts
    if token_penalty is not None:
        loss += (token_penalty * counted).sum(axis=-1) / counts
    return loss


def _pessimistic(ratios: Array, advantages: Array, bounds: tuple[float, float]) -> Array:
    clipped = jnp.clip(ratios, *bounds)
    return -jnp.minimum(ratios * advantages, clipped * advantages)


def clip_fraction(
    ratios: Float[Array, "..."], clip_epsilon: float = 0.2, clip_epsilon_high: float = 0.0
) -> Float[Array, ""]:
    """Share of ratios outside [1 - ε, 1 + ε']."""
    high = clip_epsilon_high or clip_epsilon
    return jnp.mean((ratios - 1.0 > high) | (1.0 - ratios > clip_epsilon))


def k3_kl(logps: Float[Array, "*s"], base_logps: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """The k3 estimator of KL(π || base) at tokens drawn from π: e^d - d - 1, d = base - π.

    Its gradient at those tokens is that of KL(base || π), distillation from the base.
    """
    difference = base_logps - logps
    return jnp.exp(difference) - difference - 1.0


def k2_kl(logps: Float[Array, "*s"], base_logps: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """½ (log π/base)², whose gradient at tokens drawn from π is that of KL(π || base)."""
    return 0.5 * jnp.square(logps - base_logps)


def importance_weights(
    logps: Float[Array, "*s"], sampler_logps: Float[Array, "*s"], cap: float
) -> Float[Array, "*s"]:
    """min(π/π_sampler, cap), no gradient: what was drawn from another distribution than is trained.

    Truncated importance sampling (Ionides 2008).
    """
    return jax.lax.stop_gradient(jnp.minimum(jnp.exp(logps - sampler_logps), cap))
