"""From the classes that a source knows by name to the labels that a generator knows by number."""

from __future__ import annotations

import dataclasses
import difflib
from collections import Counter
from collections.abc import Sequence

from vapi_jax.data.config import DataError
from vapi_jax.models.classes import ClassesError, read_class_list

SORTED, NUMBERS = "sorted", "numbers"

_SHOWN = 5


@dataclasses.dataclass(frozen=True)
class ClassMap:
    """Which label each class of a source gets.

    Attributes:
        rule: `data.classes` that says so.
        own: the source's names.
        labels: of each of them.
        names: by label, as far as they are known.
    """

    rule: str
    own: tuple[str, ...]
    labels: tuple[int, ...]
    names: tuple[str, ...]

    @property
    def by_name(self) -> dict[str, int]:
        """Label of each class of the source."""
        return dict(zip(self.own, self.labels, strict=True))

    def rows(self, most: int = _SHOWN) -> str:
        """The first rows in words: "n01440764 = 0, n02102040 = 217, and 8 more"."""
        pairs = [f"{name} = {label}" for name, label in self.by_name.items()]
        more = f", and {len(pairs) - most} more" if len(pairs) > most else ""
        return ", ".join(pairs[:most]) + more


def class_map(rule: str, own: Sequence[str]) -> ClassMap:
    """The labels of a source's classes.

    Args:
        rule: "" or "sorted": a class's place among the source's; "numbers": the number that its name
            is; or a list for `vapi_jax.models.classes.read_class_list`, in which its name is looked up.
        own: the source's names.

    Raises:
        DataError: the rule has no label for some of the names.
    """
    own = tuple(own)
    if rule in ("", SORTED):
        return ClassMap(SORTED, own, tuple(range(len(own))), own)
    if rule == NUMBERS:
        labels = tuple(int(name) for name in own if is_number(name))
        twice = [label for label, count in Counter(labels).items() if count > 1]
        if len(labels) < len(own) or twice:
            wrong = next((name for name in own if not is_number(name)), None)
            raise DataError(
                "the names of the classes are no labels: "
                + (f"{wrong!r} is no number" if wrong else f"{twice[0]} is there more than once")
            )
        names = [str(label) for label in range(max(labels, default=0) + 1)]
        for name, label in zip(own, labels, strict=True):
            names[label] = name
        return ClassMap(rule, own, labels, tuple(names))
    try:
        known = read_class_list(rule)
    except ClassesError as error:
        raise DataError(str(error)) from error
    if missing := [name for name in own if name not in known.labels]:
        raise DataError(
            f"{len(missing)} of {len(own)} classes have no label of their own in the list "
            f"{rule}: {', '.join(map(repr, missing[:_SHOWN]))}{' ...' if len(missing) > _SHOWN else ''}"
            f"{_nearest(missing[0], known.names)}. It has {len(known.names)}: "
            f"{', '.join(known.names[:_SHOWN])}, ..."
        )
    return ClassMap(rule, own, tuple(known.labels[name] for name in own), known.names)


def is_number(name: str) -> bool:
    """Whether a class goes by a number."""
    return name.isascii() and name.isdigit() and len(name) < 7


def _nearest(name: str, known: Sequence[str]) -> str:
    if known.count(name) > 1:
        return f" ({name!r} stands for several labels there)"
    near = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
