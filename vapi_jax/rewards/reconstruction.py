"""The reconstruction reward (Eq. 10) and its optional extras, one value per sample.

Images are NHWC in [-1, 1]. A target is given once for its group: its arrays carry a group axis of
length 1 and broadcast against the samples' G.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class RewardWeights:
    """Weights of the reward's terms; the paper uses MSE and LPIPS alone, both with weight 1."""

    mse: float = 1.0
    lpips: float = 1.0
    l1: float = 0.0
    codebook_cosine: float = 0.0
    gan: float = 0.0

    def used(self) -> tuple[str, ...]:
        """Names of the terms with a non-zero weight."""
        return tuple(f.name for f in dataclasses.fields(self) if getattr(self, f.name) != 0.0)


def mse(
    samples: Float[Array, "*b H W C"], target: Float[Array, "*t H W C"], reduction: str = "mean"
) -> Float[Array, "*b"]:
    """Mean of squared differences over pixels and channels, or their "sum" (Eq. 31 as written)."""
    squares = jnp.square(samples.astype(jnp.float32) - target)
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction {reduction!r}: choose 'mean' or 'sum'")
    return (jnp.mean if reduction == "mean" else jnp.sum)(squares, axis=(-3, -2, -1))


def l1(samples: Float[Array, "*b H W C"], target: Float[Array, "*t H W C"]) -> Float[Array, "*b"]:
    """Mean absolute difference over pixels and channels."""
    return jnp.mean(jnp.abs(samples.astype(jnp.float32) - target), axis=(-3, -2, -1))


def codebook_cosine(
    codes: Float[Array, "*b T D"], latents: Float[Array, "*t T D"]
) -> Float[Array, "*b"]:
    """1 - cosine of the angle between all of a sample's codes and its image's latents; in [0, 2].

    Codes are the decoder's input (unit vectors where the tokenizer normalises), latents the encoder's
    output before normalisation; each is taken as one long vector.
    """
    dot = jnp.sum(codes * latents, axis=(-2, -1))
    norms = jnp.sqrt(
        jnp.sum(jnp.square(codes), axis=(-2, -1)) * jnp.sum(jnp.square(latents), axis=(-2, -1))
    )
    return 1.0 - dot / jnp.maximum(norms, 1e-8)


def gan(fake_logits: Float[Array, "*b h w c"]) -> Float[Array, "*b"]:
    """Minus the discriminator's mean logit of each sample: lower looks more real."""
    return -jnp.mean(fake_logits.astype(jnp.float32), axis=(-3, -2, -1))


def reward(losses: dict[str, Float[Array, "*b"]], weights: RewardWeights) -> Float[Array, "*b"]:
    """R = -Σ weight·loss over the terms in use (Eq. 10 with MSE and LPIPS).

    Raises:
      KeyError: if a term with a non-zero weight was not computed.
    """
    return -sum(getattr(weights, name) * losses[name] for name in weights.used())
