"""The index of a data set: which images have a caption, and where everything of them lies.

Built once by going through all files, and kept under ~/.cache (or $XDG_CACHE_HOME) under a name that
tells the files' names, sizes and times and what was asked for; it is made again when folders have changed
in which a list looks for its images. So sample i is the same in every process
and every life of a run, and nothing is written beside the data.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from vapi_jax.common.files import new_file
from vapi_jax.common.paths import cache_folder
from vapi_jax.data.config import DataError
from vapi_jax.data.image_text.captions import CaptionFields, Record, Where, texts_in
from vapi_jax.data.image_text.layouts import Entry, Layout, SideBySide, changed_at
from vapi_jax.data.images import UnreadableImage

logger = logging.getLogger(__name__)

_VERSION = 2
_EXAMPLES = 3
_SHOWN = 160  # letters of an example


@dataclasses.dataclass(frozen=True)
class Index:
    """Entries of a layout, in order.

    Attributes:
      names: all names in UTF-8, one after the other; name i ends at `ends[i]`.
      places: image, text and record of each: number of a file, first byte, bytes.
      left_out: kind -> how much of it.
      examples: a few captions.
    """

    names: UInt8[np.ndarray, " B"]
    ends: Int[np.ndarray, " N"]
    places: Int[np.ndarray, "N 9"]
    left_out: dict[str, int]
    examples: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ends)

    def name(self, index: int) -> str:
        """Of an entry."""
        start = int(self.ends[index - 1]) if index else 0
        text = self.names[start : int(self.ends[index])].tobytes()
        return text.decode(errors="surrogateescape")

    def digest(self) -> str:
        """SHA-256 of the names and of where everything lies, which a text of another length changes."""
        found = hashlib.sha256()
        for array in (self.names, self.ends, self.places):
            found.update(np.ascontiguousarray(array).tobytes())
        return found.hexdigest()

    def entry(self, index: int) -> Entry:
        """An entry, as its layout takes it."""
        image, text, record = (
            (int(a), int(b), int(c)) for a, b, c in self.places[index].reshape(3, 3)
        )
        return Entry(self.name(index), image, text, record)


def open_index(
    layout: Layout, fields: CaptionFields, where: tuple[Where, ...], min_side: int
) -> Index:
    """The index of what has a caption and is wanted, from the cache or built and cached.

    Raises:
      DataError: a file is damaged, or nothing has a caption.
    """
    path = cache_folder() / "image_text" / f"{_digest(layout, fields, where, min_side)}.npz"
    found = _load(path)
    if found is None:
        logger.info("indexing %d file(s) of %s", len(layout.files), layout.root)
        found = _build(layout, fields, where, min_side)
        try:
            _save(path, found, layout.folders)
        except OSError as error:  # a home that cannot be written costs time only
            logger.warning("the index is not kept: %s", error)
    return found


def _digest(layout: Layout, *asked: Any) -> str:
    places = (layout.root, layout.images)
    digest = hashlib.sha256(repr((_VERSION, type(layout).__name__, places, asked)).encode())
    for path in layout.files:
        paths = [path]
        if isinstance(layout, SideBySide):
            paths += [path.with_suffix(suffix) for suffix in (".txt", ".json")]
        for part in paths:
            try:
                facts = part.stat()
            except OSError:
                continue
            text = f"{part}\0{facts.st_size}\0{facts.st_mtime_ns}\n"
            digest.update(text.encode(errors="surrogateescape"))
    return digest.hexdigest()


def _build(layout: Layout, fields: CaptionFields, where: tuple[Where, ...], min_side: int) -> Index:
    left_out: Counter[str] = Counter()
    names, ends, places = bytearray(), [], []
    examples: list[str] = []
    seen: dict[str, None] = {}
    unknown, faulty = set(fields.names), dict[str, str]()
    for entry, record in _records(layout, left_out):
        if unknown:
            unknown -= fields.in_record(record)
        caption = fields.any_in(record)
        reason = next(filter(None, (test.fails(record) for test in where)), "")
        for fault in (faults := fields.faults(record)):
            left_out[kind := f"caption(s) with {fault}"] += 1
            faulty.setdefault(kind, entry.name)
        if not caption:
            reason = "" if faults else "image(s) without a caption"
            seen |= dict.fromkeys(texts_in(record))
        elif not reason and _side(record) < min_side:
            reason = f"image(s) with a side below {min_side} pixels"
        if reason:
            left_out[reason] += 1
        if reason or not caption:
            continue
        names += entry.name.encode(errors="surrogateescape")
        ends.append(len(names))
        places.append((*entry.image, *entry.text, *entry.record))
        if len(examples) < _EXAMPLES:
            examples.append(caption[:_SHOWN])
    for kind, name in faulty.items():
        left_out[f"{kind}, the first of {name}"] = left_out.pop(kind)
    left_out.update(layout.left_out)
    if not ends:
        told = ", ".join(f"{count} {kind}" for kind, count in left_out.most_common()) or "nothing"
        texts = f"; texts that are there: {', '.join(list(seen)[:12])}" if seen else ""
        raise DataError(
            f"data.path: in {layout.root} no image has a caption in {', '.join(fields.names)} "
            f"(data.options.caption_field) and passes all filters; it holds {told}{texts}"
        )
    if unknown:
        raise DataError(
            f"data.options.caption_field: no image in {layout.root} has {', '.join(sorted(unknown))}; "
            "write it as the records do, or take it out"
        )
    return Index(
        np.frombuffer(bytes(names), np.uint8),
        np.array(ends, np.int64),
        np.array(places, np.int64),
        dict(left_out),
        tuple(examples),
    )


def _records(layout: Layout, left_out: Counter[str]) -> Iterator[tuple[Entry, Record]]:
    for entry in layout.scan():
        try:
            yield entry, layout.record(entry)
        except UnreadableImage:
            left_out["record(s) that cannot be read"] += 1


def _side(record: Record) -> float:
    """The short side of an image whose record says it, as img2dataset's do; else it is seen later."""
    sides = [side for name in ("width", "height") if type(side := record.get(name)) is int]
    return min(sides) if len(sides) == 2 else float("inf")


def _save(path: Path, index: Index, folders: dict[str, int | None]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = json.dumps({"left_out": index.left_out, "examples": index.examples, "folders": folders})
    with new_file(path) as partial, partial.open("wb") as file:
        np.savez(
            file, names=index.names, ends=index.ends, places=index.places, facts=np.array(facts)
        )


def _load(path: Path) -> Index | None:
    """The kept index; None where there is none, or none that is whole and of the folders as they are."""
    try:
        with np.load(path, allow_pickle=False) as file:
            facts = json.loads(str(file["facts"]))
            found = Index(
                file["names"], file["ends"], file["places"], facts["left_out"],
                tuple(facts["examples"]),
            )  # fmt: skip
        whole = found.places.shape == (len(found), 9) and found.ends[-1] == len(found.names)
        same = all(changed_at(folder) == time for folder, time in facts["folders"].items())
        return found if whole and same else None
    except FileNotFoundError:
        return None
    except (
        OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, EOFError,
        zipfile.BadZipFile,
    ):  # fmt: skip
        return None
