"""The context noise K_ξ of the paper (Eq. 28-29): random tokens in place of some true ones."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

VARIANTS = ("paper", "full")
Variant = Literal["paper", "full"]
"""Eq. 28, without the true token | all of V."""


def purpose_keys(rng: PRNGKeyArray, index: Int[Array, " B"]) -> PRNGKeyArray:
    """Keys [4, B] that belong to an image and a purpose, whatever microbatch or device it is on."""
    keys = jax.vmap(lambda i: jax.random.split(jax.random.fold_in(rng, i), 4))(index)
    return jnp.swapaxes(keys, 0, 1)


def make_context(
    keys: PRNGKeyArray,
    tokens: Int[Array, "B T"],
    noise_rate: float,
    vocab_size: int,
    variant: str = "paper",
) -> Int[Array, "B T"]:
    """x̃ ~ K_ξ(. | x*), Eq. 28, a key for each image."""
    return jax.vmap(lambda key, x: corrupt(key, x, noise_rate, vocab_size, variant))(keys, tokens)


def corrupt(
    rng: PRNGKeyArray,
    tokens: Int[Array, "*shape"],
    noise_rate: float | Float[Array, ""],
    vocab_size: int,
    variant: str = "paper",
) -> Int[Array, "*shape"]:
    """Replaces each token independently with probability ξ.

    Args:
      rng: key; the same key corrupts the same positions at a higher rate, and more.
      tokens: true tokens in [0, vocab_size).
      noise_rate: ξ in [0, 1].
      vocab_size: K of Eq. 29.
      variant: "paper" draws from V without the true token (Eq. 28), so a share ξ of the tokens
        changes; "full" draws from all of V as the reference implementation does, so a share
        ξ·(1 - 1/K) changes.

    Returns:
      The corrupted tokens, of the shape and dtype of `tokens`.

    Raises:
      ValueError: for an unknown variant, or a vocabulary of one token under "paper".
    """
    if variant not in VARIANTS:
        raise ValueError(f"corruption variant {variant!r}: choose one of {VARIANTS}")
    if variant == "paper" and vocab_size < 2:
        raise ValueError(f"vocab_size={vocab_size}: no other token to replace the true one with")
    where_rng, which_rng = jax.random.split(rng)
    replaced = jax.random.uniform(where_rng, tokens.shape) < noise_rate
    if variant == "paper":
        # A uniform non-zero shift modulo K is uniform over the K - 1 other tokens.
        shift = jax.random.randint(which_rng, tokens.shape, 1, vocab_size, dtype=tokens.dtype)
        noise = (tokens + shift) % vocab_size
    else:
        noise = jax.random.randint(which_rng, tokens.shape, 0, vocab_size, dtype=tokens.dtype)
    return jnp.where(replaced, noise, tokens)
