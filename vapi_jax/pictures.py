"""One picture that tells a run: rows of images with a word in front of each."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from vapi_jax.metrics import image_grid


def overview(
    rows: Mapping[str, UInt8[np.ndarray, "N H W 3"]], scale: int = 3
) -> UInt8[np.ndarray, "h w 3"]:
    """Rows of equally many images under each other, each with its name on the left.

    Args:
      rows: name -> images.
      scale: pixels of the picture for one pixel of an image.

    Raises:
      ValueError: if the rows differ in length or size.
    """
    if len({images.shape for images in rows.values()}) != 1:
        raise ValueError(f"rows differ: { {name: x.shape for name, x in rows.items()} }")
    font = ImageFont.load_default(size=14)
    strips = []
    for name, images in rows.items():
        grid = image_grid(images, columns=len(images), pad=1, scale=scale)
        label = Image.new("RGB", (110, grid.shape[0]), "white")
        box = ImageDraw.Draw(label)
        left, top, right, bottom = box.textbbox((0, 0), name, font=font)
        at = (100 - (right - left), (grid.shape[0] - (bottom - top)) // 2 - top)
        box.text(at, name, fill="black", font=font)
        strips.append(np.concatenate([np.asarray(label), grid], axis=1))
    return np.concatenate(strips)
