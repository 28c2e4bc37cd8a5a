"""Pictures of a run as arrays of pixels: samples beside one another, and planes of embeddings.

Drawn with Pillow alone, on white, so that they look the same in any viewer. Its font has ASCII only.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from vapi_jax.common.images import image_grid
from vapi_jax.evaluation.embeddings import Cloud, Plane
from vapi_jax.report.svg import Frame, plane_frame, tick_texts

PALETTE = ("#2563c9", "#d9822b", "#2e8b6a", "#a2529c", "#6b7680")
"""The colours --c0 ... --c4 of the report's page in light."""

_INK, _MUTED, _LINE = "#1c2024", "#5d6770", "#e3e4e1"
_ASCII = str.maketrans({"−": "-", "–": "-", "“": '"', "”": '"', "π": "pi", "±": "+-", "·": ","})

_SCALE = 2  # pixels of a picture for one unit of a frame
_FINE = 3  # pixels that are averaged into one, along each side


def ascii_text(text: str) -> str:
    """A text in the letters of the font: "Fréchet −1" -> "Frechet -1"; others become "?"."""
    plain = unicodedata.normalize("NFKD", text.translate(_ASCII))
    kept = "".join(letter for letter in plain if not unicodedata.combining(letter))
    return kept.encode("ascii", "replace").decode()


def _font(size: float) -> ImageFont.FreeTypeFont:
    """The font that Pillow brings along; with a size it is never the one of fixed pixels."""
    return cast(ImageFont.FreeTypeFont, ImageFont.load_default(size=size))


def overview(
    rows: Mapping[str, UInt8[np.ndarray, "N H W 3"]],
    scale: int = 3,
    heads: Sequence[str] = (),
) -> UInt8[np.ndarray, "h w 3"]:
    """Rows of equally many images under each other, each with its name on the left.

    Args:
      rows: name -> images.
      scale: pixels of the picture for one pixel of an image.
      heads: words above the rows; each stands over as many images as the next, with a gap between.

    Raises:
      ValueError: if the rows differ in length or size, or the heads do not divide their length.
    """
    if len({images.shape for images in rows.values()}) != 1:
        raise ValueError(f"rows differ: { {name: x.shape for name, x in rows.items()} }")
    count = len(next(iter(rows.values())))
    if heads and count % len(heads):
        raise ValueError(f"{count} images in a row do not divide among {len(heads)} heads")
    font = _font(14)
    names = {name: ascii_text(name) for name in rows}
    width = max(110, *(round(font.getlength(name)) + 20 for name in names.values()))
    parts = max(len(heads), 1)
    strips = []
    for name, images in rows.items():
        grids = [
            image_grid(part, columns=len(part), pad=1, scale=scale)
            for part in np.split(images, parts)
        ]
        gap = np.full((len(grids[0]), 12, 3), 255, np.uint8)
        pieces = [piece for grid in grids for piece in (gap, grid)][1:]
        label = Image.new("RGB", (width, len(gap)), "white")
        box = ImageDraw.Draw(label)
        at = (width - 10, len(gap) / 2)
        box.text(at, names[name], fill="black", font=font, anchor="rm")
        strips.append(np.concatenate([np.asarray(label), *pieces], axis=1))
    if heads:
        title = Image.new("RGB", (strips[0].shape[1], 24), "white")
        one = grids[0].shape[1]
        for index, head in enumerate(heads):
            middle = width + index * (one + 12) + one / 2
            ImageDraw.Draw(title).text(
                (middle, 12), ascii_text(head), fill="black", font=font, anchor="mm"
            )
        strips.insert(0, np.asarray(title))
    return np.concatenate(strips)


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


def draw_plane(plane: Plane) -> UInt8[np.ndarray, "h w 3"]:
    """A plane of embeddings with title, axes, legend and note, as `vapi_jax.report.svg.plane` draws it."""
    frame, unit = plane_frame(plane), _SCALE * _FINE
    font, bold = _font(12 * unit), _font(15 * unit)
    lines = _wrapped(ascii_text(plane.note), font, (frame.width - 30) * unit)
    titles = _wrapped(ascii_text(plane.title), bold, (frame.width - 30) * unit)
    top = 14 + 20 * len(titles)
    height = top + frame.height + 28 + 16 * len(lines) + 10
    image = Image.new("RGB", (frame.width * unit, height * unit), "white")
    draw = ImageDraw.Draw(image)

    def text(x: float, y: float, what: str, anchor: str, fill: str = _MUTED) -> None:
        draw.text((x * unit, y * unit), ascii_text(what), fill=fill, font=font, anchor=anchor)

    for index, line in enumerate(titles):
        at = (15 * unit, (17 + 20 * index) * unit)
        draw.text(at, line, fill=_INK, font=bold, anchor="lm")
    _draw_axes(draw, frame, top, unit)
    for tick, words in zip(frame.y_ticks, tick_texts(frame.y_ticks), strict=True):
        text(frame.left - 7, top + frame.py(tick), words, "rm")
    axis = top + frame.height - frame.bottom
    for tick, words in zip(frame.x_ticks, tick_texts(frame.x_ticks), strict=True):
        text(frame.px(tick), axis + 7, words, "mt")
    text((frame.left + frame.width - frame.right) / 2, axis + 36, plane.x_label, "mm", _INK)
    _draw_upright(image, ascii_text(plane.y_label), font, (17 * unit, (top + axis) / 2 * unit))

    def place(points: np.ndarray) -> list[tuple[float, float]]:
        return [(frame.px(x) * unit, (top + frame.py(y)) * unit) for x, y in points]

    for cloud in plane.clouds:
        for region in cloud.regions:
            image = _draw_region(image, cloud, [place(line) for line in region], unit)
    layer = image.copy()
    draw = ImageDraw.Draw(layer)
    for cloud, point in plane.marks():
        _draw_marker(draw, cloud, place(point[None])[0], plane.radius * unit)
    solid = all(not cloud.regions for cloud in plane.clouds)
    image = Image.blend(image, layer, 0.75 if solid else 0.45)
    draw = ImageDraw.Draw(image)
    left, middle = 15.0, top + frame.height + 14.0
    for cloud in plane.clouds:
        if cloud.regions:
            key = [(left, middle - 7), (left + 22, middle - 7), (left + 22, middle + 7)]
            corners = [(x * unit, y * unit) for x, y in [*key, (left, middle + 7), key[0]]]
            image = _draw_region(image, cloud, [corners], unit)
            draw = ImageDraw.Draw(image)
        _draw_marker(draw, cloud, ((left + 11) * unit, middle * unit), 4 * unit)
        text(left + 29, middle, cloud.label, "lm", _INK)
        left += 29 + font.getlength(ascii_text(cloud.label)) / unit + 22
    for index, line in enumerate(lines):
        text(15, top + frame.height + 40 + 16 * index, line, "lm")
    size = (frame.width * _SCALE, height * _SCALE)
    return np.asarray(image.resize(size, Image.Resampling.BOX))


def _wrapped(words: str, font: ImageFont.FreeTypeFont, width: float) -> list[str]:
    lines = [""]
    for word in words.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _draw_axes(draw: ImageDraw.ImageDraw, frame: Frame, top: float, unit: int) -> None:
    end, axis = frame.width - frame.right, top + frame.height - frame.bottom

    def line(x0: float, y0: float, x1: float, y1: float, fill: str) -> None:
        draw.line([x0 * unit, y0 * unit, x1 * unit, y1 * unit], fill, unit)

    for tick in frame.y_ticks:
        line(frame.left, top + frame.py(tick), end, top + frame.py(tick), _LINE)
    for tick in frame.x_ticks:
        line(frame.px(tick), axis, frame.px(tick), axis + 5, _MUTED)
    line(frame.left, axis, end, axis, _MUTED)


def _draw_upright(
    image: Image.Image, words: str, font: ImageFont.FreeTypeFont, at: tuple[float, float]
) -> None:
    """A text from bottom to top, around a point."""
    width, height = round(font.getlength(words)) + 8, round(font.size * 1.6)
    piece = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(piece).text((width / 2, height / 2), words, fill=_INK, font=font, anchor="mm")
    x, y = at
    image.paste(piece.rotate(90, expand=True), (round(x - height / 2), round(y - width / 2)))


def _draw_region(
    image: Image.Image, cloud: Cloud, lines: Sequence[list[tuple[float, float]]], unit: int
) -> Image.Image:
    """The image with a region over it: outlined, and shaded where the set is a filled one."""
    color = PALETTE[cloud.color]
    if cloud.css == "filled":
        mask = np.zeros((image.height, image.width), bool)
        for line in lines:
            inside = Image.new("1", image.size)
            ImageDraw.Draw(inside).polygon(line, fill=1)
            mask ^= np.asarray(inside)  # an outline within another is the rim of a hole
        shade = Image.fromarray(np.where(mask, np.uint8(64), np.uint8(0)))
        image = Image.composite(Image.new("RGB", image.size, color), image, shade)
    draw = ImageDraw.Draw(image)
    for line in lines:
        for piece in _dashes(line, 7 * unit, 4 * unit) if cloud.css == "dashed" else [line]:
            draw.line(piece, color, round(1.8 * unit), joint="curve")
    return image


def _dashes(
    line: Sequence[tuple[float, float]], on: float, off: float
) -> list[list[tuple[float, float]]]:
    """The drawn pieces of a dashed line."""
    points = np.asarray(line, np.float64)
    along = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(points, axis=0).T))])
    pieces = []
    for start in np.arange(0.0, along[-1], on + off):
        stop = min(start + on, along[-1])
        ends = [[np.interp(d, along, points[:, axis]) for axis in (0, 1)] for d in (start, stop)]
        inside = points[(along > start) & (along < stop)]
        pieces.append([(float(x), float(y)) for x, y in [ends[0], *inside, ends[1]]])
    return pieces


def _draw_marker(
    draw: ImageDraw.ImageDraw, cloud: Cloud, at: tuple[float, float], radius: float
) -> None:
    x, y = at
    color = PALETTE[cloud.color]
    if cloud.shape == "circle":
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], color)
        return
    corners = {
        "square": [(-0.95, -0.95), (0.95, -0.95), (0.95, 0.95), (-0.95, 0.95)],
        "triangle": [(0.0, -1.2), (1.15, 0.85), (-1.15, 0.85)],
    }[cloud.shape]
    draw.polygon([(x + dx * radius, y + dy * radius) for dx, dy in corners], color)
