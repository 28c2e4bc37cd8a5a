"""An open file of which named stretches are read; the errors and the bounds of all that read it."""

from __future__ import annotations

import io
import threading
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vapi_jax.common.errors import ExpectedError


class TorchFileError(ExpectedError, ValueError):
    """A file that is no sound PyTorch checkpoint, or a value that cannot be put into one."""


# Generous: published checkpoints have below a thousand entries and a pickle below a megabyte.
MAX_PICKLE = 16 * 2**20
MAX_ENTRIES = 100_000
MAX_DEPTH = 100
_MAX_DIRECTORY = 16 * 2**20
_HEAD = 512


@dataclass(frozen=True)
class Entry:
    """Where named bytes lie in the file, and their CRC-32 (0 where the file does not say)."""

    name: str
    offset: int
    size: int
    crc: int = 0


class File(io.FileIO):
    """A file of which `zipfile` cannot read any size that the file claims for its directory.

    Unbuffered, so that reading small parts of large entries costs no more than these parts.
    """

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and size > _MAX_DIRECTORY:
            raise zipfile.BadZipFile(f"it claims {size} bytes")
        return super().read(size)


class StorageFile:
    """An open file; threads may read it at the same time.

    Attributes:
      path: where it lies.
      entries: name -> where its bytes lie; storages are named `data/<key>`.
    """

    def __init__(self, path: Path, file: File):
        self.path = path
        self.entries: dict[str, Entry] = {}
        self._file = file
        # Seeking and reading are two steps: threads must not come between.
        self._lock = threading.Lock()

    def error(self, what: str) -> TorchFileError:
        return TorchFileError(f"{self.path}: {what}")

    def fill(self, buffer: bytearray | memoryview, offset: int) -> int:
        """Reads bytes of the file into a buffer; returns how many there were."""
        view, count = memoryview(buffer), 0
        try:
            with self._lock:
                self._file.seek(offset)
                # One read gives at most 2 GiB.
                while got := self._file.readinto(view[count:]):
                    count += got
            return count
        except (OSError, ValueError) as error:
            raise self.error(
                f"cannot be read ({error}); tensors are read before their file is closed"
            ) from error

    def head(self, size: int = _HEAD) -> bytes:
        """The first bytes of the file, fewer where it is shorter."""
        buffer = bytearray(size)
        return bytes(memoryview(buffer)[: self.fill(buffer, 0)])

    def read_exactly(self, entry: Entry, start: int, out: np.ndarray) -> None:
        """Fills `out` (uint8, contiguous) from byte `start` of an entry; all of it must be there."""
        if self.fill(out.data, entry.offset + start) != out.size:
            raise self.error(f"{entry.name} ended early: the file was changed while it was open")

    def read_into(self, name: str, start: int, out: np.ndarray) -> None:
        """Fills `out` (uint8, contiguous) from byte `start` of the entry of this name."""
        self.read_exactly(self.entries[name], start, out)
