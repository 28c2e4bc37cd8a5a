"""Arrays of an .npz file as a stream, read with every size checked before anything is allocated.

`np.load` reads a member whole and allocates what its header asks for. Here the header is compared
with the member's length first, rows come in pieces, and objects (pickles) are never read.
"""

from __future__ import annotations

import contextlib
import io
import math
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from vapi_jax.common.errors import ExpectedError

# What the zip and .npy readers of the standard library and NumPy raise on damaged input.
_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    KeyError,
    MemoryError,
    NotImplementedError,  # a compression method that is not there
    OSError,
    RecursionError,
    RuntimeError,  # an encrypted member
    SyntaxError,
    TypeError,
    ValueError,
)


class NpzError(ExpectedError, ValueError):
    """A file that is no .npz, is damaged, or holds another array than expected."""


@contextlib.contextmanager
def _blame(path: str | Path | None) -> Iterator[None]:
    try:
        yield
    except NpzError as error:
        raise NpzError(f"{path}: {error}") from error
    except FileNotFoundError as error:
        raise NpzError(f"there is no file {path}") from error
    except _DAMAGE as error:
        raise NpzError(f"{path} cannot be read as .npz: {error}") from error


@dataclass(frozen=True)
class ArrayStream:
    """An array whose rows are read in order.

    Attributes:
      path: the file it is in.
      name: of the array, without ".npy".
      shape: its shape, at least one axis.
      dtype: its type, never an object type.
    """

    path: str | None
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    _file: IO[bytes]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, rows: int) -> np.ndarray:
        """The next rows, [rows, ...] in C order, writable.

        Raises:
          NpzError: the member ends early or fails its checksum.
        """
        shape = (rows, *self.shape[1:])
        missing = math.prod(shape) * self.dtype.itemsize
        parts = []
        with _blame(self.path):
            while missing:
                part = self._file.read(missing)
                if not part:
                    raise NpzError(f"array {self.name!r} ends {missing} bytes early")
                parts.append(part)
                missing -= len(part)
        return np.frombuffer(bytearray().join(parts), self.dtype).reshape(shape)


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(file)
    raise NpzError(f"version {version} of the .npy format is not supported")


@contextlib.contextmanager
def open_npz(path: str | Path) -> Iterator[zipfile.ZipFile]:
    """An .npz file, open for `open_array`.

    Raises:
      NpzError: no such file, or no zip archive.
    """
    with _blame(path):
        archive = zipfile.ZipFile(path)
    with archive:
        yield archive


def array_names(archive: zipfile.ZipFile) -> set[str]:
    """Names of the arrays of a file."""
    return {name[:-4] for name in archive.namelist() if name.endswith(".npy")}


@contextlib.contextmanager
def open_array(archive: zipfile.ZipFile, name: str) -> Iterator[ArrayStream]:
    """One array of an open .npz, ready to be read from its first row.

    Raises:
      NpzError: no such array, an object array, Fortran order, no axis, or a header that does not
        agree with the member's length.
    """
    path = archive.filename
    with contextlib.ExitStack() as stack:
        with _blame(path):
            if name not in array_names(archive):
                have = ", ".join(sorted(array_names(archive))) or "none"
                raise NpzError(f"there is no array {name!r}; there are: {have}")
            info = archive.getinfo(f"{name}.npy")
            file = stack.enter_context(archive.open(info))
            shape, fortran, dtype = _header(file)
            if dtype.hasobject:
                raise NpzError(f"array {name!r} holds Python objects, which are never read")
            if not shape or min(shape) < 0 or (fortran and len(shape) > 1):
                raise NpzError(
                    f"array {name!r} has shape {shape}{' in Fortran order' if fortran else ''}; an"
                    " array in C order with at least one axis is needed"
                )
            stream = ArrayStream(path, name, shape, dtype, file)
            there = info.file_size - file.tell()
            if stream.nbytes != there:
                raise NpzError(
                    f"array {name!r} of shape {shape} wants {stream.nbytes} bytes, it has {there}"
                )
        yield stream


def read_array(archive: zipfile.ZipFile, name: str, limit: int) -> np.ndarray:
    """A whole array of at most `limit` bytes.

    Raises:
      NpzError: as `open_array`, or a larger array.
    """
    with open_array(archive, name) as stream:
        if stream.nbytes > limit:
            raise NpzError(
                f"{stream.path}: array {name!r} has {stream.nbytes} bytes, at most {limit} are read"
            )
        return stream.read(stream.shape[0])


def npy_header(dtype: Any, shape: Sequence[int]) -> bytes:
    """What stands before the bytes of an array."""
    file = io.BytesIO()
    descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
    fields = {"descr": descr, "fortran_order": False, "shape": tuple(shape)}
    np.lib.format.write_array_header_1_0(file, fields)
    return file.getvalue()


def npy_member(name: str) -> zipfile.ZipInfo:
    """Where an array goes in an archive, by its name without ".npy".

    With the time of writing in it, no two archives of the same arrays would be the same.
    """
    return zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
