"""Image features for Fréchet distances, from the two classifiers that LPIPS brings along.

Neither distance is FID, which is defined on one particular Inception network. Values compare with
each other only for the same feature, image size and number of samples. `vgg_relu4_3` shares its network
with the usual perceptual reward; `alex_conv5` is a network which that reward has not seen.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vapi_jax.models.lpips import backbone_features, load_lpips_params

Params = Mapping[str, Any]

# Below this AlexNet's last maps shrink to 1x1 pixel.
ALEX_SIDE = 64


@dataclass(frozen=True)
class FeatureExtractor:
    """One row of `FEATURES`.

    Attributes:
      load: () -> parameters.
      apply: pure (params, images [N, H, W, 3] in [-1, 1]) -> float32 [N, dim].
      dim: length of a feature vector.
      description: the name to print beside every number.
    """

    load: Callable[[], Params]
    apply: Callable[[Params, Array], Array]
    dim: int
    description: str


def vgg_relu4_3(params: Params, images: Float[Array, "N H W 3"]) -> Float[Array, "N 512"]:
    """Spatial mean of relu4_3 of the LPIPS VGG16 (4x4 pixels for images of 32x32)."""
    maps = backbone_features(params, images, "vgg", taps=4)[-1]
    return jnp.mean(maps, axis=(1, 2))


def alex_conv5(params: Params, images: Float[Array, "N H W 3"]) -> Float[Array, "N 256"]:
    """Spatial mean of the last convolution's ReLU of the LPIPS AlexNet.

    Images whose shorter side is below 64 pixels are first enlarged bilinearly to 64.
    """
    n, height, width, channels = images.shape
    side = min(height, width)
    if side < ALEX_SIDE:
        larger = (round(height * ALEX_SIDE / side), round(width * ALEX_SIDE / side))
        images = jax.image.resize(images, (n, *larger, channels), "bilinear")
    return jnp.mean(backbone_features(params, images, "alex")[-1], axis=(1, 2))


FEATURES: dict[str, FeatureExtractor] = {
    "vgg_relu4_3": FeatureExtractor(
        load=functools.partial(load_lpips_params, "vgg"),
        apply=vgg_relu4_3,
        dim=512,
        description="LPIPS-VGG16 relu4_3 spatial mean",
    ),
    "alex_conv5": FeatureExtractor(
        load=functools.partial(load_lpips_params, "alex"),
        apply=alex_conv5,
        dim=256,
        description="LPIPS-AlexNet conv5 spatial mean, at 64 px or more",
    ),
}


@functools.cache
def _compiled(name: str) -> Callable[[Params, Array], Array]:
    return jax.jit(FEATURES[name].apply)


def extract_features(
    name: str,
    images: Float[np.ndarray, "N H W 3"],
    *,
    params: Params | None = None,
    batch_size: int = 128,
) -> Float[np.ndarray, "N D"]:
    """Features of many images, in batches of one size so that one program is compiled.

    Args:
      name: a key of `FEATURES`.
      images: floating point, in [-1, 1].
      params: parameters of that extractor; loaded if None.
      batch_size: images per call; the last batch is filled with zeros which are dropped again.

    Returns:
      float32 [N, dim].

    Raises:
      ValueError: unknown name, no images, or images of another type, shape or range.
    """
    if name not in FEATURES:
        raise ValueError(f"feature {name!r} is unknown; choose one of {sorted(FEATURES)}")
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[-1] != 3 or not len(images):
        raise ValueError(f"images must have shape [N, H, W, 3] with N > 0, got {images.shape}")
    if not np.issubdtype(images.dtype, np.floating):
        raise ValueError(f"images must be floating point in [-1, 1], got {images.dtype}")
    low, high = float(images.min()), float(images.max())
    # Decoders overshoot a little; 0..255 or NaN would pass through the network unnoticed.
    if not (low >= -2 and high <= 2):
        raise ValueError(f"images must lie in [-1, 1], got values from {low} to {high}")
    extractor = FEATURES[name]
    params = jax.device_put(extractor.load() if params is None else params)
    apply = _compiled(name)
    out = np.empty((len(images), extractor.dim), np.float32)
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size].astype(np.float32)
        missing = batch_size - len(batch)
        padded = np.pad(batch, ((0, missing), (0, 0), (0, 0), (0, 0)))
        out[start : start + len(batch)] = np.asarray(apply(params, jnp.asarray(padded)))[
            : len(batch)
        ]
    return out
