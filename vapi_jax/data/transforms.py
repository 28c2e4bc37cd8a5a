"""Crops of PIL images and their conversion to arrays in [-1, 1].

`center_crop` and `random_crop` follow ADM (Dhariwal and Nichol, 2021, arXiv 2105.05233; the image
datasets of guided-diffusion), the preprocessing behind the usual ImageNet statistics.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float
from PIL import Image


def to_array(image: Image.Image) -> Float[np.ndarray, "H W 3"]:
    """An RGB image as float32 in [-1, 1]: 0 maps to -1, 255 to 1."""
    return np.asarray(image, dtype=np.float32) / np.float32(127.5) - np.float32(1.0)


def resize_short_side(image: Image.Image, side: int) -> Image.Image:
    """Resizes so that the shorter side becomes `side` pixels, as ADM does.

    The image is halved with a box filter while it stays at least twice too large, then brought to
    size with a bicubic filter (Keys, a = -0.5, antialiased).
    """
    while min(image.size) >= 2 * side:
        width, height = image.size
        image = image.resize((width // 2, height // 2), Image.Resampling.BOX)
    scale = side / min(image.size)
    width, height = (round(length * scale) for length in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop: the short side resized to `size`, the middle square kept."""
    image = resize_short_side(image, size)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def random_crop(
    image: Image.Image,
    size: int,
    rng: np.random.Generator,
    min_fraction: float = 0.8,
    max_fraction: float = 1.0,
) -> Image.Image:
    """ADM's random crop: a square of `min_fraction`..`max_fraction` of the short side, anywhere."""
    smallest, largest = math.ceil(size / max_fraction), math.ceil(size / min_fraction)
    image = resize_short_side(image, int(rng.integers(smallest, largest + 1)))
    left = int(rng.integers(image.width - size + 1))
    top = int(rng.integers(image.height - size + 1))
    return image.crop((left, top, left + size, top + size))


def random_flip(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Mirrors left to right with probability one half."""
    if rng.random() < 0.5:
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image


def image_to_sample(
    image: Image.Image,
    label: int,
    rng: np.random.Generator,
    *,
    size: int,
    crop: str,
    flip: bool,
) -> dict[str, np.ndarray]:
    """A decoded RGB image as a training sample.

    Returns:
        {"image": float32 [size, size, 3] in [-1, 1], "condition": int32 scalar}.
    """
    image = random_crop(image, size, rng) if crop == "random" else center_crop(image, size)
    if flip:
        image = random_flip(image, rng)
    return {"image": to_array(image), "condition": np.asarray(label, np.int32)}
