"""Where images and their records lie: tar shards, lists of lines, files side by side.

A layout is gone through once, for the index. Afterwards everything is read at its place. Nothing in a
shard is unpacked, so no name in it can lead anywhere; sizes are compared with the file before they are
believed, and texts are read up to a limit.
"""

from __future__ import annotations

import abc
import dataclasses
import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

from vapi_jax.common.image_files import (
    EXTENSIONS,
    OTHER_FILES,
    find_files,
    find_images,
    kind_of_file,
)
from vapi_jax.data.config import DataError
from vapi_jax.data.image_text.captions import TXT, Record
from vapi_jax.data.images import UnreadableImage
from vapi_jax.data.tab_rows import cells, rows

MAX_TEXT = 1 << 20
"""Bytes of a text, of a record, and of a line."""

PATH_FIELDS = ("image_path", "img_path", "file_name", "image", "path", "filepath")
"""Where a line says which image it is of; the first of them that is a text."""

NOWHERE = (-1, 0, 0)
Span = tuple[int, int, int]
"""Number of a file, first byte, bytes."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """An image and where everything of it lies.

    Attributes:
      name: of the image: its path as the layout gives it, or SHARD:KEY.
      image, text, record: places in the layout's files; `NOWHERE` where there is none, or where it is
        a file of its own.
    """

    name: str
    image: Span = NOWHERE
    text: Span = NOWHERE
    record: Span = NOWHERE


class Layout(abc.ABC):
    """One way to keep images and captions.

    Args:
      root: the folder, or one file.
      images: folder that paths of images are relative to; None for that of the list.
      left_out: counts by kind what is not among the entries.

    Attributes:
      files: that the index is of.
      folders: others that a scan has looked for images in, and when each was changed last; None for one
        that is not there.
      caption: the field where nothing else is asked for; "" where it has to be.
    """

    caption: ClassVar[str] = ""

    def __init__(self, root: Path, images: Path | None, left_out: Counter[str]):
        self.root, self.left_out, self.images = root, left_out, images
        self.folders: dict[str, int | None] = {}
        self.files: tuple[Path, ...] = self._find()

    @abc.abstractmethod
    def _find(self) -> tuple[Path, ...]:
        """The files of the layout below `root`; none where there is no such thing."""

    @abc.abstractmethod
    def scan(self) -> Iterator[Entry]:
        """Every image that there is, in order; raises DataError where a file is damaged."""

    @abc.abstractmethod
    def record(self, entry: Entry) -> Record:
        """What is known of an image; raises UnreadableImage."""

    def only(self, fields: Iterable[str]) -> None:
        """Says which fields of records will be asked for; a layout may leave out the others."""
        del fields

    def image(self, entry: Entry) -> Path | BinaryIO:
        """The image's file, or its bytes; raises UnreadableImage."""
        return io.BytesIO(self.read(entry.image))

    def read(self, span: Span) -> bytes:
        """Bytes of a file."""
        number, at, size = span
        try:
            with self.files[number].open("rb") as file:
                file.seek(at)
                data = file.read(size)
        except OSError as error:
            raise UnreadableImage(f"{self.files[number]}: {error.strerror}") from error
        if len(data) != size:
            raise UnreadableImage(f"{self.files[number]} ends early: it is not what was indexed")
        return data


def parse_text(data: bytes) -> str:
    """A caption's file as text; what is no UTF-8 is marked as such."""
    return data.decode("utf-8-sig", errors="replace")


def parse_record(data: bytes) -> dict[str, Any]:
    """A JSON object; raises UnreadableImage where it is none."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UnreadableImage(f"its JSON cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise UnreadableImage(f"its JSON is a {type(value).__name__}, not an object")
    return value


def below(root: Path, suffix: str, left_out: Counter[str]) -> tuple[Path, ...]:
    """Files of an ending below a folder, as images are found there; of a root that is a file, that file."""
    if root.is_file():
        return (root,) if root.suffix.lower() == suffix else ()
    found = find_files(root, {suffix})
    # Other files are no loss: images lie beside their list, and statistics beside shards.
    left_out.update({k: n for k, n in found.left_out.items() if not k.startswith(OTHER_FILES)})
    there = tuple(filter(Path.is_file, map(Path, found.files)))
    if lost := len(found.files) - len(there):
        left_out[f"link(s) ending in {suffix} that lead to no file"] += lost
    return there


def changed_at(folder: str) -> int | None:
    """When a folder got or lost an entry last; None where there is no such folder."""
    try:
        return os.stat(folder).st_mtime_ns
    except (OSError, ValueError):
        return None


class TarShards(Layout):
    """Shards as img2dataset writes them: KEY.jpg, KEY.txt and KEY.json, in any order."""

    def _find(self) -> tuple[Path, ...]:
        return below(self.root, ".tar", self.left_out)

    def scan(self) -> Iterator[Entry]:
        for number, path in enumerate(self.files):
            parts: dict[str, dict[str, Span]] = {}
            for name, span in self._members(number, path):
                folder, _, last = name.rpartition("/")
                stem, _, ending = last.partition(".")
                found = parts.setdefault(f"{folder}/{stem}".lstrip("/"), {})
                if (ending := f".{ending.lower()}") in found:
                    self.left_out["member(s) of a shard that one of the same name follows"] += 1
                found[ending] = span
            for key, found in parts.items():
                images = [ending for ending in found if ending in EXTENSIONS]
                dotted = sum(os.path.splitext(e)[1] in EXTENSIONS for e in found) - len(images)
                for kind, count in (
                    ("image(s) after the first of their key", len(images) - 1),
                    ("image(s) named as KEY.WORD.png, where a key ends at its first dot", dotted),
                    ("key(s) without an image", int(not images and not dotted)),
                ):
                    if count > 0:
                        self.left_out[kind] += count
                if not images:
                    continue
                name = f"{path.relative_to(self.root) if path != self.root else path.name}:{key}"
                text, record = found.get(".txt", NOWHERE), found.get(".json", NOWHERE)
                yield Entry(name, found[images[0]], text, record)

    def _members(self, number: int, path: Path) -> Iterator[tuple[str, Span]]:
        size = path.stat().st_size
        try:
            with tarfile.open(path, "r:") as archive:
                for member in archive:
                    archive.members = []  # type: ignore[attr-defined] # or it keeps all
                    end = member.offset_data + member.size
                    if not member.isreg() or member.sparse is not None:
                        self.left_out["member(s) of a shard that are no plain file"] += 1
                    elif end > size:
                        raise tarfile.ReadError(f"{member.name!r:.80} ends at byte {end} of {size}")
                    elif member.name.endswith((".txt", ".json")) and member.size > MAX_TEXT:
                        self.left_out[f"text(s) of more than {MAX_TEXT} bytes"] += 1
                    else:
                        yield member.name, (number, member.offset_data, member.size)
                # The library takes whatever is no header for the end, and an end that is not there, too.
                with path.open("rb") as file:
                    file.seek(archive.offset)
                    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                        raise tarfile.ReadError(
                            f"neither a header nor its end is at {archive.offset}"
                        )
                    padding = iter(lambda: file.read(MAX_TEXT), b"")
                    joined = any(block.count(0) < len(block) for block in padding)
        except (tarfile.TarError, OSError, ValueError, OverflowError, RecursionError) as error:
            raise DataError(
                f"{path} is damaged, or no tar file: {error}. Fetch it again, or take it away"
            ) from error
        if joined:
            raise DataError(
                f"{path} goes on after its end at byte {archive.offset}, as archives do that cat has joined: "
                "keep them apart, or join them with tar --concatenate"
            )

    def record(self, entry: Entry) -> Record:
        found = parse_record(self.read(entry.record)) if entry.record != NOWHERE else {}
        if entry.text != NOWHERE:
            found[TXT] = parse_text(self.read(entry.text))
        return found


class Lines(Layout):
    """Lists that name an image on each line, relative to the list, to a folder, or absolute."""

    def scan(self) -> Iterator[Entry]:
        for number, path in enumerate(self.files):
            for span in self._lines(number, path):
                entry = Entry("", record=span)
                try:
                    record = self.record(entry)
                except UnreadableImage:
                    self.left_out["line(s) that cannot be read"] += 1
                    continue
                named = (record.get(field) for field in PATH_FIELDS)
                image = next((name for name in named if isinstance(name, str) and name), None)
                if image is None:
                    self.left_out[f"line(s) without {', '.join(PATH_FIELDS)}"] += 1
                    continue
                entry = dataclasses.replace(entry, name=image)
                place = self._place(entry)
                if (folder := os.path.dirname(place)) not in self.folders:
                    self.folders[folder] = changed_at(folder)
                if "\0" not in place and os.path.exists(place):
                    yield entry
                else:
                    self.left_out["image(s) that are not there"] += 1

    def _lines(self, number: int, path: Path) -> Iterator[Span]:
        try:
            with path.open("rb") as file:
                at = 0
                for row in self._rows(_limited(file, path)):
                    if row.strip():
                        yield number, at, len(row)
                    at += len(row)
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from error

    def _rows(self, lines: Iterator[bytes]) -> Iterator[bytes]:
        """What an image each is said in, of the lines of a file."""
        return lines

    def image(self, entry: Entry) -> Path:
        return Path(self._place(entry))

    def _place(self, entry: Entry) -> str:
        return os.path.join(self.images or self.files[entry.record[0]].parent, entry.name)


def _limited(file: BinaryIO, path: Path) -> Iterator[bytes]:
    while line := file.readline(MAX_TEXT + 1):
        if len(line) > MAX_TEXT:
            at = file.tell() - len(line)
            raise DataError(f"{path}: a line at byte {at} is longer than {MAX_TEXT} bytes")
        yield line


class JsonLines(Lines):
    """A JSON object on each line."""

    def _find(self) -> tuple[Path, ...]:
        return below(self.root, ".jsonl", self.left_out)

    def record(self, entry: Entry) -> Record:
        return parse_record(self.read(entry.record))


class TabLines(Lines):
    """Columns between tabs; without names in the first line they are the path and the caption."""

    caption = "caption"

    def _find(self) -> tuple[Path, ...]:
        files = below(self.root, ".tsv", self.left_out)
        self._columns: dict[int, Sequence[str]] = {}
        for number, path in enumerate(files):
            try:
                with path.open("rb") as file:
                    first = cells(parse_text(file.readline(MAX_TEXT)))
            except OSError as error:
                raise DataError(f"{path} cannot be read: {error.strerror}") from error
            self._columns[number] = first if set(first) & set(PATH_FIELDS) else ()
        return files

    def _rows(self, lines: Iterator[bytes]) -> Iterator[bytes]:
        return rows(lines)

    def _lines(self, number: int, path: Path) -> Iterator[Span]:
        lines = super()._lines(number, path)
        if self._columns[number]:
            next(lines, None)
        return lines

    def record(self, entry: Entry) -> Record:
        found = cells(parse_text(self.read(entry.record)))
        names = self._columns[entry.record[0]] or ("path", "caption")
        if len(found) != len(names):
            raise UnreadableImage(f"its line has {len(found)} columns, not {len(names)}")
        return dict(zip(names, found, strict=True))


class SideBySide(Layout):
    """NAME.txt, and perhaps NAME.json, beside NAME.jpg, in any depth of folders."""

    caption = TXT

    def _find(self) -> tuple[Path, ...]:
        if not self.root.is_dir():
            return ()
        found = find_images(self.root)
        endings = {".txt", ".json"}  # they are wanted here
        wanted = {kind_of_file(f"x{ending}") for ending in endings}
        self.left_out.update({k: n for k, n in found.left_out.items() if k not in wanted})
        return tuple(map(Path, found.files))

    def scan(self) -> Iterator[Entry]:
        for number, path in enumerate(self.files):
            yield Entry(os.path.relpath(path, self.root), image=(number, 0, 0))

    def image(self, entry: Entry) -> Path:
        return self.root / entry.name

    def record(self, entry: Entry) -> Record:
        found: dict[str, Any] = {}
        for suffix, parse in ((".json", parse_record), (".txt", parse_text)):
            path = self.image(entry).with_suffix(suffix)
            try:
                with path.open("rb") as file:
                    data = file.read(MAX_TEXT + 1)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise UnreadableImage(f"{path}: {error.strerror}") from error
            if len(data) > MAX_TEXT:
                raise UnreadableImage(f"{path} has more than {MAX_TEXT} bytes")
            parsed = parse(data)
            found |= parsed if isinstance(parsed, dict) else {TXT: parsed}
        return found


LAYOUTS: dict[str, type[Layout]] = {
    "tar": TarShards,
    "jsonl": JsonLines,
    "tsv": TabLines,
    "folder": SideBySide,
}
