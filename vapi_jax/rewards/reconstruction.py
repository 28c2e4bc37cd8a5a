"""The reconstruction reward (Eq. 10) and its optional extras: pure functions, and rewards made of them.

Images are NHWC in [-1, 1]. A target is given once for its group: its arrays carry a group axis of
length 1 and broadcast against the samples' G.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from vapi_jax.common.options import Count, Dtype
from vapi_jax.common.paths import PathText
from vapi_jax.common.trees import flatten
from vapi_jax.models import lpips
from vapi_jax.models.discriminator import PatchGAN
from vapi_jax.rewards.pairs import pooled_inner
from vapi_jax.rewards.reward import Batch, Reward, Rewards
from vapi_jax.weights.names import WeightsError, check_finite, check_like
from vapi_jax.weights.store import load_metadata, load_safetensors

# --- pure functions: losses, lower is better ------------------------------------------------------


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


# --- rewards: their negatives ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class MSE(Reward):
    """-MSE of pixels, the first term of Eq. 10."""

    has_inner: ClassVar[bool] = True

    reduction: Literal["mean", "sum"] = "mean"  # "sum": Eq. 31 as written

    def __call__(self, weights: Any, pixels: Float[Array, "B G H W 3"], batch: Batch) -> Rewards:
        return -mse(pixels, batch["image"][:, None], self.reduction)

    def inner(
        self, weights: Any, pixels: Float[Array, "B G H W 3"], batch: Batch, cells: int
    ) -> Float[Array, "B G G C"]:
        height, width, channels = pixels.shape[-3:]
        share = height * width if self.reduction == "sum" else 1 / channels
        return share * pooled_inner(pixels - batch["image"][:, None], cells)


@dataclasses.dataclass(frozen=True)
class L1(Reward):
    """-mean absolute difference of pixels."""

    def __call__(self, weights: Any, pixels: Float[Array, "B G H W 3"], batch: Batch) -> Rewards:
        return -l1(pixels, batch["image"][:, None])


@dataclasses.dataclass(frozen=True)
class LPIPS(Reward):
    """-LPIPS, the second term of Eq. 10 (Eq. 32). An image's features are computed once for its G samples."""

    width: ClassVar[int] = 64
    has_inner: ClassVar[bool] = True

    net: Literal["vgg", "alex"] = (
        "vgg"  # the paper: VGG; the reference implementation for Janus: AlexNet
    )
    # the well-known files of backbone and heads; () for the bundled ones
    files: tuple[PathText, ...] = ()
    dtype: Dtype = "float32"  # of the convolutions

    @property
    def least_side(self) -> int:
        return lpips.least_side(self.net)

    def problems(self, side: int) -> list[str]:
        lines = super().problems(side)
        if self.files and len(self.files) != 2:
            lines.append(
                f"files: wants two, the backbone's and the heads' (or none), not {len(self.files)}"
            )
        return lines

    def load(self) -> Any:
        return lpips.load_lpips_params(self.net, self.files)

    def shapes(self) -> Any:
        return lpips.lpips_shapes(self.net)

    def origin(self) -> tuple[str, str] | None:
        return perceptual_origin(self.net, self.files)

    def __call__(self, weights: Any, pixels: Float[Array, "B G H W 3"], batch: Batch) -> Rewards:
        with jax.named_scope("lpips"):
            return -lpips.lpips_from_features(
                weights, *self._features(weights, pixels, batch), self.net
            )

    def _features(self, weights: Any, pixels: Array, batch: Batch) -> tuple[Any, Any]:
        """Of images [B, 1, h, w, C] and samples [B, G, h, w, C], every layer."""
        flat = rearrange(pixels, "b g h w c -> (b g) h w c")
        real = lpips.lpips_features(weights, batch["image"], self.net, self.dtype)
        fake = lpips.lpips_features(weights, flat, self.net, self.dtype)
        return (
            tuple(f[:, None] for f in real),
            tuple(rearrange(f, "(b g) h w c -> b g h w c", g=pixels.shape[1]) for f in fake),
        )

    def inner(
        self, weights: Any, pixels: Float[Array, "B G H W 3"], batch: Batch, cells: int
    ) -> Float[Array, "B G G C"]:
        with jax.named_scope("lpips"):
            layers = zip(*self._features(weights, pixels, batch), strict=True)
            found = [
                pooled_inner((b - a) * jnp.sqrt(weights["heads"][f"layer_{i}"]), cells)
                for i, (a, b) in enumerate(layers)
            ]
            return sum(found[1:], start=found[0])


@dataclasses.dataclass(frozen=True)
class CodebookCosine(Reward):
    """-`codebook_cosine` of a sample's codes and its image's latents."""

    shares: ClassVar[tuple[str, ...]] = ("tokenizer",)
    differentiable: ClassVar[bool] = False

    def __call__(self, weights: Any, pixels: Float[Array, "B G H W 3"], batch: Batch) -> Rewards:
        assert self.tokenizer is not None, "set by the method"
        params, samples = {"params": weights["tokenizer"]}, batch["samples"]
        codes = self.tokenizer.apply(params, method="codes")
        latents = self.tokenizer.apply(params, batch["image"], method="encode_latents")
        latents = latents.reshape(samples.shape[0], 1, samples.shape[-1], -1)
        return -codebook_cosine(codes[samples], latents)


@dataclasses.dataclass(frozen=True)
class GAN(Reward):
    """The mean logit of a frozen discriminator that a tokenizer was trained with."""

    wants_image: ClassVar[bool] = False

    weights: PathText = ""  # weights/discriminator.safetensors of a tokenizer run
    ndf: Count = 64  # width of its first layer
    layers: Count = 3

    @property
    def network(self) -> PatchGAN:
        return PatchGAN(ndf=self.ndf, n_layers=self.layers)

    @property
    def least_side(self) -> int:
        return next(side for side in range(1, 1 << 12) if patches(side, self.layers) >= 1)

    def problems(self, side: int) -> list[str]:
        lines = super().problems(side)
        if not self.weights:
            lines.append(
                "weights='': name the discriminator's, RUN/weights/discriminator.safetensors"
            )
        return lines

    def shapes(self) -> Any:
        image = jax.ShapeDtypeStruct((1, self.least_side, self.least_side, 3), jnp.float32)
        return jax.eval_shape(
            lambda image: self.network.init(jax.random.key(0), image, train=False), image
        )

    def load(self) -> Any:
        found = load_safetensors(self.weights, "float32")
        check_like(found, self.shapes(), f"the discriminator weights {self.weights}")
        for name, array in flatten(found).items():
            check_finite(array, f"{name} in {self.weights}")
        return found

    def origin(self) -> tuple[str, str] | None:
        load_metadata(self.weights)
        return self.weights, "no digest known"

    def __call__(self, weights: Any, pixels: Float[Array, "B G H W 3"], batch: Batch) -> Rewards:
        flat = rearrange(pixels, "b g h w c -> (b g) h w c")
        logits = self.network.apply(weights, flat, train=False)
        return -gan(rearrange(logits, "(b g) h w c -> b g h w c", g=pixels.shape[1]))


def patches(side: int, layers: int) -> int:
    """Side of the discriminator's logits: `layers` 4x4 convolutions of stride 2, two of stride 1."""
    for stride in (*[2] * layers, 1, 1):
        side = (side + 2 - 4) // stride + 1
    return side


def perceptual_origin(net: str, files: Sequence[str]) -> tuple[str, str]:
    """Where LPIPS's weights are from and what vouches for them, after a look.

    Raises:
      WeightsError: a file is missing, or the bundled ones are not as they were shipped.
    """
    if files:
        if missing := [path for path in files if not Path(path).is_file()]:
            raise WeightsError(f"there is no file {', '.join(missing)}")
        return ", ".join(files), "no digest known"
    lpips.load_lpips_params(net)
    return f"bundled LPIPS ({net})", "digest verified"
