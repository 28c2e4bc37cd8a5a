"""Many draws from one categorical distribution: one cumulative sum and G uniforms."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray


def cumulative(logits: Float[Array, "*s V"]) -> Float[Array, "*s V"]:
    """The unnormalised cumulative distribution of softmax(logits), never falling."""
    weights = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
    # Parallel scans round differently at neighbouring places; a running maximum keeps the steps of
    # impossible tokens at height zero.
    return jax.lax.cummax(jnp.cumsum(weights, axis=-1), axis=logits.ndim - 1)


def uniforms_24(rng: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Uniforms in [0, 1) of all 24 bits that a float32 below 1 can tell apart; JAX's have 23."""
    bits = jax.random.bits(rng, shape, jnp.uint32) >> 8
    return bits.astype(jnp.float32) * jnp.float32(2**-24)


def scaled_heights(
    uniforms: Float[Array, "*s G"], cdf: Float[Array, "*s V"]
) -> Float[Array, "*s G"]:
    """Uniforms stretched to the height of a cumulative distribution and kept below its top."""
    total = cdf[..., -1:]
    return jnp.minimum(uniforms * total, jnp.nextafter(total, jnp.zeros_like(total)))


def sample_group(
    rng: PRNGKeyArray,
    logits: Float[Array, "*batch T V"],
    group_size: int,
    temperature: float | Float[Array, ""] = 1.0,
) -> Int[Array, "*batch G T"]:
    """G token grids, every position drawn independently from softmax(logits / temperature).

    Inverse CDF in float32: the cumulative sum over V is computed once and searched G times, where
    Gumbel noise would cost G·V variates. Nothing of size [B, G, T, V] exists. Uniforms have 24
    bits, so a token's probability is resolved to about 6e-8; a token of probability 0 (logit
    -inf) is never drawn.

    Args:
      rng: key.
      logits: unnormalised log-probabilities, any float dtype; no gradient flows through the draw.
      group_size: G.
      temperature: > 0.

    Returns:
      int32 tokens in [0, V).
    """
    logits = jax.lax.stop_gradient(logits).astype(jnp.float32) / temperature
    uniforms = uniforms_24(rng, (*logits.shape[:-1], group_size))
    return jnp.swapaxes(draw_from_uniforms(uniforms, logits), -1, -2)


def draw_from_uniforms(
    uniforms: Float[Array, "*s G"], logits: Float[Array, "*s V"]
) -> Int[Array, "*s G"]:
    """One token for each uniform, by inverse CDF of softmax(logits); float32 logits."""
    cdf = cumulative(logits)
    search = jnp.vectorize(
        lambda steps, values: jnp.searchsorted(steps, values, side="right"),
        signature="(v),(g)->(g)",
    )
    return search(cdf, scaled_heights(uniforms, cdf)).astype(jnp.int32)


def token_log_probs(
    logits: Float[Array, "B T V"],
    samples: Int[Array, "B G T"],
    temperature: float | Float[Array, ""] = 1.0,
) -> Float[Array, "B G T"]:
    """log π(x_t | context) of every sampled token, in float32."""
    logits = logits.astype(jnp.float32) / temperature
    chosen = jnp.take_along_axis(logits, jnp.swapaxes(samples, 1, 2), axis=-1)
    log_probs = chosen - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    return jnp.swapaxes(log_probs, 1, 2)


def cross_entropy(logits: Float[Array, "B T V"], tokens: Int[Array, "B T"]) -> Float[Array, " B"]:
    """L_prior (Eq. 9): mean over positions of -log π(x*_t | x̃_<t), in nats, for each image.

    At temperature 1 whatever the sampling temperature: it is the model that is regularised.
    """
    return -token_log_probs(logits, tokens[:, None, :])[:, 0].mean(axis=-1)


def entropy(
    logits: Float[Array, "*s V"], temperature: float | Float[Array, ""] = 1.0
) -> Float[Array, "*s"]:
    """Entropy in nats of softmax(logits / temperature)."""
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32) / temperature, axis=-1)
    return -jnp.sum(jnp.where(log_probs > -jnp.inf, jnp.exp(log_probs) * log_probs, 0.0), axis=-1)
