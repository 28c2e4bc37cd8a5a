"""Vector quantisation on arrays: nearest codes, their entropy and use, restarts of dead codes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_HIGHEST = jax.lax.Precision.HIGHEST


def l2_normalize(x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Unit vectors along the last axis; a vector shorter than 1e-12 is divided by 1e-12.

    The clamp sits inside the root so that the gradient at a zero vector is finite.
    """
    return x / jnp.sqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24))


def squared_distances(
    latents: Float[Array, "N D"], codebook: Float[Array, "K D"]
) -> Float[Array, "N K"]:
    """Squared euclidean distances of all pairs, in float32 (never TF32 or bfloat16 products)."""
    products = jnp.einsum("nd,kd->nk", latents, codebook, precision=_HIGHEST)
    lengths = jnp.square(latents).sum(-1)[:, None] + jnp.square(codebook).sum(-1)
    return lengths - 2 * products


def nearest_codes(
    latents: Float[Array, "N D"], codebook: Float[Array, "K D"], block_size: int = 2048
) -> Int[Array, " N"]:
    """Index of the nearest code of each latent, int32; the smaller index wins a tie.

    The codebook is scanned in blocks: 128 images of 576 tokens against 16384 codes would
    otherwise make a distance matrix of 4.8 GB. Blocks run over codes, not over latents, so a batch
    sharded over devices stays where it is.
    """
    num_codes = codebook.shape[0]
    if num_codes <= block_size or num_codes % block_size:
        return jnp.argmin(squared_distances(latents, codebook), axis=-1).astype(jnp.int32)

    def visit(best: tuple[Array, Array], block: tuple[Array, Array]) -> tuple[tuple, None]:
        best_distance, best_index = best
        codes, offset = block
        distances = squared_distances(latents, codes)
        index = jnp.argmin(distances, axis=-1).astype(jnp.int32)
        distance = distances.min(-1)
        nearer = distance < best_distance
        best_index = jnp.where(nearer, index + offset, best_index)
        return (jnp.where(nearer, distance, best_distance), best_index), None

    # Derived from the latents, so that under shard_map they vary over the same mesh axes.
    zeros = jnp.zeros_like(latents[:, 0])
    start = (zeros + jnp.inf, zeros.astype(jnp.int32))
    blocks = codebook.reshape(-1, block_size, codebook.shape[-1])
    offsets = jnp.arange(0, num_codes, block_size, dtype=jnp.int32)
    (_, indices), _ = jax.lax.scan(visit, start, (blocks, offsets))
    return indices


def entropy_loss(affinity: Float[Array, "N K"], temperature: float) -> Float[Array, ""]:
    """Mean entropy of the soft assignments minus the entropy of their mean (LlamaGen, MaskGIT).

    Small when every latent is sure of its code and all codes are used alike.
    """
    logits = affinity / temperature
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    probs = jax.nn.softmax(logits, axis=-1)
    mean_probs = probs.mean(0)
    entropy_of_mean = -(mean_probs * jnp.log(mean_probs + 1e-5)).sum()
    mean_entropy = -(probs * log_probs).sum(-1).mean()
    return mean_entropy - entropy_of_mean


def codebook_usage(indices: Int[Array, "*shape"], codebook_size: int) -> Float[Array, ""]:
    """Share of the codes that occur in `indices`, in [0, 1]."""
    used = jnp.zeros(codebook_size, bool).at[indices.reshape(-1)].set(True)
    return used.mean(dtype=jnp.float32)


def restart_dead_codes(
    rng: Array,
    codebook: Float[Array, "K D"],
    usage_counts: Float[Array, " K"],
    latents: Float[Array, "N D"],
    threshold: float | Float[Array, ""] = 1.0,
) -> Float[Array, "K D"]:
    """Puts every code used less than `threshold` on the place of a random encoder output.

    Args:
      rng: key that picks the encoder outputs.
      codebook: as stored in the parameters.
      usage_counts: running number of uses of each code, in the unit of `threshold`.
      latents: encoder outputs before normalisation. Drawn without repetition if there are at
        least K of them, so that two restarted codes do not coincide.
      threshold: codes whose count is below it are dead.

    Returns:
      The codebook; rows of live codes are unchanged, restarted rows have unit length.
    """
    num_codes, num_latents = codebook.shape[0], latents.shape[0]
    rows = jax.random.choice(rng, num_latents, (num_codes,), replace=num_latents < num_codes)
    dead = usage_counts < threshold
    return jnp.where(dead[:, None], l2_normalize(latents[rows]).astype(codebook.dtype), codebook)
