"""Shapes, colours and textured backgrounds of drawn scenes, antialiased at any size."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Float

COLORS = {
    "red": (215, 25, 30), "orange": (250, 135, 10), "yellow": (250, 230, 40), "green": (35, 155, 55),
    "blue": (30, 75, 220), "purple": (120, 30, 165), "pink": (250, 140, 200), "brown": (110, 60, 20),
    "black": (12, 12, 14), "white": (250, 250, 250),
}  # fmt: skip
"""GenEval's ten, in sRGB. A background is grey, which is none of them."""

CELLS = 8
"""Of the lattice on which objects stand, along each side."""

_SAMPLES = 4  # along each side of a pixel
_POINTS = np.deg2rad(np.arange(10) * 36)
_STAR = np.where(np.arange(10) % 2, 0.45, 1.05)

Grid = Float[np.ndarray, "H W"]


def _star(x: Grid, y: Grid) -> Bool[np.ndarray, "H W"]:
    """Inside where it is nearer than the edge between the two corners beside its direction."""
    angle = np.mod(np.arctan2(x, -y), 2 * np.pi)
    row = np.minimum((angle // _POINTS[1]).astype(int), 9)
    far = np.mod(row + 1, 10)
    a = _STAR[row] * np.sin(_POINTS[row]), -_STAR[row] * np.cos(_POINTS[row])
    b = _STAR[far] * np.sin(_POINTS[far]), -_STAR[far] * np.cos(_POINTS[far])
    side: np.ndarray = (b[0] - a[0]) * (y - a[1]) - (b[1] - a[1]) * (x - a[0])
    return side >= 0


SHAPES: dict[str, Callable[[Grid, Grid], Bool[np.ndarray, "H W"]]] = {
    "circle": lambda x, y: x * x + y * y <= 1,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) <= 0.9,
    "triangle": lambda x, y: (y <= 0.85) & (2 * abs(x) <= y + 1.15),
    "diamond": lambda x, y: abs(x) + abs(y) <= 1.1,
    "cross": lambda x, y: (np.minimum(abs(x), abs(y)) <= 0.33) & (np.maximum(abs(x), abs(y)) <= 1),
    "ring": lambda x, y: (x * x + y * y <= 1.1) & (x * x + y * y >= 0.3),
    "arch": lambda x, y: (np.maximum(abs(x), abs(y)) <= 0.95) & ((abs(x) >= 0.4) | (y <= -0.3)),
    "star": _star,
}
"""Name -> which points are inside; of radius about 1, y downwards."""


@dataclasses.dataclass(frozen=True)
class Thing:
    """One object; lengths are shares of the image's side."""

    shape: str
    color: str
    x: float
    y: float
    radius: float


def _grid(side: int) -> tuple[Grid, Grid]:
    """x and y of the points of a finer grid."""
    line = (np.arange(side * _SAMPLES) + 0.5) / (side * _SAMPLES)
    x, y = np.meshgrid(line, line)
    return x, y


def coverage(thing: Thing, side: int) -> Float[np.ndarray, "side side"]:
    """Share of each pixel that an object covers."""
    x, y = _grid(side)
    inside = SHAPES[thing.shape]((x - thing.x) / thing.radius, (y - thing.y) / thing.radius)
    shares: np.ndarray = inside.reshape(side, _SAMPLES, side, _SAMPLES).mean((1, 3))
    return shares


def background(side: int, rng: np.random.Generator) -> Float[np.ndarray, "side side 3"]:
    """A grey with one of four textures, the same in every cell of the lattice; in [0, 255].

    Tokens of one cell each are then alike all over the background, and few codes tell all backgrounds,
    whose details no caption tells.
    """
    x, y = np.meshgrid(*[2 * np.pi * (np.arange(side) + 0.5) / side * CELLS] * 2)
    textures = (np.sin(x), np.sin(y), np.sin(x + y), np.sin(x) * np.sin(y) * 1.3)
    tone = rng.uniform(143, 147)
    texture = textures[int(rng.integers(len(textures)))]
    return np.repeat((tone + 3 * texture)[..., None], 3, -1)


def draw(
    things: Sequence[Thing], side: int, rng: np.random.Generator
) -> Float[np.ndarray, "side side 3"]:
    """A picture in [0, 255] of objects on a background; the colours vary a little."""
    picture = background(side, rng)
    for thing in things:
        paint = np.array(COLORS[thing.color]) + rng.uniform(-2, 2, 3)
        share = coverage(thing, side)[..., None]
        picture = picture * (1 - share) + paint * share
    return np.clip(picture, 0, 255)
