"""Categorical distributions: the one sampler of tokens, log-probabilities, entropy."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

PARTS = 8
"""A token is found by choosing among so many parts of the vocabulary, then of that part, and so on.

More parts are fewer choices, and more steps of a cumulative sum that rounding can move.
"""


def num_choices(vocab: int) -> int:
    """How many choices `draw` makes for a token, and so how many uniforms it takes: 16384 -> 5."""
    choices = 1
    while PARTS**choices < vocab:
        choices += 1
    return choices


def uniforms_24(rng: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Uniforms in [0, 1) of all 24 bits that a float32 below 1 can tell apart; JAX's have 23."""
    bits = jax.random.bits(rng, shape, jnp.uint32) >> 8
    return bits.astype(jnp.float32) * jnp.float32(2**-24)


def draw(uniforms: Float[Array, "*s G C"], logits: Float[Array, "*s V"]) -> Int[Array, "*s G"]:
    """G tokens of every distribution softmax(logits): the only way in which tokens are drawn.

    Each is found by `num_choices(V)` choices, every one an inverse CDF in float32 over `PARTS` sums of
    probabilities (the first over what is left: 16384 = 4 x 8 x 8 x 8 x 8). One pass over the
    vocabulary makes the sums of its blocks; the first choices are made among these, the rest inside
    the block that each draw takes out. So no array is V wide for every draw, nothing is sorted, and
    there is one gather.

    One CDF over all V tokens would have V steps, each of which rounding can move across the uniform:
    of 480 samples of 64 tokens, V = 1024, it made 8 others on eight devices than on one. Gumbel
    noise is as steady as this and takes V random numbers a draw.

    Args:
      uniforms: [0, 1), C = `num_choices(V)` for each draw. With 24 bits each choice is resolved to
        6e-8.
      logits: any float dtype; a token at -inf is never drawn. At least one must be finite.
    """
    vocab, choices = logits.shape[-1], num_choices(logits.shape[-1])
    inner = choices // 2
    width = PARTS**inner
    blocks = -(-vocab // PARTS ** (choices - 1)) * PARTS ** (choices - 1 - inner)
    logits = logits.astype(jnp.float32)
    weights = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
    weights = jnp.pad(weights, [(0, 0)] * (logits.ndim - 1) + [(0, blocks * width - vocab)])
    weights = weights.reshape(*logits.shape[:-1], blocks, width)
    block = _choose(uniforms[..., : choices - inner], weights.sum(axis=-1)[..., None, :])
    if inner == 0:
        return block
    taken = jnp.take_along_axis(weights, block[..., None], axis=-2)  # [*s, G, width]
    return block * width + _choose(uniforms[..., choices - inner :], taken)


def _choose(uniforms: Float[Array, "*s C"], weights: Float[Array, "*#s N"]) -> Int[Array, "*s"]:
    """A place among N = n·PARTS^(C-1) weights by C choices; never one of weight 0."""
    place = jnp.zeros(uniforms.shape[:-1], jnp.int32)
    for choice in range(uniforms.shape[-1]):
        size = PARTS ** (uniforms.shape[-1] - 1 - choice)
        weights = weights.reshape(*weights.shape[:-1], -1, size)
        # Parallel scans round differently at neighbouring places; a running maximum keeps the steps
        # of impossible parts at height zero.
        sums = jnp.cumsum(weights.sum(axis=-1), axis=-1)
        cdf = jax.lax.cummax(sums, axis=sums.ndim - 1)
        total = cdf[..., -1]
        below = jnp.nextafter(total, jnp.zeros_like(total))
        height = jnp.minimum(uniforms[..., choice] * total, below)
        part = jnp.sum(cdf <= height[..., None], axis=-1, dtype=jnp.int32)
        parts = weights.shape[-2]
        part = jnp.minimum(part, parts - 1)  # weights so small that their sum is 0
        place = parts * place + part
        if size > 1:
            mine = jnp.arange(parts)[:, None] == part[..., None, None]
            weights = jnp.sum(jnp.where(mine, weights, 0.0), axis=-2)
    return place


def sample_group(
    rng: PRNGKeyArray,
    logits: Float[Array, "*batch T V"],
    group_size: int,
    temperature: float | Float[Array, ""] = 1.0,
) -> Int[Array, "*batch G T"]:
    """G token grids, every position drawn independently from softmax(logits / temperature).

    See `draw`. Nothing of size [B, G, T, V] exists.

    Args:
      rng: key.
      logits: unnormalised log-probabilities, any float dtype; no gradient flows through the draw.
      group_size: G.
      temperature: > 0.

    Returns:
      int32 tokens in [0, V).
    """
    logits = jax.lax.stop_gradient(logits).astype(jnp.float32) / temperature
    shape = *logits.shape[:-1], group_size, num_choices(logits.shape[-1])
    return jnp.swapaxes(draw(uniforms_24(rng, shape), logits), -1, -2)


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
