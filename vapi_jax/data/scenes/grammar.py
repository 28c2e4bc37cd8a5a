"""What a scene shows and how it is told: GenEval's six tasks over shapes, with combinations held out.

Every combination belongs to one split, by a fixed shuffle:

- counting: (shape, how many).
- colors: (shape, colour). A pair of val or test colours nothing in any other scene of any split.
- two_object: two shapes together. Two of val or test stand together in no scene of another task.
- position: (shape, side, shape), "a left of b" and "b right of a" being one. In training no two shapes
  stand as in val or test, whatever the caption tells.
- color_attr: two coloured shapes. No training scene of two shapes has the colours of one of val or test.
- single_object has nothing to combine: every split has all shapes.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from vapi_jax.data.config import SPLITS, DataError
from vapi_jax.data.scenes.drawing import COLORS, SHAPES, Thing

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
SIDES = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
_OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
_NUMBERS = {2: "two", 3: "three", 4: "four"}
_OPENINGS = ("a photo of ", "a picture of ", "")

Combination = tuple[Any, ...]
Place = tuple[str, float, float, float]  # shape, x, y, radius


@dataclasses.dataclass(frozen=True)
class Scene:
    """Objects, and the line of metadata that they satisfy, in the form of GenEval's.

    Attributes:
        things: what is drawn. None touches another or the border.
        metadata: {"tag", "include", "exclude" (counting), "prompt"}.
    """

    things: tuple[Thing, ...]
    metadata: dict[str, Any]


def _deal(combinations: Sequence[Combination]) -> dict[str, list[Combination]]:
    """A tenth each for val and test, at least two."""
    order = np.random.default_rng(len(combinations)).permutation(len(combinations))
    held = max(2, len(combinations) // 10)
    rows = {"val": order[:held], "test": order[held : 2 * held], "train": order[2 * held :]}
    return {split: [combinations[row] for row in sorted(rows[split])] for split in SPLITS}


@functools.cache
def combinations(task: str) -> dict[str, list[Combination]]:
    """Split -> the combinations of a task; those of color_attr are `coloring_split`'s."""
    if task == "counting":
        return _deal(list(itertools.product(SHAPES, _NUMBERS)))
    if task == "colors":
        return _deal(list(itertools.product(SHAPES, COLORS)))
    if task == "two_object":
        return _deal(list(itertools.combinations(SHAPES, 2)))
    if task == "position":
        pairs = combinations("two_object")["train"]
        return _deal([(a, side, b) for a, b in pairs for side in SIDES])
    return {split: [(shape,) for shape in SHAPES] for split in SPLITS}


def coloring_split(a: tuple[str, str], b: tuple[str, str]) -> str:
    """The split of two (shape, colour) side by side, in any order."""
    place = zlib.crc32(repr(sorted([a, b])).encode()) % 10
    return {0: "val", 1: "test"}.get(place, "train")


def _pick(values: Sequence[Any], rng: np.random.Generator) -> Any:
    return values[int(rng.integers(len(values)))]


def _color(shape: str, rng: np.random.Generator) -> str:
    """Any that training has on this shape."""
    return str(_pick([c for s, c in combinations("colors")["train"] if s == shape], rng))


def _colors(a: str, b: str, split: str, rng: np.random.Generator) -> tuple[str, str]:
    """Two different colours for two shapes, together of a split."""
    while True:
        one, two = _color(a, rng), _color(b, rng)
        if one != two and coloring_split((a, one), (b, two)) == split:
            return one, two


def _side(a: str, b: str, rng: np.random.Generator) -> str:
    """Where a may stand beside b without showing what is held out."""
    held = [*combinations("position")["val"], *combinations("position")["test"]]
    return str(_pick([side for side in SIDES if (a, side, b) not in held], rng))


def _beside(a: str, side: str, b: str, rng: np.random.Generator) -> list[Place]:
    """Shape, x, y, radius of a and of b, so that one relation holds and no other."""
    step = np.array(SIDES[side])
    radii = rng.uniform(0.17, 0.2, 2)
    apart = rng.uniform(radii.sum() * 1.1 + 0.08, 0.54)
    offset = step * apart + step[::-1] * rng.uniform(-0.1, 0.1)
    # The place of a; b is at a - offset.
    low = np.maximum(radii[0] * 1.1 + 0.04, radii[1] * 1.1 + 0.04 + offset)
    high = np.minimum(1 - radii[0] * 1.1 - 0.04, 1 - radii[1] * 1.1 - 0.04 + offset)
    place = rng.uniform(low, np.maximum(low, high))
    other = place - offset
    (x, y), (far_x, far_y) = place.tolist(), other.tolist()
    return [(a, x, y, float(radii[0])), (b, far_x, far_y, float(radii[1]))]


def _scatter(shape: str, count: int, rng: np.random.Generator) -> list[Place]:
    """Several of one shape, their boxes apart from each other."""
    low, high = {1: (0.16, 0.24), 2: (0.15, 0.18), 3: (0.14, 0.16), 4: (0.14, 0.15)}[count]
    radii = rng.uniform(low, high, count)
    edge = radii * 1.1 + 0.04
    i, j = np.triu_indices(count, 1)
    while True:
        tries = rng.uniform(edge[:, None], 1 - edge[:, None], (200, count, 2))
        apart = abs(tries[:, i] - tries[:, j]).max(-1) > (radii[i] + radii[j]) * 1.05 + 0.06
        if len(good := np.flatnonzero(apart.all(1))):
            places = tries[good[0]]
            return [
                (shape, float(x), float(y), float(r))
                for (x, y), r in zip(places, radii, strict=True)
            ]


def _a(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _plural(shape: str) -> str:
    return f"{shape}{'es' if shape.endswith(('s', 'ch')) else 's'}"


def make(task: str, split: str, rng: np.random.Generator) -> Scene:
    """A scene of a task whose combination is of a split.

    Args:
        task: of TASKS.
        split: "train", "val" or "test". Val and test are told as GenEval does, "a photo of ..."; training
            in two more ways.
        rng: drawn from; the same state gives the same scene.
    """
    opening = _pick(_OPENINGS, rng) if split == "train" else _OPENINGS[0]
    exclude: list[dict[str, Any]] = []
    if task in ("single_object", "counting", "colors"):
        drawn = _pick(combinations(task)[split], rng)
        shape, count = drawn[0], drawn[1] if task == "counting" else 1
        color = drawn[1] if task == "colors" else _color(shape, rng)
        places = _scatter(shape, count, rng)
        paints: list[str] = [color] * count
        clause: dict[str, Any] = {"class": shape, "count": count}
        if task == "colors":
            clause["color"], text = color, _a(f"{color} {shape}")
        elif task == "counting":
            exclude = [{"class": shape, "count": count + 1}]
            text = f"{_NUMBERS[count]} {_plural(shape)}"
        else:
            text = _a(shape)
        include = [clause]
    else:
        if task == "position":
            a, side, b = _pick(combinations(task)[split], rng)
        else:
            a, b = _pick(
                combinations("two_object")[split if task == "two_object" else "train"], rng
            )
            side = _side(a, b, rng)
        colors = _colors(a, b, split if task == "color_attr" else "train", rng)
        places, paints = _beside(a, side, b, rng), list(colors)
        if rng.integers(2):  # The same scene, told from the other.
            a, b, side, colors = b, a, _OPPOSITE[side], colors[::-1]
        include = [{"class": a, "count": 1}, {"class": b, "count": 1}]
        if task == "position":
            include = [include[1], {**include[0], "position": [side, 0]}]
            text = f"{_a(a)} {side} {_a(b)}"
        elif task == "color_attr":
            for clause, color in zip(include, colors, strict=True):
                clause["color"] = color
            text = f"{_a(f'{colors[0]} {a}')} and {_a(f'{colors[1]} {b}')}"
        else:
            text = f"{_a(a)} and {_a(b)}"
    things = tuple(
        Thing(shape, color, x, y, radius)
        for (shape, x, y, radius), color in zip(places, paints, strict=True)
    )
    metadata = {"tag": task, "include": include, "prompt": opening + text}
    return Scene(things, {**metadata, "exclude": exclude} if exclude else metadata)


def read(caption: str) -> dict[str, Any]:
    """The line of metadata of a scene that is told so: that of `make`, from its "prompt" alone.

    Raises:
        DataError: no scene is told so.
    """
    found = _caption().fullmatch(caption)
    if found is None:
        raise DataError(f"{caption!r:.80} is no caption of a drawn scene")
    (count, kind, *first), link, second = found.groups()[:4], found[5], found.groups()[5:]
    if count:
        shape = {_plural(shape): shape for shape in SHAPES}[kind]
        number = {word: number for number, word in _NUMBERS.items()}[count]
        include: list[dict[str, Any]] = [{"class": shape, "count": number}]
        exclude = [{"class": shape, "count": number + 1}]
        return {"tag": "counting", "include": include, "prompt": caption, "exclude": exclude}
    include = [_clause(*first)] + ([_clause(*second)] if link else [])
    if link in SIDES:
        include = [include[1], {**include[0], "position": [link, 0]}]
        task = "position"
    elif link:
        task = "color_attr" if first[0] else "two_object"
    else:
        task = "colors" if first[0] else "single_object"
    return {"tag": task, "include": include, "prompt": caption}


def _clause(color: str | None, shape: str) -> dict[str, Any]:
    clause: dict[str, Any] = {"class": shape, "count": 1}
    return {**clause, "color": color} if color else clause


@functools.cache
def _caption() -> re.Pattern[str]:
    """What `make` may say: number, plural | colour, shape, and perhaps a link, colour, shape."""
    thing = f"an? (?:({'|'.join(COLORS)}) )?({'|'.join(SHAPES)})"
    several = f"({'|'.join(_NUMBERS.values())}) ({'|'.join(map(_plural, SHAPES))})"
    link = f"(?: (and|{'|'.join(SIDES)}) {thing})?"
    return re.compile(f"(?:{'|'.join(_OPENINGS)})(?:{several}|{thing}{link})")


def words() -> tuple[str, ...]:
    """All words of captions, in alphabetical order."""
    plurals = (_plural(shape) for shape in SHAPES)
    texts = (*_OPENINGS, *SIDES, *_NUMBERS.values(), *COLORS, *SHAPES, *plurals, "a", "an", "and")
    return tuple(sorted({word for text in texts for word in text.split()}))


def prompts(split: str, per_task: int, seed: int = 0) -> list[dict[str, Any]]:
    """Different lines of metadata, at most `per_task` of each task, task by task as GenEval's are."""
    found: dict[str, dict[str, Any]] = {}
    for number, task in enumerate(TASKS):
        rng = np.random.default_rng([seed, number])
        texts: dict[str, dict[str, Any]] = {}
        for _ in range(40 * per_task):
            line = make(task, split, rng).metadata
            if len(texts) < per_task:
                texts[line["prompt"]] = line
        found |= texts
    return list(found.values())
