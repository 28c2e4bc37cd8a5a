"""Writing checkpoints: what `torch.save` makes by default, the layout of published releases.

`torch.load(path, weights_only=True)` reads them, with `mmap=True` as well.
"""

from __future__ import annotations

import argparse
import math
import re
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Protocol, runtime_checkable

import numpy as np

from vapi_jax.common.files import new_file
from vapi_jax.weights.safe_pickle import Record
from vapi_jax.weights.torch_file.archive import LOCAL_HEADER
from vapi_jax.weights.torch_file.storage_file import (
    MAX_DEPTH,
    MAX_ENTRIES,
    MAX_PICKLE,
    TorchFileError,
)
from vapi_jax.weights.torch_file.tensors import STORAGES


@runtime_checkable
class _Readable(Protocol):
    """An array that is fetched when it is needed, such as `TorchTensor`."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def read(self) -> np.ndarray: ...


_STORAGE_NAMES = {dtype: name for name, dtype in STORAGES.items()}
_ALIGNMENT = 64
_ZIP64_FROM = 2**30
_WRITABLE = (
    "a file may hold dict, list, tuple, text, whole numbers (of up to 255 bytes), floats, True,"
    " False, None, argparse.Namespace, and arrays"
)


def _text(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def _integer(number: int) -> bytes:
    if -(2**31) <= number < 2**31:
        return b"J" + struct.pack("<i", number)
    raw = number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def _tuple(items: list[bytes]) -> bytes:
    return b"(" + b"".join(items) + b"t"


class _Pickler:
    """Spells a value in protocol 2 and collects its arrays in the order of their storage keys."""

    def __init__(self) -> None:
        self.arrays: list[tuple[str, np.ndarray | _Readable]] = []

    def spell(self, value: Any, where: str, depth: int = 0) -> bytes:
        """Raises TorchFileError, saying where, on anything that cannot be written or read again."""
        if depth > MAX_DEPTH:
            raise TorchFileError(f"{where}: nested more than {MAX_DEPTH} deep, or within itself")
        if value is None:
            return b"N"
        if isinstance(value, bool):
            return b"\x88" if value else b"\x89"
        if isinstance(value, int) and value.bit_length() < 255 * 8:
            return _integer(int(value))
        if isinstance(value, float):
            return b"G" + struct.pack(">d", value)
        if isinstance(value, str):
            return _text(value)
        if isinstance(value, Mapping):
            return self._dict(value, where, depth)
        if isinstance(value, list | tuple):
            items = [self.spell(v, f"{where}[{i}]", depth + 1) for i, v in enumerate(value)]
            return _tuple(items) if isinstance(value, tuple) else b"](" + b"".join(items) + b"e"
        if isinstance(value, argparse.Namespace):
            value = Record("argparse.Namespace", vars(value))
        if isinstance(value, Record) and value.name == "argparse.Namespace":
            return b"cargparse\nNamespace\n)\x81" + self._dict(value.fields, where, depth) + b"b"
        if isinstance(value, np.ndarray | _Readable):
            return self._array(value, where)
        raise TorchFileError(f"{where}: {type(value).__name__} cannot be written; {_WRITABLE}")

    def _dict(self, value: Mapping[Any, Any], where: str, depth: int) -> bytes:
        items = []
        for key, item in value.items():
            if not isinstance(key, str | int | float | None) or (
                isinstance(key, int) and key.bit_length() > 64
            ):
                raise TorchFileError(f"{where}: a key that is neither text nor a plain number")
            inner = f"{where}[{key!r}]"
            items += [self.spell(key, inner, depth + 1), self.spell(item, inner, depth + 1)]
        return b"}(" + b"".join(items) + b"u"

    def _array(self, array: np.ndarray | _Readable, where: str) -> bytes:
        storage = _STORAGE_NAMES.get(_little_endian(array.dtype))
        if storage is None:
            known = ", ".join(sorted(dtype.name for dtype in _STORAGE_NAMES))
            raise TorchFileError(f"{where}: dtype {array.dtype} cannot be written; one of {known}")
        key = str(len(self.arrays))
        self.arrays.append((where, array))
        shape = tuple(int(n) for n in array.shape)
        strides = [math.prod(max(n, 1) for n in shape[axis + 1 :]) for axis in range(len(shape))]
        reference = [
            _text("storage"),
            f"ctorch\n{storage}\n".encode(),
            _text(key),
            _text("cpu"),
            _integer(math.prod(shape)),
        ]
        return (
            b"ctorch._utils\n_rebuild_tensor_v2\n"
            + _tuple(
                [
                    _tuple(reference) + b"Q",
                    _integer(0),
                    _tuple([_integer(n) for n in shape]),
                    _tuple([_integer(n) for n in strides]),
                    b"\x89",
                    b"ccollections\nOrderedDict\n)R",
                ]
            )
            + b"R"
        )


def _little_endian(dtype: Any) -> np.dtype:
    dtype = np.dtype(dtype)
    return dtype.newbyteorder("<") if dtype.byteorder == ">" else dtype


def _array_bytes(array: np.ndarray | _Readable, where: str) -> np.ndarray:
    """The little-endian bytes of an array in C order, fetched if need be."""
    fetched = array if isinstance(array, np.ndarray) else array.read()
    if tuple(fetched.shape) != tuple(array.shape) or fetched.dtype != array.dtype:
        raise TorchFileError(
            f"{where}: read() gave {fetched.dtype}{list(fetched.shape)} for an array announced as"
            f" {array.dtype}{list(array.shape)}"
        )
    plain = np.ascontiguousarray(fetched, _little_endian(fetched.dtype))
    return plain.reshape(-1).view(np.uint8)


def _write_entry(archive: zipfile.ZipFile, file: BinaryIO, name: str, data: Any) -> None:
    """Adds an entry whose bytes begin at a multiple of 64, so that they can be mapped into memory."""
    info = zipfile.ZipInfo(name)
    size = len(data)
    zip64 = size >= _ZIP64_FROM
    begin = file.tell() + LOCAL_HEADER.size + len(name) + (20 if zip64 else 0)
    # The padding is an extra field of its own, of the same name as PyTorch's; it takes 4 bytes or more.
    padding = (-begin - 4) % _ALIGNMENT
    info.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    with archive.open(info, "w", force_zip64=zip64) as entry:
        entry.write(data)


def write_torch_file(path: str | Path, value: Any) -> None:
    """Writes a checkpoint as `torch.save` would, one array in memory at a time, atomically.

    Args:
      path: the file to write; a half-written one never carries this name.
      value: nested dict (any mapping), list and tuple of text, numbers, True, False and None,
        `argparse.Namespace` (or a `Record` of one), and arrays: numpy's, or objects with `.shape`,
        `.dtype` and `.read()` such as `TorchTensor`. Each becomes a contiguous CPU tensor that
        requires no gradient; dtypes are float64/32/16, bfloat16, int64/32/16/8, uint8, bool and
        complex128/64.

    Raises:
      TorchFileError: something that cannot be written, with its place in `value`.
    """
    path = Path(path)
    pickler = _Pickler()
    data = b"\x80\x02" + pickler.spell(value, "value") + b"."
    if len(data) > MAX_PICKLE or len(pickler.arrays) > MAX_ENTRIES - 3:
        raise TorchFileError(
            f"{path}: {len(pickler.arrays)} arrays described in {len(data)} bytes are too many for"
            f" one file (at most {MAX_ENTRIES - 3} in {MAX_PICKLE}): write several files"
        )
    stem = path.stem if re.fullmatch(r"\w[\w.-]*", path.stem, re.ASCII) else "archive"
    with (
        new_file(path) as partial,
        open(partial, "wb") as file,
        zipfile.ZipFile(file, "w") as archive,
    ):
        _write_entry(archive, file, f"{stem}/data.pkl", data)
        _write_entry(archive, file, f"{stem}/byteorder", b"little")
        for key, (where, array) in enumerate(pickler.arrays):
            _write_entry(archive, file, f"{stem}/data/{key}", _array_bytes(array, where))
        _write_entry(archive, file, f"{stem}/version", b"3\n")
