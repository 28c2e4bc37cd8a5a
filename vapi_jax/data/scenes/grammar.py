"""What a scene shows and how it is told: GenEval's six tasks over shapes, with combinations held out.

Objects stand on a lattice of 8 x 8 cells, all of one size, so that a tokenizer whose tokens are such cells
needs few codes and a small generator can learn what captions mean.

Every combination belongs to one split, by a fixed shuffle, and no training caption tells of a held-out one
and nothing more:

- counting: (shape, how many). Held-out ones are told with a colour.
- colors: (shape, colour). Shapes of any colour are shown under captions that tell no colour, and told by
  several of them, by sides, and by two coloured shapes.
- two_object: two shapes together. Held-out ones are told with sides and with colours.
- position: (shape, side, shape), "a left of b" and "b right of a" being one. Held-out ones are told with
  colours, and shown under captions that tell no side.
- color_attr: two coloured shapes. No training scene of two shapes has the colours of one of val or test.
- single_object has nothing to combine: every split has all shapes.

Training captions of numbers and of sides name colours half of the time; those of val and test never.
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
from vapi_jax.data.scenes.drawing import CELLS, COLORS, SHAPES, Thing

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
SIDES = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
_OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
_NUMBERS = {2: "two", 3: "three", 4: "four"}
_PAINTS = tuple(COLORS)
_PAIRS = tuple(itertools.combinations(SHAPES, 2))
_OPENINGS = ("a photo of ", "a picture of ", "")

_APART = 3  # cells between the middles of two objects, at least
_RADIUS = 0.15  # at most 1.1 times as far does a shape reach: all of it is in 3 x 3 cells

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
        return _deal(_PAIRS)
    if task == "position":
        return _deal([(a, side, b) for a, b in _PAIRS for side in SIDES])
    return {split: [(shape,) for shape in SHAPES] for split in SPLITS}


def coloring_split(a: tuple[str, str], b: tuple[str, str]) -> str:
    """The split of two (shape, colour) side by side, in any order."""
    place = zlib.crc32(repr(sorted([a, b])).encode()) % 10
    return {0: "val", 1: "test"}.get(place, "train")


def _pick(values: Sequence[Any], rng: np.random.Generator) -> Any:
    return values[int(rng.integers(len(values)))]


def _colors(a: str, b: str, split: str, rng: np.random.Generator) -> tuple[str, str]:
    """Two different colours for two shapes, together of a split."""
    while True:
        one, two = _pick(_PAINTS, rng), _pick(_PAINTS, rng)
        if one != two and coloring_split((a, one), (b, two)) == split:
            return one, two


def _told(task: str, split: str, colored: bool, rng: np.random.Generator) -> Combination:
    """A combination of a split, or any where colours are told beside it."""
    known = combinations(task)
    return tuple(_pick([*itertools.chain(*known.values())] if colored else known[split], rng))


def _beside(a: str, side: str, b: str, rng: np.random.Generator) -> list[Place]:
    """Shape, x, y, radius of a and of b in one row or column, so that no other relation holds."""
    offset = np.array(SIDES[side]) * rng.integers(_APART, CELLS - 2)
    # The cell of a; b is at a - offset.
    low, high = np.maximum(1, 1 + offset), np.minimum(CELLS - 1, CELLS - 1 + offset)
    cell = rng.integers(low, high)
    return [_place(a, cell), _place(b, cell - offset)]


def _scatter(shape: str, count: int, rng: np.random.Generator) -> list[Place]:
    """Several of one shape, their boxes apart from each other."""
    i, j = np.triu_indices(count, 1)
    while True:
        tries = rng.integers(1, CELLS - 1, (200, count, 2))
        apart = abs(tries[:, i] - tries[:, j]).max(-1) >= _APART
        if len(good := np.flatnonzero(apart.all(1))):
            return [_place(shape, cell) for cell in tries[good[0]]]


def _place(shape: str, cell: np.ndarray) -> Place:
    """A shape in the middle of a cell."""
    x, y = ((cell + 0.5) / CELLS).tolist()
    return shape, x, y, _RADIUS


def _words(clause: dict[str, Any], name: str) -> str:
    return f"{clause['color']} {name}" if "color" in clause else name


def _a(clause: dict[str, Any]) -> str:
    words = _words(clause, clause["class"])
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
    train = split == "train"
    opening = _pick(_OPENINGS, rng) if train else _OPENINGS[0]
    exclude: list[dict[str, Any]] = []
    # Whether the caption of a number or of sides names colours as well.
    colored = train and task in ("counting", "position") and bool(rng.integers(2))
    if task in ("single_object", "counting", "colors"):
        drawn = _told(task, split, colored, rng)
        shape, count = drawn[0], drawn[1] if task == "counting" else 1
        color = drawn[1] if task == "colors" else _pick(_PAINTS, rng)
        places = _scatter(shape, count, rng)
        paints: Sequence[str] = [color] * count
        include = [_clause(color if task == "colors" or colored else None, shape, count=count)]
        if task == "counting":
            exclude = [{"class": shape, "count": count + 1}]
            text = f"{_NUMBERS[count]} {_words(include[0], _plural(shape))}"
        else:
            text = _a(include[0])
    else:
        if task == "position":
            a, side, b = _told(task, split, colored, rng)
        else:
            a, b = _told("two_object", split, task == "color_attr", rng)
            side = _pick(tuple(SIDES), rng)
        paints = _colors(a, b, split if task == "color_attr" else "train", rng)
        places = _beside(a, side, b, rng)
        told = [
            _clause(color if task == "color_attr" or colored else None, shape)
            for shape, color in zip((a, b), paints, strict=True)
        ]
        if rng.integers(2):  # The same scene, told from the other.
            told, side = told[::-1], _OPPOSITE[side]
        text = f"{_a(told[0])} {side if task == 'position' else 'and'} {_a(told[1])}"
        include = told
        if task == "position":
            include = [told[1], {**told[0], "position": [side, 0]}]
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
    (count, color, kind, *first), link, second = found.groups()[:5], found[6], found.groups()[6:]
    if count:
        shape = {_plural(shape): shape for shape in SHAPES}[kind]
        number = {word: number for number, word in _NUMBERS.items()}[count]
        include = [_clause(color, shape, count=number)]
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


def _clause(color: str | None, shape: str, *, count: int = 1) -> dict[str, Any]:
    clause: dict[str, Any] = {"class": shape, "count": count}
    return {**clause, "color": color} if color else clause


@functools.cache
def _caption() -> re.Pattern[str]:
    """What `make` may say: number, colour, plural | colour, shape, perhaps a link, colour, shape."""
    color = f"(?:({'|'.join(COLORS)}) )?"
    thing = f"an? {color}({'|'.join(SHAPES)})"
    several = f"({'|'.join(_NUMBERS.values())}) {color}({'|'.join(map(_plural, SHAPES))})"
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
