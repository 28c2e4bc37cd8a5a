"""Parquet files with a column of images, as Hugging Face keeps data sets: FLUX-Reason-6M, for example.

An image is a struct of bytes and path, or bytes alone. A row is known by its row group and its place there.
The index reads the few columns that it needs; a sample reads its row group up to its row, and keeps a few
stretches of rows for those that come next.
"""

from __future__ import annotations

import functools
import io
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from vapi_jax.data.config import DataError
from vapi_jax.data.image_text.captions import Record, column_of
from vapi_jax.data.image_text.layouts import NOWHERE, Entry, Layout, Span, below
from vapi_jax.data.images import UnreadableImage
from vapi_jax.models.caption_text import EXTRA

_NAMES = ("image", "jpg", "png", "webp", "img")
"""Columns of images that are taken before others."""

_OPTIONAL = ("width", "height")  # used where they are there
_ROWS = 32  # read at once: what is held of images of megabytes
_KEPT = 4  # such stretches
_FILES = 64  # open files of a thread
_LARGEST = 1 << 26
"""Bytes of an image."""
_THRIFT = 1 << 27  # of a file's own description, which is believed up to that


class Parquet(Layout):
    """Row groups of captions and images."""

    def _find(self) -> tuple[Path, ...]:
        self._wanted: frozenset[str] | None = None
        self._scanned: tuple[Span, Record] = (NOWHERE, {})
        # Per instance, so that nothing of a layout outlives it.
        self._file = functools.lru_cache(_FILES)(self._open)
        self._stretch = functools.lru_cache(_KEPT)(self._read)
        return below(self.root, ".parquet", self.left_out)

    def has_images(self) -> bool:
        """Whether this is more than img2dataset's lists of what it has downloaded."""
        return bool(self.files) and any(self._image_column(n) for n in range(len(self.files)))

    def only(self, fields: Iterable[str]) -> None:
        self._wanted = None
        wanted = frozenset(map(column_of, fields))
        for number, path in enumerate(self.files):
            there = self._columns(number)
            absent = wanted - {*there, *_OPTIONAL}
            if absent and self._image_column(number):
                raise DataError(
                    f"{path} has no column {', '.join(sorted(absent))} (data.options.caption_field and "
                    f"where name columns); it has {', '.join(there)[:400]}"
                )
        self._wanted = wanted
        self._stretch.cache_clear()

    def scan(self) -> Iterator[Entry]:
        for number, path in enumerate(self.files):
            image = self._image_column(number)
            if not image:
                self.left_out["file(s) without a column of images"] += 1
                continue
            name = str(path.relative_to(self.root)) if path != self.root else path.name
            columns, at = self._columns(number), 0
            for group in range(self._of(number).metadata.num_row_groups):
                for row, record in enumerate(self._rows(number, group, columns)):
                    place = (number, group, row)
                    self._scanned = place, record
                    yield Entry(f"{name}:{at}", image=place, record=place)
                    at += 1

    def record(self, entry: Entry) -> Record:
        place, record = self._scanned
        return record if place == entry.record else self._row(entry.record)[0]

    def image(self, entry: Entry) -> Path | BinaryIO:
        data = self._row(entry.image)[1]
        if isinstance(data, dict):
            data = data.get("bytes")
        if not isinstance(data, bytes):
            raise UnreadableImage("its row holds no bytes of an image")
        if len(data) > _LARGEST:
            raise UnreadableImage(f"its row holds {len(data)} bytes, more than {_LARGEST}")
        return io.BytesIO(data)

    # --- files ------------------------------------------------------------------------------------

    def _of(self, number: int) -> Any:
        """A file, open; readers of one are not meant for several threads."""
        return self._file(number, threading.get_ident())

    def _open(self, number: int, thread: int) -> Any:
        del thread
        try:
            import pyarrow.parquet as pq
        except ImportError as error:
            raise DataError(
                f"{self.files[number]} is read by the library pyarrow ({error}): {EXTRA}"
            ) from error
        path = self.files[number]
        limits = {"thrift_string_size_limit": _THRIFT, "thrift_container_size_limit": _THRIFT >> 5}

        def opened() -> Any:
            file = pq.ParquetFile(path, **limits)
            _ = file.schema_arrow  # made here, where damage is caught
            return file

        return _guarded(path, opened)

    def _image_column(self, number: int) -> str:
        """The column of images; "" without one."""
        schema = self._of(number).schema_arrow
        import pyarrow.types as kinds  # there, or the file would not be open

        def holds(kind: Any) -> bool:
            if kinds.is_struct(kind):
                inner = kind.get_field_index("bytes")
                return inner >= 0 and holds(kind.field(inner).type)
            return kinds.is_binary(kind) or kinds.is_large_binary(kind)

        found = [field.name for field in schema if holds(field.type)]
        return next((name for name in _NAMES if name in found), found[0] if found else "")

    def _columns(self, number: int) -> list[str]:
        """Columns of a record, which are all but images where nothing else is said."""
        names = self._of(number).schema_arrow.names
        there = [name for name in names if name != self._image_column(number)]
        return there if self._wanted is None else [name for name in there if name in self._wanted]

    def _rows(
        self, number: int, group: int, columns: list[str], size: int = 1024
    ) -> Iterator[dict[str, Any]]:
        file, path = self._of(number), self.files[number]
        options = {"batch_size": size, "row_groups": [group], "use_threads": False}
        batches = _guarded(path, lambda: file.iter_batches(columns=columns, **options))
        while (batch := _guarded(path, lambda: next(batches, None))) is not None:
            yield from _guarded(path, batch.to_pylist)

    # --- rows -------------------------------------------------------------------------------------

    def _row(self, place: Span) -> tuple[Record, Any]:
        number, group, row = place
        try:
            rows = self._stretch(number, group, row // _ROWS)
        except DataError as error:
            raise UnreadableImage(str(error)) from error
        if row % _ROWS >= len(rows):
            raise UnreadableImage(f"{self.files[number]} ends early: it is not what was indexed")
        return rows[row % _ROWS]

    def _read(self, number: int, group: int, stretch: int) -> list[tuple[Record, Any]]:
        image, file = self._image_column(number), self._of(number)
        path, columns = self.files[number], [*self._columns(number), image]
        options = {"batch_size": _ROWS, "row_groups": [group], "use_threads": False}
        batches = _guarded(path, lambda: file.iter_batches(columns=columns, **options))
        for _ in range(stretch + 1):  # those before it are decoded, and not kept
            batch = _guarded(path, lambda: next(batches, None))
            if batch is None:
                return []
        rows: list[dict[str, Any]] = _guarded(path, batch.to_pylist)
        return [({k: v for k, v in row.items() if k != image}, row[image]) for row in rows]


def _guarded(path: Path, read: Callable[[], Any]) -> Any:
    """What `read` gives; raises DataError where the library finds the file damaged."""
    import pyarrow as pa

    try:
        return read()
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError, MemoryError) as error:
        raise DataError(
            f"{path} is damaged, or no parquet file: {str(error)[:200]}. Fetch it again, or take it away"
        ) from error
