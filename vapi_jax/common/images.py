"""Arrays of images as people look at them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from PIL import Image

TILE = 96
"""Pixels along a side to which small images are enlarged, about."""

LONGEST = 4096
"""Pixels along the longer side of a picture of many images, about."""


def to_uint8(images: Any) -> np.ndarray:
    """Images in [-1, 1] to uint8 as published evaluations do it: truncate(clamp(127.5 x + 128, 0, 255)).

    Args:
      images: any shape, float. Values outside [-1, 1] are clamped.

    Raises:
      ValueError: a value is not finite.
    """
    images = np.asarray(images, np.float32)
    if not np.isfinite(images).all():
        raise ValueError("images hold NaN or infinite values")
    return np.clip(np.float32(127.5) * images + np.float32(128), 0, 255).astype(np.uint8)


def enlargement(side: int) -> int:
    """How many times an image of so many pixels is enlarged to be looked at: to about 96 pixels."""
    return max(1, round(TILE / side))


def tiles(images: Any, rows: int, columns: int) -> np.ndarray:
    """Images in the size at which a picture of rows x columns of them shows them.

    Small ones are enlarged to about 96 pixels, each pixel to a square; where the longer side of the
    picture would be more than about 4096 pixels, images are made smaller.

    Args:
      images: uint8 [N, H, W, 3].
      rows, columns: of the picture.

    Returns:
      uint8 [N, h, w, 3].
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"want uint8 [N, H, W, 3], got {images.dtype} {images.shape}")
    height, width = images.shape[1:3]
    room = LONGEST / max(rows * height, columns * width)
    scale = min(enlargement(max(height, width)), max(1, int(room)))
    if room >= 1:
        return images.repeat(scale, axis=1).repeat(scale, axis=2)
    size = max(1, int(width * room)), max(1, int(height * room))
    lanczos = Image.Resampling.LANCZOS
    return np.stack([np.asarray(Image.fromarray(image).resize(size, lanczos)) for image in images])


def image_grid(
    images: Any, columns: int | None = None, pad: int = 2, background: int = 255
) -> np.ndarray:
    """Lays images out in rows, left to right and top to bottom, each as `tiles` makes it.

    Args:
      images: uint8 [N, H, W, 3].
      columns: images in a row; the smallest square that holds them all by default.
      pad: pixels between and around the images.
      background: grey value of the padding and of empty places.

    Returns:
      uint8 [rows·(h + pad) + pad, columns·(w + pad) + pad, 3] for tiles of h x w pixels.
    """
    columns = max(1, math.ceil(math.sqrt(len(images)))) if columns is None else columns
    if columns < 1 or pad < 0:
        raise ValueError(f"want columns >= 1, pad >= 0, got {columns}, {pad}")
    rows = math.ceil(len(images) / columns)
    images = tiles(images, rows, columns)
    height, width = images.shape[1:3]
    grid = np.full(
        (rows * (height + pad) + pad, columns * (width + pad) + pad, 3), background, np.uint8
    )
    for index, image in enumerate(images):
        top = pad + (index // columns) * (height + pad)
        left = pad + (index % columns) * (width + pad)
        grid[top : top + height, left : left + width] = image
    return grid
