"""Crops of images and their conversion to arrays in [-1, 1].

`center_crop` and `random_crop` follow ADM (Dhariwal and Nichol, 2021, arXiv 2105.05233; the image
datasets of guided-diffusion), the preprocessing behind the usual ImageNet statistics.
"""

from __future__ import annotations

import math
import pathlib
from typing import BinaryIO

import numpy as np
from jaxtyping import Float
from PIL import Image

from vapi_jax.data.config import DataConfig
from vapi_jax.data.images import read_rgb


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


def read_sample(
    file: pathlib.Path | BinaryIO,
    label: int,
    config: DataConfig,
    split: str,
    rng: np.random.Generator,
) -> dict[str, np.ndarray]:
    """An image file as a sample: decoded, cropped and, for training, augmented as configured.

    Returns:
        {"image": float32 [size, size, 3] in [-1, 1], "condition": int32 scalar}.

    Raises:
        UnreadableImage: it cannot be decoded, or is too large.
    """
    image = read_rgb(file, config.max_image_pixels, config.image_size)
    return {"image": cut(image, config, split, rng), "condition": np.asarray(label, np.int32)}


def cut(
    image: Image.Image, config: DataConfig, split: str, rng: np.random.Generator
) -> Float[np.ndarray, "H W 3"]:
    """An RGB image cropped and, for training, augmented as configured."""
    training, size = split == "train", config.image_size
    cropped = training and config.crop == "random"
    image = random_crop(image, size, rng) if cropped else center_crop(image, size)
    if training and config.flip:
        image = random_flip(image, rng)
    return to_array(image)
