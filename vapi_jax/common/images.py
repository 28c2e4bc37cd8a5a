"""Arrays of images as people look at them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np


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


def image_grid(
    images: Any, columns: int | None = None, pad: int = 2, scale: int = 1, background: int = 255
) -> np.ndarray:
    """Lays images out in rows, left to right and top to bottom.

    Args:
      images: uint8 [N, H, W, 3].
      columns: images in a row; the smallest square that holds them all by default.
      pad: pixels between and around the images, in pixels of the result.
      scale: every pixel becomes scale x scale pixels (no interpolation).
      background: grey value of the padding and of empty places.

    Returns:
      uint8 [rows·(H·scale + pad) + pad, columns·(W·scale + pad) + pad, 3].
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"want uint8 [N, H, W, 3], got {images.dtype} {images.shape}")
    columns = max(1, math.ceil(math.sqrt(len(images)))) if columns is None else columns
    if columns < 1 or pad < 0 or scale < 1:
        raise ValueError(f"want columns >= 1, pad >= 0, scale >= 1, got {columns}, {pad}, {scale}")
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    count, height, width, _ = images.shape
    rows = math.ceil(count / columns)
    grid = np.full(
        (rows * (height + pad) + pad, columns * (width + pad) + pad, 3), background, np.uint8
    )
    for index, image in enumerate(images):
        top = pad + (index // columns) * (height + pad)
        left = pad + (index % columns) * (width + pad)
        grid[top : top + height, left : left + width] = image
    return grid
