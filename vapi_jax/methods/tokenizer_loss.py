"""Losses that train the tokenizer: Eq. 30-33 of the paper, with LlamaGen's adversarial term.

Two players take turns. The tokenizer minimises `tokenizer_loss` (pixels, perception, codebook, and
fooling the discriminator); the discriminator minimises `discriminator_step_loss`. Both are pure:
networks come in as functions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vapi_jax.common.options import NotNegative
from vapi_jax.models.layers import conv2d
from vapi_jax.models.quantize import codebook_usage
from vapi_jax.models.vq import VQOutput

Scalar = Float[Array, ""]

DiscriminatorKind = Literal["hinge", "vanilla", "non-saturating", "non-saturating-llamagen"]
AdversarialKind = Literal["hinge", "non-saturating", "non-saturating-llamagen"]


@dataclasses.dataclass(frozen=True)
class LossWeights:
    """Weights of the tokenizer's loss."""

    reconstruction: NotNegative = 1.0
    perceptual: NotNegative = 1.0  # lambda_p in Eq. 30
    codebook: NotNegative = 1.0  # lambda_q in Eq. 30
    adversarial: NotNegative = 0.5
    adaptive: bool = True  # scale the adversarial term to the gradient of the other terms
    reconstruction_norm: Literal["l1", "l2"] = (
        "l2"  # "l2": mean squared error | "l1": mean absolute error
    )


class TokenizerAux(NamedTuple):
    """What a trainer wants beside the loss."""

    metrics: dict[str, Scalar]
    output: VQOutput  # reconstruction for the discriminator's step; indices and z for restarts


def _swapped_cross_entropy(logit: float, targets: Float[Array, "*shape"]) -> Scalar:
    """Binary cross-entropy of one constant logit against `targets` (linear in them), mean."""
    return (jax.nn.softplus(logit) - logit * targets).mean()


def discriminator_loss(
    real: Float[Array, "*real"], fake: Float[Array, "*fake"], kind: str = "hinge"
) -> Scalar:
    """Half the sum of the losses on real and on reconstructed images.

    Args:
      real: logits of real images.
      fake: logits of reconstructions.
      kind: "hinge"; "vanilla" = "non-saturating" (binary cross-entropy: the two differ in the
        generator's loss only); "non-saturating-llamagen", where LlamaGen passes the constant label
        as the logit and the logits as the label, so that the loss is linear in the real logits
        and ignores the fake ones. It is here to reproduce runs, not to train with.

    Raises:
      ValueError: for another kind.
    """
    if kind == "hinge":
        on_real, on_fake = jax.nn.relu(1 - real).mean(), jax.nn.relu(1 + fake).mean()
    elif kind in ("vanilla", "non-saturating"):
        on_real, on_fake = jax.nn.softplus(-real).mean(), jax.nn.softplus(fake).mean()
    elif kind == "non-saturating-llamagen":
        on_real, on_fake = _swapped_cross_entropy(1.0, real), _swapped_cross_entropy(0.0, fake)
    else:
        raise ValueError(f"discriminator loss {kind!r} is not one of {get_args(DiscriminatorKind)}")
    return 0.5 * (on_real + on_fake)


def generator_adversarial_loss(fake: Float[Array, "*fake"], kind: str = "hinge") -> Scalar:
    """The loss by which the tokenizer fools the discriminator, from logits of reconstructions.

    Args:
      fake: logits of reconstructions.
      kind: "hinge" (-mean), "non-saturating" (-log sigmoid), or "non-saturating-llamagen" (see
        `discriminator_loss`; up to a constant it equals "hinge").

    Raises:
      ValueError: for another kind.
    """
    if kind == "hinge":
        return -fake.mean()
    if kind == "non-saturating":
        return jax.nn.softplus(-fake).mean()
    if kind == "non-saturating-llamagen":
        return _swapped_cross_entropy(1.0, fake)
    raise ValueError(f"adversarial loss {kind!r} is not one of {get_args(AdversarialKind)}")


def adaptive_weight(nll_grad: Float[Array, "*shape"], adv_grad: Float[Array, "*shape"]) -> Scalar:
    """||nll_grad|| / (||adv_grad|| + 1e-4) in [0, 1e4], a constant to differentiation.

    The gradients are those of the decoder's last kernel (VQGAN, Esser et al. 2021, Eq. 7).
    """
    weight = jnp.linalg.norm(nll_grad) / (jnp.linalg.norm(adv_grad) + 1e-4)
    return jax.lax.stop_gradient(jnp.clip(weight, 0.0, 1e4))


def last_kernel_gradient(
    features: Float[Array, "B H W C"], image_gradient: Float[Array, "B H W 3"]
) -> Float[Array, "3 3 C 3"]:
    """Gradient of the decoder's last 3x3 kernel, given the gradient of the images it produces.

    A convolution is linear in its kernel, so neither the kernel nor another pass is needed.
    """
    shape = (3, 3, features.shape[-1], image_gradient.shape[-1])
    _, pull_back = jax.vjp(lambda k: conv2d(features, k), jnp.zeros(shape, features.dtype))
    return pull_back(image_gradient.astype(features.dtype))[0].astype(jnp.float32)


def tokenizer_loss(
    params: Mapping[str, Any],
    images: Float[Array, "B H W 3"],
    *,
    apply_tokenizer: Callable[[Mapping[str, Any], Array], VQOutput],
    perceptual_fn: Callable[[Array, Array], Float[Array, " B"]] | None,
    codebook_size: int,
    disc_logits_fn: Callable[[Array], Array] | None = None,
    weights: LossWeights = LossWeights(),
    adversarial_kind: str = "hinge",
    disc_on: float | Scalar = 1.0,
) -> tuple[Scalar, TokenizerAux]:
    """The tokenizer's loss on one batch; differentiate it with respect to `params`.

    The perceptual network and the discriminator run forward and backward once, down to the image;
    those two image gradients give the adaptive weight, are added, and enter the tokenizer's own
    backward pass as one. Only `params` receives a gradient.

    Args:
      params: the tokenizer's parameters.
      images: in [-1, 1].
      apply_tokenizer: (params, images) -> VQOutput, a training pass.
      perceptual_fn: (images, reconstructions) -> distance of each pair, such as LPIPS; None leaves
        the term out.
      codebook_size: K, for the usage in the metrics.
      disc_logits_fn: reconstructions -> logits (batch statistics, as in training); None leaves the
        adversarial term out and saves its computation.
      weights: of the terms.
      adversarial_kind: see `generator_adversarial_loss`.
      disc_on: 0 or 1, may be traced: LlamaGen starts the adversarial term after some steps.

    Returns:
      The loss and `TokenizerAux`; its metrics are unweighted, except the codebook terms, which
      carry the tokenizer's own weights (beta, entropy ratio).
    """
    output = apply_tokenizer(params, images)
    at = jax.lax.stop_gradient(output.reconstruction)
    metrics: dict[str, Scalar] = {}

    def fidelity(reconstruction: Array) -> tuple[Scalar, tuple[Scalar, Scalar]]:
        error = reconstruction - images
        error = jnp.square(error) if weights.reconstruction_norm == "l2" else jnp.abs(error)
        rec, perceptual = error.mean(), jnp.zeros(())
        if perceptual_fn is not None:
            perceptual = perceptual_fn(images, reconstruction).mean()
        return weights.reconstruction * rec + weights.perceptual * perceptual, (rec, perceptual)

    def fooling(reconstruction: Array) -> tuple[Scalar, Scalar]:
        assert disc_logits_fn is not None
        logits = disc_logits_fn(reconstruction)
        return generator_adversarial_loss(logits, adversarial_kind), logits.mean()

    (value, parts), image_gradient = jax.value_and_grad(fidelity, has_aux=True)(at)
    metrics["reconstruction_loss"], metrics["perceptual_loss"] = parts
    if disc_logits_fn is not None:
        (adv, logit), adv_gradient = jax.value_and_grad(fooling, has_aux=True)(at)
        scale = jnp.asarray(weights.adversarial * disc_on, jnp.float32)
        if weights.adaptive:
            features = jax.lax.stop_gradient(output.features)
            metrics["adaptive_weight"] = adaptive_weight(
                last_kernel_gradient(features, image_gradient),
                last_kernel_gradient(features, adv_gradient),
            )
            scale = scale * metrics["adaptive_weight"]
        value = value + scale * adv
        image_gradient = image_gradient + scale * adv_gradient
        metrics |= {"adversarial_loss": adv, "adversarial_scale": scale, "logits_fake": logit}

    # Adds an exact zero whose derivative with respect to the reconstruction is `image_gradient`.
    zero = output.reconstruction - at
    image_loss = jax.lax.stop_gradient(value) + (jax.lax.stop_gradient(image_gradient) * zero).sum()
    codebook_loss = output.vq_loss + output.commit_loss + output.entropy_loss
    loss = image_loss + weights.codebook * codebook_loss
    metrics |= {
        "vq_loss": output.vq_loss,
        "commit_loss": output.commit_loss,
        "entropy_loss": output.entropy_loss,
        "codebook_usage": codebook_usage(output.indices, codebook_size),
        "loss": loss,
    }
    return loss, TokenizerAux(metrics, output)


def discriminator_step_loss(
    params: Mapping[str, Any],
    batch_stats: Mapping[str, Any],
    real: Float[Array, "B H W 3"],
    fake: Float[Array, "B H W 3"],
    *,
    apply_discriminator: Callable[..., tuple[Array, Mapping[str, Any]]],
    kind: str = "hinge",
    weight: float | Scalar = 0.5,
) -> tuple[Scalar, tuple[dict[str, Scalar], Mapping[str, Any]]]:
    """The discriminator's loss on one batch; differentiate it with respect to `params`.

    Real and reconstructed images pass separately, each normalised by its own batch statistics.

    Args:
      params: the discriminator's parameters.
      batch_stats: its running statistics.
      real: images in [-1, 1].
      fake: their reconstructions.
      apply_discriminator: (params, batch_stats, images) -> (logits, new batch_stats).
      kind: see `discriminator_loss`.
      weight: of the loss; 0 while the adversarial term is off, may be traced.

    Returns:
      The weighted loss, and (metrics, new batch_stats).
    """
    real, fake = jax.lax.stop_gradient((real, fake))
    logits_real, batch_stats = apply_discriminator(params, batch_stats, real)
    logits_fake, batch_stats = apply_discriminator(params, batch_stats, fake)
    loss = discriminator_loss(logits_real, logits_fake, kind)
    metrics = {
        "discriminator_loss": loss,
        "logits_real": logits_real.mean(),
        "logits_fake": logits_fake.mean(),
    }
    return weight * loss, (metrics, batch_stats)
