"""What labels of generators are called: lists of names in the order of their numbers.

`imagenet` (the 1000 ids of ILSVRC 2012, such as n01440764), `imagenet_words` (the same in WordNet's words,
such as "tench, Tinca tinca") and `demo` ship with the package. A converted directory and the workdir of a run
may hold a list of their own, classes.txt.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from vapi_jax.common.digests import digest_of
from vapi_jax.common.errors import ExpectedError
from vapi_jax.common.files import LARGEST_JSON, read_json

FILE = "classes.txt"
"""In a converted directory or a workdir: the name of every label, one a line."""

_FOLDER = Path(__file__).parents[1] / "assets" / "classes"
_DIGESTS = _FOLDER.parent / "digests.json"

SHIPPED = ("imagenet", "imagenet_words", "demo")
"""Lists known by name."""

IMAGENET_CLASSES = 1000


class ClassesError(ExpectedError, ValueError):
    """A list of classes that cannot be read or does not fit; the message says which and why."""


@dataclasses.dataclass(frozen=True)
class ClassList:
    """Names of labels.

    Attributes:
      names: by label; a label that nobody has named goes by its number.
      labels: name -> label; without the names that several labels share.
    """

    names: tuple[str, ...]
    labels: Mapping[str, int]


def read_class_list(which: str | Path) -> ClassList:
    """The list that `which` means.

    Args:
      which: of `SHIPPED`; or a text file with the name of each label, in their order, one a line; or a
        JSON file with an object name -> label.

    Raises:
      ClassesError: no such file, or anything else in it.
    """
    if which in SHIPPED:
        path = _FOLDER / f"{which}.txt"
        if not path.is_file() or digest_of(path) != json.loads(_DIGESTS.read_text())[path.name]:
            raise ClassesError(f"{path} is damaged or missing: reinstall the package")
        return _listed(path.read_text(encoding="utf-8").splitlines())
    path = Path(which)
    if path.suffix == ".json":
        return _mapped(read_json(path, ClassesError), path)
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise ClassesError(f"{path} has more than {LARGEST_JSON} bytes: it is no list of names")
        lines = [line.strip() for line in _text(path).splitlines()]
    except FileNotFoundError as error:
        raise ClassesError(f"there is no file {path}") from error
    except (OSError, ValueError) as error:
        raise ClassesError(f"{path} cannot be read as text: {error}") from error
    while lines and not lines[-1]:
        lines.pop()
    if not lines or not all(lines):
        empty = f"line {lines.index('') + 1} is empty" if lines else "it is empty"
        raise ClassesError(f"{path}: {empty}; wants the name of every label, one a line")
    return _listed(lines)


def _text(path: Path) -> str:
    # Names of folders may be bytes that are no UTF-8.
    return path.read_text(encoding="utf-8-sig", errors="surrogateescape")


def _listed(names: Sequence[str]) -> ClassList:
    counts = Counter(names)
    labels = {name: label for label, name in enumerate(names) if counts[name] == 1}
    return ClassList(tuple(names), labels)


def _mapped(found: Mapping[str, object], path: Path) -> ClassList:
    labels = {
        name: label
        for name, label in found.items()
        if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < 1_000_000
    }
    if not found or len(labels) < len(found):
        wrong = next((name for name in found if name not in labels), "nothing")
        raise ClassesError(
            f'{path}: wants an object of names and their labels, such as {{"cat": 281}}; it has '
            f"{wrong!r}: {found.get(wrong)!r:.80}"
        )
    names = [str(label) for label in range(max(labels.values()) + 1)]
    for name, label in reversed(labels.items()):
        names[label] = name
    return ClassList(tuple(names), labels)


def filled(names: Sequence[str], count: int) -> tuple[str, ...]:
    """`count` names: those given, and numbers for the labels beyond them."""
    return (*names[:count], *map(str, range(len(names), count)))


def write_class_list(path: Path, names: Sequence[str]) -> None:
    """Writes names by label as `read_class_list` takes them."""
    text = "".join(f"{' '.join(name.splitlines())}\n" for name in names)
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
