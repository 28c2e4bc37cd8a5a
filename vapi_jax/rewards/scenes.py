"""An exact detector for drawn scenes, and the reward by it.

It looks at what differs in colour from the background, piece by piece, and returns what
`vapi_jax.rewards.geneval.judge` takes, so that generated scenes are scored by GenEval's rules without any
network.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from scipy import ndimage

from vapi_jax.common.host_calls import on_host
from vapi_jax.common.images import to_uint8
from vapi_jax.data.scenes.drawing import COLORS, SHAPES, Thing, coverage
from vapi_jax.data.scenes.grammar import read
from vapi_jax.data.scenes.source import LEAST_SIDE
from vapi_jax.rewards.geneval import Objects, Prompt, complaints, parse_prompt
from vapi_jax.rewards.prompts import LETTERS, from_bytes, texts_of, to_bytes
from vapi_jax.rewards.reward import Batch, Reward, Rewards

_SIDE = 24  # of what shapes are compared at
_PAINTS = np.array(list(COLORS.values()), float)
_FAR = 0.5  # share of an object's colour from which on a pixel is of it
_FROM = 0.4  # the same, of whatever colour fits best
_PLAIN = 30.0  # from the ground, in 8-bit units: more than its texture and mild noise
_BEYOND = 90.0  # what a pixel twice as far as a paint costs, in 8-bit units
_NAMES = tuple(SHAPES)
_LEAST = 0.006  # share of the image that an object covers at least


def _box(share: np.ndarray) -> tuple[float, float, float, float]:
    """x0, y0, x1, y1 to a part of a pixel: half an edge pixel covered is half a pixel."""
    edges = []
    for axis in (0, 1):
        line = np.sort(share, axis=axis).take(range(-2, 0), axis=axis).mean(axis)
        there = np.flatnonzero(line >= _FAR)
        first, last = (int(there[0]), int(there[-1])) if len(there) else (0, len(line) - 1)
        before = line[first - 1] if first else 0.0
        after = line[last + 1] if last + 1 < len(line) else 0.0
        edges.append((first - before, last + 1 + after))
    (x0, x1), (y0, y1) = edges
    return float(x0), float(y0), float(x1), float(y1)


def _cut(share: np.ndarray, x0: float, y0: float, x1: float, y1: float) -> np.ndarray:
    """A box of a picture, and a rim, at the size of comparison by linear interpolation."""
    places = ((np.arange(_SIDE) + 0.5) / _SIDE - 0.5) * 1.3 + 0.5
    x, y = x0 + places * (x1 - x0) - 0.5, y0 + places * (y1 - y0) - 0.5
    found: np.ndarray = ndimage.map_coordinates(share, np.meshgrid(y, x, indexing="ij"), order=1)
    return found


@functools.cache
def _shapes(pixels: int) -> np.ndarray:
    """All shapes as so many pixels show them, at the size of comparison, of mean 0 and length 1."""
    side = pixels + 6
    rows = []
    for name in SHAPES:
        drawn = []
        for dx, dy in itertools.product((0, 0.5), (0, 0.5)):
            thing = Thing(name, "red", 0.5 + dx / side, 0.5 + dy / side, pixels / 2 / side)
            picture = coverage(thing, side)
            drawn.append(_cut(picture, *_box(picture)).ravel())
        rows.append(_normed(np.mean(drawn, axis=0)))
    return np.stack(rows)


def _normed(values: np.ndarray) -> np.ndarray:
    values = values - values.mean()
    result: np.ndarray = values / (np.linalg.norm(values) + 1e-9)
    return result


def _strength(image: np.ndarray, ground: np.ndarray) -> np.ndarray:
    """How far each pixel has gone from the ground to the paint that explains it best."""
    away, toward = image - ground, _PAINTS - ground
    share = away @ toward.T / (toward**2).sum(1)
    # The square of how far a pixel lies beside the way to a paint, and beyond its end.
    beside = (away**2).sum(-1)[..., None] - share**2 * (toward**2).sum(1)
    beyond = (_BEYOND * (share - np.clip(share, 0, 1))) ** 2
    fits = np.where(share > 0, beside + beyond, np.inf).argmin(-1)
    strength: np.ndarray = np.take_along_axis(share, fits[..., None], -1)[..., 0]
    return strength


def detect(image: Float[np.ndarray, "side side 3"]) -> dict[str, Objects]:
    """The objects of a scene.

    Args:
      image: RGB in [0, 255], 32 pixels or more on a side.

    Returns:
      Shape -> boxes in pixels with a confidence in [0, 1], above 0.9 where the shape is plain, and colours.
    """
    image = np.asarray(image, np.float64)
    ground = np.median(np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]]), 0)
    away = image - ground
    distance = np.linalg.norm(away, axis=-1)
    seen = (_strength(image, ground) > _FROM) & (distance > _PLAIN)
    pieces, count = ndimage.label(seen)
    found: dict[str, list[tuple[list[float], str]]] = {}
    for number in range(1, count + 1):
        inside = pieces == number
        if inside.sum() < _LEAST * inside.size:
            continue
        core = inside & (distance >= np.median(distance[inside]))
        paint = np.median(image[core], 0)
        color = int(np.linalg.norm(_PAINTS - paint, axis=1).argmin())
        # The share of this colour in the pixels of the piece and beside it, which others do not touch.
        way = paint - ground
        near = ndimage.binary_dilation(inside)
        share = np.where(near, np.clip(away @ way / (way @ way), 0, 1), 0)
        x0, y0, x1, y1 = _box(share)
        alike = _shapes(max(5, round(x1 - x0))) @ _normed(_cut(share, x0, y0, x1, y1).ravel())
        best = int(alike.argmax())
        score = float(np.clip((alike[best] - 0.4) / 0.5, 0, 1))
        found.setdefault(_NAMES[best], []).append(([x0, y0, x1, y1, score], list(COLORS)[color]))
    return {
        name: Objects(np.array([box for box, _ in rows]), tuple(color for _, color in rows))
        for name, rows in found.items()
    }


@dataclasses.dataclass(frozen=True)
class SceneReward(Reward):
    """1 for a sample that shows what its caption of a drawn scene asks for by GenEval's rules, else 0.

    Attributes:
      graded: the share of the caption's clauses that hold in its place: less sparse while few samples are
        right. A count has two, at least so many and no more.
    """

    wants_image: ClassVar[bool] = False
    differentiable: ClassVar[bool] = False

    graded: bool = False

    @property
    def least_side(self) -> int:
        return LEAST_SIDE

    def prepare(self, raw: Any) -> UInt8[np.ndarray, "B L"]:
        texts = texts_of(raw)
        for text in texts:
            read(text)  # here a caption of something else is an error with a name
        return to_bytes(texts)

    def example(self, rows: int) -> Any:
        return jax.ShapeDtypeStruct((rows, LETTERS), jnp.uint8)

    def __call__(self, weights: Any, pixels: Float[Array, "B G H W 3"], batch: Batch) -> Rewards:
        del weights

        def call(pixels: Any, asked: Any) -> np.ndarray:
            prompts = [parse_prompt(read(text), text) for text in from_bytes(np.asarray(asked))]
            rows = zip(prompts, to_uint8(pixels), strict=True)
            worth = [[self.worth(prompt, image) for image in group] for prompt, group in rows]
            return np.array(worth, np.float32)

        shape = jax.ShapeDtypeStruct(pixels.shape[:2], jnp.float32)
        return on_host(call, shape, pixels, batch["prompt"])

    def worth(self, prompt: Prompt, image: UInt8[np.ndarray, "side side 3"]) -> float:
        """The reward of one image."""
        wrong = len(complaints(prompt, detect(image)))
        if not self.graded:
            return float(not wrong)
        return 1.0 - wrong / (len(prompt.include) + len(prompt.exclude))
