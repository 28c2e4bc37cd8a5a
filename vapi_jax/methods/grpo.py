"""Group-relative policy optimisation (Eq. 4, 5, 11): arrays in, arrays out.

Shapes: B images, G samples of each, T tokens, V vocabulary. A sample's log-probabilities are those
of its tokens under ONE teacher-forced forward of its image.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

RATIOS = ("token", "sequence")


def group_advantages(
    rewards: Float[Array, "B G"], clip: float = 5.0, eps: float = 1e-8
) -> Float[Array, "B G"]:
    """(R - mean) / (std + eps) inside each group (Eq. 4), with the unbiased std, clipped to ±clip.

    A group of equal rewards gets exactly zero. With G samples no advantage exceeds
    (G - 1)/sqrt(G), which is 2.47 at G = 8: the paper's clip at 5 acts from G = 28 on.
    """
    # Relative to the first sample, so that rounding of the mean cannot pass for a signal.
    offsets = rewards - rewards[:, :1]
    centred = offsets - offsets.mean(axis=1, keepdims=True)
    std = jnp.std(offsets, axis=1, ddof=1, keepdims=True)
    return jnp.clip(centred / (std + eps), -clip, clip)


def shuffled(rng: PRNGKeyArray, row: Float[Array, " G"]) -> Float[Array, " G"]:
    """The numbers of one group in random order, by the ranks of random ones: compiled without a sort."""
    draws, places = jax.random.bits(rng, row.shape, jnp.uint32), jnp.arange(row.size)
    equal = (draws[:, None] == draws) & (places[:, None] > places)
    return row[((draws[:, None] > draws) | equal).sum(axis=1)]


def clipped_surrogate(
    logps: Float[Array, "B G T"],
    old_logps: Float[Array, "B G T"],
    advantages: Float[Array, "B G"],
    clip_epsilon: float = 0.2,
    ratio: str = "token",
    token_mask: Bool[Array, "B G T"] | None = None,
    token_penalty: Float[Array, "B G T"] | None = None,
) -> Float[Array, "B G"]:
    """-min(ρ A, clip(ρ, 1 ± ε) A) of every sample: a loss to minimise.

    Args:
      logps: log-probabilities under the policy being updated.
      old_logps: the same tokens' under the policy that drew them.
      advantages: A of each sample.
      clip_epsilon: ε.
      ratio: "token" takes ρ per token and the mean over tokens (the reference implementation);
        "sequence" takes ρ = π(x)/π_old(x) of the whole grid (Eq. 11 as written), whose gradient at
        ρ = 1 is T times larger.
      token_mask: tokens that count (token dropout of the loss); None counts all. A sample left with
        none keeps its first.
      token_penalty: added per token before the mean, for instance a weighted `k3_kl`.

    Returns:
      The loss of each sample.
    """
    if ratio not in RATIOS:
        raise ValueError(f"ratio {ratio!r}: choose one of {RATIOS}")
    if token_mask is None:
        weights = jnp.ones_like(logps)
    else:
        first = jnp.arange(logps.shape[-1]) == 0
        nothing = ~token_mask.any(axis=-1, keepdims=True)
        weights = (token_mask | (nothing & first)).astype(logps.dtype)
    counts = weights.sum(axis=-1)
    log_ratios = logps - old_logps
    if ratio == "token":
        per_token = _pessimistic(jnp.exp(log_ratios), advantages[..., None], clip_epsilon)
        loss = (per_token * weights).sum(axis=-1) / counts
    else:
        loss = _pessimistic(jnp.exp((log_ratios * weights).sum(axis=-1)), advantages, clip_epsilon)
    if token_penalty is not None:
        loss += (token_penalty * weights).sum(axis=-1) / counts
    return loss


def _pessimistic(ratios: Array, advantages: Array, clip_epsilon: float) -> Array:
    clipped = jnp.clip(ratios, 1.0 - clip_epsilon, 1.0 + clip_epsilon)
    return -jnp.minimum(ratios * advantages, clipped * advantages)


def clip_fraction(ratios: Float[Array, "..."], clip_epsilon: float = 0.2) -> Float[Array, ""]:
    """Share of ratios outside [1 - ε, 1 + ε]."""
    return jnp.mean(jnp.abs(ratios - 1.0) > clip_epsilon)


def k3_kl(logps: Float[Array, "*s"], base_logps: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """The k3 estimator of KL(π || base) at tokens drawn from π: e^d - d - 1, d = base - π."""
    difference = base_logps - logps
    return jnp.exp(difference) - difference - 1.0
