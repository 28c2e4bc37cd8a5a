"""Unreadable images: each replaced by another image, counted and listed, too many refused.

The replacement is drawn at random from the same split with the sample's own generator. So sample i
stays a function of the seed and i alone, whatever the number of processes and wherever a run was
interrupted; no other sample moves, and an image is seen more often than once in an epoch only
where it stands in for another.

Several processes share no list: each writes its own (`SkippedImages.of_process`), and each judges by
itself whether the split has more unreadable images than `max_unreadable` allows. What a process has
read is a random part of the split, in which the share may be larger by chance; five standard deviations
of that are put up with. Over the epochs every process comes to read every image, and then knows.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import pathlib
import threading
from typing import Any

import numpy as np

from vapi_jax.common.files import write_atomically
from vapi_jax.data.classes import class_map
from vapi_jax.data.config import DataConfig, DataError
from vapi_jax.data.images import UnreadableImage
from vapi_jax.data.sources import Source

logger = logging.getLogger(__name__)

# A share is told from so many images on: one bad image among the first three is no third of the data.
_ENOUGH = 1000
_DEVIATIONS = 5
_LOGGED = 20
_NAMED = 5


class SkippedImages:
    """The list of a run's unreadable images, each once.

    Args:
        path: a file of JSON lines {"image", "reason"} that the list goes on in; None keeps it in
            memory. One process writes a file.
    """

    @classmethod
    def of_process(cls, folder: pathlib.Path, process: int) -> SkippedImages:
        """The list of one process of a run: skipped_images.jsonl, skipped_images.1.jsonl and so on."""
        return cls(folder / f"skipped_images{f'.{process}' if process else ''}.jsonl")

    def __init__(self, path: pathlib.Path | None = None) -> None:
        self._path = path
        self._found: dict[str, str] = {}
        self._lock = threading.Lock()
        if path is not None and path.exists():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            for row in filter(None, map(_parse, lines)):
                self._found[row[0]] = row[1]
            if len(self._found) != len(lines):  # a run that was killed may leave half a line
                write_atomically(path, "".join(_line(*row) for row in self._found.items()))

    def __len__(self) -> int:
        return len(self._found)

    def items(self) -> tuple[tuple[str, str], ...]:
        """Names and reasons, in the order of their discovery."""
        with self._lock:
            return tuple(self._found.items())

    def add(self, name: str, reason: str) -> None:
        """Lists an image, unless it is listed already."""
        with self._lock:
            if name in self._found:
                return
            self._found[name] = reason
            if self._path is not None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(_line(name, reason))
            count = len(self._found)
        if count <= _LOGGED:
            logger.warning("left out, because it cannot be read: %r (%s)", name, reason)
        if count == _LOGGED:
            where = f"; all are listed in {self._path}" if self._path is not None else ""
            logger.warning("unreadable images after these %d are not logged%s", _LOGGED, where)


def _line(name: str, reason: str) -> str:
    # ASCII, because a path may hold newlines and bytes that are no UTF-8.
    return json.dumps({"image": name, "reason": reason}) + "\n"


def _parse(line: str) -> tuple[str, str] | None:
    try:
        row: Any = json.loads(line)
        return str(row["image"]), str(row["reason"])
    except (ValueError, KeyError, TypeError):
        return None


def allowed(share: float, tried: int, total: int) -> float:
    """How many of `tried` images, of a split of `total`, may be unreadable if `share` of all may be."""
    seen = max(tried, min(total, _ENOUGH))
    chance = _DEVIATIONS * math.sqrt(seen * share * (1.0 - share))
    return min(share * seen + chance, share * total)


class Readable:
    """A source all of whose samples can be read.

    Args:
        source: what may hold unreadable images.
        config: `max_unreadable` is the share of them that is put up with, and `classes` says which label
            a sample gets instead of the number of its class.
        skipped: where they are listed.
    """

    def __init__(self, source: Source, config: DataConfig, skipped: SkippedImages) -> None:
        self._source = source
        self._limit = config.max_unreadable
        self._shape = (config.image_size, config.image_size, 3)
        self._skipped = skipped
        self._classes = config.classes
        self._tried = np.zeros(len(source), bool)
        self._unreadable: dict[int, str] = {}
        self._lock = threading.Lock()

    @functools.cached_property
    def _labels(self) -> tuple[int, ...]:
        return class_map(self._classes, self._source.class_names).labels

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Sample `index`, or the one that stands in for it.

        Raises:
            DataError: more images than `max_unreadable` allows cannot be read, or a sample is none.
        """
        while True:
            if index not in self._unreadable:
                try:
                    sample = self._source.sample(index, rng)
                except UnreadableImage as error:
                    self._note(index, str(error))
                else:
                    self._tried[index] = True
                    return self._checked(index, sample)
            index = int(rng.integers(len(self._tried)))

    def _checked(self, index: int, sample: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What a source may get wrong silently; it may bring no image, and another condition than a label."""
        image, label = sample.get("image"), sample["condition"]
        if image is None:
            pass
        elif image.dtype != np.float32 or image.shape != self._shape:
            raise DataError(
                f"{self._source.name(index)}: its source gives {image.dtype} {image.shape}, not float32 "
                f"{self._shape}"
            )
        if not (isinstance(label, np.integer | np.ndarray) and np.ndim(label) == 0):
            return sample
        if not 0 <= label < len(self._labels):
            raise DataError(
                f"{self._source.name(index)}: its source gives the label {label}, and has "
                f"{len(self._labels)} classes"
            )
        return {**sample, "condition": np.asarray(self._labels[int(label)], np.int32)}

    def _note(self, index: int, reason: str) -> None:
        name = self._source.name(index)
        self._skipped.add(name, reason)
        with self._lock:
            self._tried[index] = True
            self._unreadable[index] = f"{name} ({reason})"
            bad, tried, total = len(self._unreadable), int(self._tried.sum()), len(self._tried)
            named = "\n  ".join(list(self._unreadable.values())[:_NAMED])
        if bad == total or bad > allowed(self._limit, tried, total):
            raise DataError(
                f"{bad} of {tried} images read cannot be decoded (the split has {total}), more than "
                f"the share data.max_unreadable={self._limit} allows:\n  {named}\n"
                "Repair or remove them, or allow a larger share"
            )
