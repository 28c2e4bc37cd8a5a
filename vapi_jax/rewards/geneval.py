"""GenEval's rules (arXiv 2310.11513): whether the objects in an image are those that its prompt asks for.

Objects are boxes of a detector with what a colour classifier says of each; the rules are arithmetic on
them. A prompt's metadata name what must be there (`include`: a class, how many, perhaps a colour, perhaps
a place relative to an earlier clause) and what must not (`exclude`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from vapi_jax.common.errors import ExpectedError
from vapi_jax.common.options import Count, Share

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLORS = (
    "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white",
)  # fmt: skip
RELATIONS = ("left of", "right of", "above", "below")
_MOST_OBJECTS = 1000  # that a prompt may ask for


class GenevalError(ExpectedError, ValueError):
    """Metadata or detections that are none of GenEval's; the message says where and what to do."""


@dataclasses.dataclass(frozen=True)
class Rules:
    """Thresholds of the published evaluator.

    Attributes:
      threshold: confidence that a box must exceed.
      counting_threshold: the same for prompts that count.
      max_objects: boxes of a class that are looked at.
      max_overlap: a box that overlaps a more confident one of its class by this much or more is
        left out; 1 keeps all.
      position_threshold: share of both objects' sizes by which centres must differ.
    """

    threshold: Share = 0.3
    counting_threshold: Share = 0.9
    max_objects: Count = 16
    max_overlap: Share = 1.0
    position_threshold: Share = 0.1


@dataclasses.dataclass(frozen=True)
class Clause:
    """Objects that must be there, or in `exclude` must not be."""

    name: str
    count: int
    color: str | None = None
    position: tuple[str, int] | None = None  # relation, index of an earlier clause


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What a prompt asks for."""

    tag: str
    text: str
    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...] = ()


def parse_prompt(value: Mapping[str, Any], where: str) -> Prompt:
    """One line of metadata.

    Raises:
      GenevalError: it is none of GenEval's.
    """
    tag, text, include = (value.get(name) for name in ("tag", "prompt", "include"))
    if (
        tag not in TASKS
        or not isinstance(text, str)
        or not isinstance(include, list)
        or not include
    ):
        raise GenevalError(
            f"{where}: tag {tag!r:.40}; each line of GenEval's metadata has a prompt, a list include "
            f"and a tag of {', '.join(TASKS)}"
        )
    clauses: list[Clause] = []
    for clause in include:
        clauses.append(_clause(clause, where, len(clauses)))
    excluded = value.get("exclude", [])
    if not isinstance(excluded, list):
        raise GenevalError(f"{where}: exclude is no list")
    return Prompt(tag, text, tuple(clauses), tuple(_clause(c, where, 0) for c in excluded))


def _clause(value: Any, where: str, before: int) -> Clause:
    def fail(what: str) -> GenevalError:
        return GenevalError(f"{where}: a clause {what}: {value!r:.120}")

    if not isinstance(value, dict) or not isinstance(value.get("class"), str):
        raise fail("names no class")
    count, color, position = value.get("count"), value.get("color"), value.get("position")
    if type(count) is not int or not 1 <= count <= _MOST_OBJECTS:
        raise fail("has no count")
    if color is not None and color not in COLORS:
        raise fail("has none of the ten colors")
    if position is not None:
        known = isinstance(position, list) and len(position) == 2 and position[0] in RELATIONS
        if not known or type(position[1]) is not int or not 0 <= position[1] < before:
            raise fail("has no position relative to an earlier one")
        position = (position[0], position[1])
    return Clause(value["class"], count, color, position)


@dataclasses.dataclass(frozen=True)
class Objects:
    """What was found of one class.

    Attributes:
      boxes: x0, y0, x1, y1, confidence.
      colors: of each box; None where nobody looked.
    """

    boxes: Float[np.ndarray, "N 5"]
    colors: tuple[str, ...] | None = None

    def __getitem__(self, rows: Sequence[int]) -> Objects:
        colors = None if self.colors is None else tuple(self.colors[row] for row in rows)
        return Objects(self.boxes[list(rows)], colors)

    def __len__(self) -> int:
        return len(self.boxes)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether an image is right, and what is wrong with it otherwise."""

    correct: bool
    reason: str


def _overlap(a: Float[np.ndarray, " 5"], b: Float[np.ndarray, " 5"]) -> float:
    """Intersection over union of boxes whose last pixels belong to them."""

    def area(low: np.ndarray, high: np.ndarray) -> float:
        return float(np.prod(np.maximum(high - low + 1, 0)))

    both = area(np.maximum(a[:2], b[:2]), np.minimum(a[2:4], b[2:4]))
    either = area(a[:2], a[2:4]) + area(b[:2], b[2:4]) - both
    return both / either if either else 0.0


def confident(objects: Objects, tag: str, rules: Rules) -> Objects:
    """The objects that count, the most confident first."""
    least = rules.counting_threshold if tag == "counting" else rules.threshold
    scores = objects.boxes[:, 4]
    order = [i for i in np.argsort(scores, kind="stable")[::-1] if scores[i] > least]
    kept: list[int] = []
    for row in order[: rules.max_objects]:
        box = objects.boxes[row]
        if rules.max_overlap == 1 or all(
            _overlap(objects.boxes[other], box) < rules.max_overlap for other in kept
        ):
            kept.append(int(row))
    return objects[kept]


def relations(
    a: Float[np.ndarray, " 5"], b: Float[np.ndarray, " 5"], threshold: float = 0.1
) -> set[str]:
    """Where box a lies as seen from box b; y grows downwards, and two relations can hold at once."""
    offset = (a[:2] + a[2:4] - b[:2] - b[2:4]) / 2
    sizes = np.abs(a[2:4] - a[:2]) + np.abs(b[2:4] - b[:2])
    beyond = np.maximum(np.abs(offset) - threshold * sizes, 0) * np.sign(offset)
    if (np.abs(beyond) < 1e-3).all():
        return set()
    x, y = beyond / np.linalg.norm(offset)
    held = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, holds in held.items() if holds}


def judge(prompt: Prompt, found: Mapping[str, Objects], rules: Rules | None = None) -> Verdict:
    """Whether the objects are those that the prompt asks for; see `complaints`."""
    wrong = complaints(prompt, found, rules)
    return Verdict(not wrong, "; ".join(wrong))


def complaints(
    prompt: Prompt, found: Mapping[str, Objects], rules: Rules | None = None
) -> list[str]:
    """What is wrong with the objects, at most a line for each of a prompt's clauses.

    Args:
      prompt: from `parse_prompt`.
      found: class -> all boxes of a detector, whatever their confidence.
      rules: other thresholds than the published ones.

    Raises:
      GenevalError: a colour is asked for, and nobody looked at those of the boxes.
    """
    rules = rules or Rules()
    nothing = Objects(np.zeros((0, 5)))
    wrong: list[str] = []
    groups: list[Objects | None] = []

    def there(name: str) -> Objects:
        return confident(found.get(name, nothing), prompt.tag, rules)

    for clause in prompt.include:
        complaint, taken = _lacks(clause, there(clause.name), groups, rules)
        wrong += complaint
        groups.append(None if complaint else taken)
    for clause in prompt.exclude:
        count = len(there(clause.name))
        if count >= clause.count:
            wrong.append(f"{clause.name}: {count}, wanted fewer than {clause.count}")
    return wrong


def _lacks(
    clause: Clause, found: Objects, groups: Sequence[Objects | None], rules: Rules
) -> tuple[list[str], Objects]:
    """What an `include` clause lacks (nothing, or one thing), and the objects that it took."""
    name, taken = clause.name, found[range(min(len(found), clause.count))]
    if len(taken) < clause.count:
        return [f"{name}: {len(taken)}, wanted {clause.count}"], taken
    if clause.color is not None:
        if taken.colors is None:
            raise GenevalError(f"{name} should be {clause.color}, and its boxes have no colors")
        if taken.colors.count(clause.color) < clause.count:
            return [f"{name}: {', '.join(taken.colors)}, wanted {clause.color}"], taken
    if clause.position is not None:
        relation, index = clause.position
        target = groups[index]
        if target is None:
            return [f"{name}: nothing that it could be {relation}"], taken
        for box in taken.boxes:
            for other in target.boxes:
                if relation not in (held := relations(box, other, rules.position_threshold)):
                    where = " and ".join(sorted(held)) or "at no side"
                    return [f"{name}: {where}, wanted {relation}"], taken
    return [], taken
