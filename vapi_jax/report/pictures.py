"""Pictures of many images with words beside them, as arrays of pixels on white."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from vapi_jax.common.images import tiles

_GAP = 12  # pixels between the parts of a row


def overview(
    rows: Mapping[str, UInt8[np.ndarray, "N H W 3"]], heads: Sequence[str] = ()
) -> UInt8[np.ndarray, "h w 3"]:
    """Rows of equally many images under each other, each with its name on the left.

    Args:
      rows: name -> images; shown in the size that `vapi_jax.common.images.tiles` gives them.
      heads: words above the rows; each stands over as many images as the next, with a gap between.

    Raises:
      ValueError: if the rows differ in length or size, or the heads do not divide their length.
    """
    from matplotlib.font_manager import findfont  # nearly half a second

    if len({images.shape for images in rows.values()}) != 1:
        raise ValueError(f"rows differ: { {name: x.shape for name, x in rows.items()} }")
    count = len(next(iter(rows.values())))
    if heads and count % len(heads):
        raise ValueError(f"{count} images in a row do not divide among {len(heads)} heads")
    font = ImageFont.truetype(findfont("DejaVu Sans"), 14)  # matplotlib brings it along
    left = max(110, *(round(font.getlength(name)) + 20 for name in rows))
    top, parts = 24 if heads else 0, max(len(heads), 1)
    rim, gap = [(0, 0), (1, 1), (1, 1), (0, 0)], [(0, 0), (0, 0), (_GAP, 0), (0, 0)]
    shown = tiles(np.concatenate(list(rows.values())), len(rows), count)
    shown = np.pad(shown, rim, constant_values=255)
    height, width = shown.shape[1:3]
    split = shown.reshape(len(rows), parts, count // parts, height, width, 3)
    strips = split.transpose(0, 3, 1, 2, 4, 5).reshape(len(rows) * height, parts, -1, 3)
    strips = np.pad(strips, gap, constant_values=255)
    flat = strips.reshape(len(strips), -1, 3)
    sheet = np.pad(flat, [(top, 0), (left - _GAP, 0), (0, 0)], constant_values=255)
    image = Image.fromarray(sheet)
    draw = ImageDraw.Draw(image)
    for index, name in enumerate(rows):
        middle = top + (index + 0.5) * height
        draw.text((left - 10, middle), name, fill="black", font=font, anchor="rm")
    part = strips.shape[2]
    for index, head in enumerate(heads):
        middle = left + (index + 0.5) * part - _GAP / 2
        draw.text((middle, top / 2), head, fill="black", font=font, anchor="mm")
    return np.asarray(image)


def side_by_side(
    columns: Mapping[str, UInt8[np.ndarray, "N H W 3"]], names: Sequence[str]
) -> UInt8[np.ndarray, "h w 3"]:
    """Fig. 3 of the paper: a row for each class, and in it the images of every column.

    Args:
      columns: head -> images, place by place of the same classes (and seeds).
      names: the class of each place; those of a class are neighbours and equally many.

    Raises:
      ValueError: if columns differ in size, or classes in their number of images.
    """
    cuts = [i for i in range(1, len(names)) if names[i] != names[i - 1]]
    parts = zip(*(np.split(images, cuts) for images in columns.values()), strict=True)
    found = [names[start] for start in (0, *cuts)]
    rows = {
        f"{name} ({found[:i].count(name) + 1})" if name in found[:i] else name: np.concatenate(part)
        for i, (name, part) in enumerate(zip(found, parts, strict=True))
    }
    return overview(rows, heads=tuple(columns))
