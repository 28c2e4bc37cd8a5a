"""PyTorch checkpoint files, read and written without PyTorch.

A checkpoint is a zip archive: `<stem>/data.pkl` is a pickle of the saved object, in which a tensor is
a shape, strides and an offset into a storage; `<stem>/data/<key>` holds the bytes of one storage.

Reading trusts neither part. The pickle is interpreted by `safe_pickle` with the table of names below
(what state dicts, optimizer states, `argparse.Namespace` and numpy's numbers need, and no more).
Every entry of the archive must be stored as it is, under a plain name, inside the file and apart
from all others; a tensor must lie inside its storage. All this is checked when a file is opened. The
bytes of a tensor are read when it is asked for: one tensor at a time is in memory, and what nobody
asks for (the state of an optimizer, say) is never read.

Writing makes what `torch.save` makes by default, the layout of published releases, readable by
`torch.load(path, weights_only=True)`, with `mmap=True` as well.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import re
import struct
import threading
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Protocol, runtime_checkable

import ml_dtypes
import numpy as np

from vapi_jax import safe_pickle
from vapi_jax.safe_pickle import Budget, GlobalName, NumpyDtype, Record, Vocabulary, quoted

__all__ = [
    "Record",
    "TorchFile",
    "TorchFileError",
    "TorchTensor",
    "open_torch_file",
    "write_torch_file",
]


class TorchFileError(ValueError):
    """A file that is no sound PyTorch checkpoint, or a value that cannot be put into one."""


# Generous: published checkpoints have below a thousand entries and a pickle below a megabyte.
_MAX_PICKLE = 16 * 2**20
_MAX_ENTRIES = 100_000
_MAX_DIRECTORY = 16 * 2**20
_MAX_DEPTH = 100
_MAX_ITEMS = 1_000_000
_MAX_AXES = 32
_BLOCK = 2**20

_STORAGES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
    "ComplexFloatStorage": np.dtype(np.complex64),
    "ComplexDoubleStorage": np.dtype(np.complex128),
}
# These have no storage class of their own: their bytes come in an UntypedStorage.
_UNTYPED = (np.dtype(np.uint16), np.dtype(np.uint32), np.dtype(np.uint64))
_DTYPES = {f"torch.{dtype.name}": dtype for dtype in (*_STORAGES.values(), *_UNTYPED)}
_STORAGE_DTYPES = {
    **{f"torch.{name}": dtype for name, dtype in _STORAGES.items()},
    "torch.storage.UntypedStorage": np.dtype(np.uint8),
}


# ---- The archive ----


@dataclass(frozen=True)
class _Entry:
    """Where the bytes of an entry lie in the file."""

    name: str
    offset: int
    size: int
    crc: int


class _File(io.FileIO):
    """A file of which `zipfile` cannot read any size that the file claims for its directory.

    Unbuffered, so that reading small parts of large entries costs no more than these parts.
    """

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and size > _MAX_DIRECTORY:
            raise zipfile.BadZipFile(f"it claims {size} bytes")
        return super().read(size)


_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_ENCRYPTED, _UTF8_NAME = 0x1, 0x800


class _Archive:
    """The checked directory of an open zip file, and the bytes of its entries.

    Attributes:
      entries: name without the common folder -> where it lies.
    """

    def __init__(self, path: Path, file: _File):
        self.path = path
        self._file = file
        # Seeking and reading are two steps: threads must not come between.
        self._lock = threading.Lock()
        self._intact: set[str] = set()
        self._check_format()
        self.entries = self._directory()

    def error(self, what: str) -> TorchFileError:
        return TorchFileError(f"{self.path}: {what}")

    def _fill(self, buffer: bytearray | memoryview, offset: int) -> int:
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

    def _check_format(self) -> None:
        """Names what a file is that does not begin as a zip archive does."""
        head = bytearray(512)
        head = head[: self._fill(head, 0)]
        if head.startswith(b"PK\3\4"):
            return
        if not head:
            raise self.error("the file is empty")
        for found, reason in _OTHER_FORMATS:
            if found(bytes(head)):
                raise self.error(reason)
        raise self.error("not a PyTorch checkpoint: it does not begin as a zip archive does")

    def _directory(self) -> dict[str, _Entry]:
        try:
            with zipfile.ZipFile(self._file) as archive:
                infos, end = archive.infolist(), archive.start_dir
        except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
            raise self.error(
                f"the zip directory at its end is missing or damaged ({error}), as after an"
                " incomplete download: fetch the file again"
            ) from error
        if len(infos) > _MAX_ENTRIES:
            raise self.error(f"{len(infos)} entries, at most {_MAX_ENTRIES} are read")
        names = [info.orig_filename for info in infos]
        if any(re.search(r"/(constants\.pkl$|code/)", name) for name in names):
            raise self.error(
                "a TorchScript program, not a checkpoint. In PyTorch, save its weights alone:"
                " torch.save(torch.jit.load(path).state_dict(), new_path)"
            )
        if not any(name.endswith("/data.pkl") for name in names):
            raise self.error("a zip archive without data.pkl: torch.save did not write it")
        stem = names[0].split("/")[0]
        entries: dict[str, _Entry] = {}
        start = 0
        for info in sorted(infos, key=lambda info: info.header_offset):
            entry = self._entry(info, stem, start, end)
            if entry.name in entries:
                raise self.error(f"two entries are named {quoted(info.orig_filename)}")
            entries[entry.name] = entry
            start = entry.offset + entry.size
        return entries

    def _entry(self, info: zipfile.ZipInfo, stem: str, start: int, end: int) -> _Entry:
        """Checks one entry, which has to lie between two byte positions of the file."""
        name = info.orig_filename
        what = f"entry {quoted(name)}"
        folder, *parts = name.split("/")
        plain = bool(parts) and not {"", ".", ".."} & {folder, *parts}
        if folder != stem or not plain or re.search(r"[\\\0]", name):
            raise self.error(f"{what} is not a plain name in the one folder of the archive")
        if info.flag_bits & _ENCRYPTED:
            raise self.error(f"{what} is encrypted: decrypt the file first")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise self.error(f"{what} is compressed, which torch.save never does")
        header = bytearray(_LOCAL_HEADER.size + len(name) * 4)
        offset = info.header_offset
        header = header[: self._fill(header, offset)] if start <= offset < end else bytearray()
        if len(header) < _LOCAL_HEADER.size:
            raise self.error(f"{what} overlaps another one or lies outside the file")
        signature, _, flags, method, *_, name_size, extra_size = _LOCAL_HEADER.unpack_from(header)
        encoded = name.encode("utf-8" if info.flag_bits & _UTF8_NAME else "cp437")
        if (
            signature != b"PK\3\4"
            or method != zipfile.ZIP_STORED
            or flags & _ENCRYPTED
            or header[_LOCAL_HEADER.size :][:name_size] != encoded
        ):
            raise self.error(f"{what} is described differently in the directory and in its place")
        offset += _LOCAL_HEADER.size + name_size + extra_size
        if offset + info.file_size > end:
            raise self.error(f"{what} runs past the end of the data: {info.file_size} bytes")
        return _Entry("/".join(parts), offset, info.file_size, info.CRC)

    def read(self, name: str, limit: int) -> bytes:
        """All bytes of an entry that may not be larger than `limit`."""
        entry = self.entries[name]
        if entry.size > limit:
            raise self.error(f"{name} has {entry.size} bytes, at most {limit} are read")
        buffer = np.empty(entry.size, np.uint8)
        self.read_into(entry, 0, buffer)
        return buffer.tobytes()

    def read_into(self, entry: _Entry, start: int, out: np.ndarray) -> None:
        """Fills `out` (uint8, contiguous) from byte `start` of an entry.

        The first read checks the entry's CRC-32, for which a part needs a pass over the whole.
        """
        whole = (start, out.size) == (0, entry.size)
        if not whole and entry.name not in self._intact:
            crc, block = 0, np.empty(_BLOCK, np.uint8)
            for position in range(0, entry.size, _BLOCK):
                part = block[: entry.size - position]
                self._read_exactly(entry, position, part)
                crc = zlib.crc32(part.data, crc)
            self._check_crc(entry, crc)
        self._read_exactly(entry, start, out)
        if whole:
            self._check_crc(entry, zlib.crc32(out.data))

    def _read_exactly(self, entry: _Entry, start: int, out: np.ndarray) -> None:
        if self._fill(out.data, entry.offset + start) != out.size:
            raise self.error(f"{entry.name} ended early: the file was changed while it was open")

    def _check_crc(self, entry: _Entry, crc: int) -> None:
        # torch.save can be told not to compute these, and then writes 0 everywhere.
        if entry.crc not in (0, crc):
            raise self.error(
                f"{entry.name} is damaged: its CRC-32 is {crc:08x}, the archive says"
                f" {entry.crc:08x}. Fetch the file again"
            )
        self._intact.add(entry.name)


_RESAVE = (
    "re-save it with a recent PyTorch:"
    " torch.save(torch.load(path, weights_only=True), new_path), or convert it to safetensors"
)
_OTHER_FORMATS: tuple[tuple[Callable[[bytes], bool], str], ...] = (
    (
        lambda head: head.startswith(b"\x80") and b"\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8" in head[:24],
        f"a checkpoint in the format before PyTorch 1.6, which is a plain pickle: {_RESAVE}",
    ),
    (
        lambda head: head[257:262] == b"ustar",
        f"a tar archive, perhaps a checkpoint by PyTorch 0.1: {_RESAVE}",
    ),
    (lambda head: head.startswith(b"\x80"), f"a bare pickle, not a PyTorch checkpoint: {_RESAVE}"),
    (lambda head: head[8:9] == b"{", "a safetensors file: give it where safetensors are read"),
    (
        lambda head: head.startswith(b"version https://git-lfs"),
        "a pointer of Git LFS, not the file itself: run `git lfs pull` or download the file",
    ),
    (
        lambda head: head.lstrip()[:1] == b"<",
        "a web page, not a checkpoint: the download link led to a page. Download the file itself",
    ),
)


# ---- The tensors ----


@dataclass(frozen=True)
class _Storage:
    archive: _Archive
    entry: _Entry
    dtype: np.dtype
    nbytes: int


@dataclass(frozen=True, eq=False)
class TorchTensor:
    """A tensor in an open file, not read yet.

    Attributes:
      shape: its sizes.
      dtype: its element type, little-endian; `ml_dtypes.bfloat16` for bfloat16.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    _storage: _Storage = field(repr=False)
    _offset: int = field(repr=False)
    _last: int = field(repr=False)
    _strides: tuple[int, ...] = field(repr=False)

    @property
    def nbytes(self) -> int:
        """The size of what `read` returns."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """The elements, in contiguous memory of their own.

        Only the stretch of the storage from the tensor's first element to its last is kept in
        memory, and copied if the tensor is not contiguous in it. (The first reading of a part of a
        storage passes over the whole in small blocks, to check it.)

        Raises:
          TorchFileError: the bytes are damaged, or the file was closed.
        """
        out = np.empty(self.shape, self.dtype)
        if out.size == 0:
            return out
        # An axis of one element has a stride that means nothing.
        strides = [
            stride * self.dtype.itemsize if n > 1 else natural
            for n, stride, natural in zip(self.shape, self._strides, out.strides, strict=True)
        ]
        contiguous = tuple(strides) == out.strides
        span = out.size if contiguous else self._last + 1 - self._offset
        stretch = out.reshape(-1) if contiguous else np.empty(span, self.dtype)
        start = self._offset * self.dtype.itemsize
        self._storage.archive.read_into(self._storage.entry, start, stretch.view(np.uint8))
        if not contiguous:
            out[...] = np.lib.stride_tricks.as_strided(stretch, self.shape, strides)
        return out


def _are_sizes(value: Any) -> bool:
    return (
        type(value) is tuple
        and len(value) <= _MAX_AXES
        and all(type(n) is int and 0 <= n < 2**63 for n in value)
    )


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, dtype: Any = None) -> TorchTensor:
    """A tensor that lies inside its storage; `dtype` is a torch dtype where the storage has none."""
    if type(storage) is not _Storage:
        raise TypeError("a tensor without a storage")
    if not (_are_sizes(shape) and _are_sizes(strides) and _are_sizes((offset,))):
        raise ValueError(
            "the shape, strides or offset of a tensor are not whole numbers from 0 on,"
            f" or there are more than {_MAX_AXES} axes"
        )
    if len(shape) != len(strides):
        raise ValueError(f"a tensor of {len(shape)} axes has {len(strides)} strides")
    kind = storage.dtype
    if dtype is not None:
        if not isinstance(dtype, GlobalName) or dtype.name not in _DTYPES:
            raise ValueError("a tensor whose dtype is not a torch dtype")
        kind = _DTYPES[dtype.name]
    # Python integers: neither product can overflow, however large the sizes claim to be.
    count, available = math.prod(shape), storage.nbytes // kind.itemsize
    if count > available:
        raise ValueError(
            f"a tensor of shape {shape} in a storage of {available} elements (if it was expanded,"
            " save its .contiguous() copy)"
        )
    if math.prod(max(n, 1) for n in shape) * kind.itemsize >= 2**62:
        raise ValueError(f"a tensor of shape {shape}, too large for any array")
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if count and last >= available:
        raise ValueError(
            f"a tensor of shape {shape}, strides {strides} and offset {offset} ends at element"
            f" {last} of a storage of {available}"
        )
    return TorchTensor(shape, kind, storage, offset, last, strides)


# ---- The names in the pickle ----


def _check_bare(hooks: Any, metadata: Any = None) -> None:
    for what, value in (("hooks", hooks), ("a conjugate or negative bit", metadata)):
        if value is not None and (type(value) is not dict or value):
            raise ValueError(f"a tensor with {what}")


def _rebuild_tensor(arguments: tuple[Any, ...], budget: Budget) -> TorchTensor:
    if len(arguments) != 4:
        raise ValueError(f"a tensor of {len(arguments)} parts, not 4")
    return _tensor(*arguments)


def _rebuild_tensor_v2(arguments: tuple[Any, ...], budget: Budget) -> TorchTensor:
    if len(arguments) not in (6, 7):
        raise ValueError(f"a tensor of {len(arguments)} parts, not 6 or 7")
    _check_bare(*arguments[5:])
    return _tensor(*arguments[:4])


def _rebuild_tensor_v3(arguments: tuple[Any, ...], budget: Budget) -> TorchTensor:
    if len(arguments) not in (7, 8):
        raise ValueError(f"a tensor of {len(arguments)} parts, not 7 or 8")
    _check_bare(arguments[5], *arguments[7:])
    storage, offset, shape, strides, _, _, dtype, *_ = arguments
    return _tensor(storage, offset, shape, strides, dtype)


def _rebuild_parameter(arguments: tuple[Any, ...], budget: Budget) -> TorchTensor:
    """A parameter is its tensor; Python attributes, a fourth part, are left out."""
    if len(arguments) not in (3, 4) or type(arguments[0]) is not TorchTensor:
        raise ValueError("a parameter that is not made of a tensor, a flag and hooks")
    _check_bare(arguments[2])
    return arguments[0]


def _make_size(arguments: tuple[Any, ...], budget: Budget) -> tuple[int, ...]:
    if len(arguments) != 1 or not _are_sizes(arguments[0]):
        raise ValueError("a torch.Size that is not a tuple of sizes")
    return arguments[0]


def _make_device(arguments: tuple[Any, ...], budget: Budget) -> str:
    kind, *index = arguments or (None,)
    if type(kind) is not str or not re.fullmatch("[a-z]{1,20}", kind):
        raise ValueError("a torch.device without a plain type")
    if index and not (len(index) == 1 and type(index[0]) is int and 0 <= index[0] < 2**16):
        raise ValueError("a torch.device whose index is not a small number")
    return f"{kind}:{index[0]}" if index else kind


def _make_ordered_dict(arguments: tuple[Any, ...], budget: Budget) -> dict[Any, Any]:
    if arguments:
        raise ValueError("an OrderedDict made with arguments")
    return {}


def _drop_metadata(target: dict[Any, Any], state: Any, budget: Budget) -> None:
    """A state dict carries the versions of its modules as an attribute: nothing here reads it."""
    if type(state) is not dict or list(state) != ["_metadata"]:
        raise ValueError("attributes of an OrderedDict other than _metadata")


def _make_set(arguments: tuple[Any, ...], budget: Budget) -> set[Any]:
    if len(arguments) != 1 or type(arguments[0]) is not list:
        raise ValueError("a set that is not made of a list")
    budget.spend(len(arguments[0]))
    for item in arguments[0]:
        safe_pickle.check_key(item)
    return set(arguments[0])


def _encode(arguments: tuple[Any, ...], budget: Budget) -> bytes:
    """How protocol 2 spells bytes: as the latin-1 encoding of a text."""
    if len(arguments) != 2 or type(arguments[0]) is not str or arguments[1] != "latin1":
        raise ValueError("_codecs.encode of something other than text into latin1")
    budget.spend(len(arguments[0]))
    return arguments[0].encode("latin1")


def _make_bytes(arguments: tuple[Any, ...], budget: Budget) -> bytes:
    if arguments:
        raise ValueError("bytes made with arguments")
    return b""


def _make_scalar(arguments: tuple[Any, ...], budget: Budget) -> np.generic:
    if [type(argument) for argument in arguments] != [NumpyDtype, bytes]:
        raise ValueError("a numpy scalar that is not made of a dtype and bytes")
    kind = np.dtype(arguments[0].order + arguments[0].code)
    if len(arguments[1]) != kind.itemsize:
        raise ValueError(f"a numpy scalar of {len(arguments[1])} bytes, not {kind.itemsize}")
    return np.frombuffer(arguments[1], kind)[0]


def _find_storage(
    archive: _Archive, found: dict[str, _Storage], reference: Any, budget: Budget
) -> _Storage:
    """Resolves ("storage", class, key, device, number of elements)."""
    if type(reference) is not tuple or len(reference) != 5 or reference[0] != "storage":
        raise ValueError("a persistent id that is not the five parts of a storage")
    _, cls, key, location, count = reference
    if not isinstance(cls, GlobalName) or cls.name not in _STORAGE_DTYPES:
        raise ValueError("a storage whose class is not one of torch's")
    if type(key) is not str or not re.fullmatch("[0-9]{1,20}", key):
        raise ValueError("a storage whose key is not a number")
    if location == "meta":
        raise ValueError(f"storage {key} is on the meta device: the file does not hold its values")
    entry = archive.entries.get(f"data/{key}")
    if entry is None:
        raise ValueError(f"storage {key}: the archive has no entry data/{key}")
    dtype = _STORAGE_DTYPES[cls.name]
    if not _are_sizes((count,)) or count * dtype.itemsize > entry.size:
        raise ValueError(f"storage {key} claims more than the {entry.size} bytes of its entry")
    storage = found.setdefault(key, _Storage(archive, entry, dtype, count * dtype.itemsize))
    if (storage.dtype, storage.nbytes) != (dtype, count * dtype.itemsize):
        raise ValueError(f"storage {key} is described in two ways")
    return storage


_SPARSE = "sparse tensors are not read: save their .to_dense()"
_QUANTIZED = "quantized tensors are not read: save their .dequantize()"
_META = "tensors on the meta device have no values to read"
_VOCABULARY = Vocabulary(
    globals={
        **safe_pickle.NUMPY.globals,
        "numpy.core.multiarray.scalar": _make_scalar,
        "numpy._core.multiarray.scalar": _make_scalar,
        "_codecs.encode": _encode,
        "__builtin__.bytes": _make_bytes,
        "__builtin__.set": _make_set,
        "builtins.set": _make_set,
        "collections.OrderedDict": _make_ordered_dict,
        "torch._utils._rebuild_tensor": _rebuild_tensor,
        "torch._utils._rebuild_tensor_v2": _rebuild_tensor_v2,
        "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
        "torch._utils._rebuild_parameter": _rebuild_parameter,
        "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
        "torch.Size": _make_size,
        "torch.device": _make_device,
        **dict.fromkeys([*_DTYPES, *_STORAGE_DTYPES]),
    },
    builders={**safe_pickle.NUMPY.builders, dict: _drop_metadata},
    results=(TorchTensor, GlobalName, NumpyDtype, np.ndarray, np.generic, set),
    classes=frozenset({"argparse.Namespace"}),
    reasons={
        "torch._utils._rebuild_sparse_tensor": _SPARSE,
        "torch._utils._rebuild_qtensor": _QUANTIZED,
        "torch._utils._rebuild_meta_tensor_no_storage": _META,
        "torch._tensor._rebuild_from_type_v2": (
            "tensors of other classes or with attributes are not read: save their .detach().clone()"
        ),
    },
)


# ---- Reading ----


class TorchFile:
    """An open checkpoint; a context manager that closes it.

    Attributes:
      path: where it lies.
      value: the saved object: dict (also for OrderedDict), list, tuple (also for torch.Size), set,
        text, bytes, numbers, None; a `TorchTensor` for each tensor and parameter; a `Record` for an
        argparse.Namespace; numpy arrays and scalars; "cuda:0" for a torch.device; and, inert,
        `GlobalName("torch.float32")` or `NumpyDtype` for a dtype. It is a tree at most 100 levels
        deep, safe to walk by recursion.
    """

    def __init__(self, path: Path, file: _File):
        self.path = path
        self._file = file
        archive = _Archive(path, file)
        if "byteorder" in archive.entries:
            order = archive.read("byteorder", 16)
            if order != b"little":
                raise archive.error(
                    f"its byte order is {quoted(order.decode('latin1'))}, only 'little' is read:"
                    " re-save it on a little-endian machine"
                )
        if "data.pkl" not in archive.entries:
            raise archive.error("data.pkl is not at the top of the archive's folder")
        data = archive.read("data.pkl", _MAX_PICKLE)
        vocabulary = replace(_VOCABULARY, persistent=partial(_find_storage, archive, {}))
        # Twice, because protocol 2 spells the bytes of a numpy array as text first.
        self.value = safe_pickle.loads(
            data, vocabulary, source=f"{path} (data.pkl)", max_array_bytes=2 * len(data)
        )
        try:
            safe_pickle.check_tree(
                self.value, max_depth=_MAX_DEPTH, max_items=max(_MAX_ITEMS, len(data))
            )
        except ValueError as error:
            raise archive.error(f"the saved object is {error}") from error

    def close(self) -> None:
        """Closes the file; its tensors can no longer be read."""
        self._file.close()

    def __enter__(self) -> TorchFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def open_torch_file(path: str | Path) -> TorchFile:
    """Opens what `torch.save` of PyTorch 1.6 or later wrote, and checks all of it but the numbers.

    Raises:
      TorchFileError: no such file, another format (which is named), or a damaged, inconsistent or
        malicious archive.
      PickleRefused: an object in the file that is not on the list; nothing was executed.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise TorchFileError(f"{path}: not a regular file")
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(_File(path))
        except OSError as error:
            raise TorchFileError(f"{path}: cannot be opened: {error.strerror}") from error
        opened = TorchFile(path, file)
        stack.pop_all()
        return opened


# ---- Writing ----


@runtime_checkable
class _Readable(Protocol):
    """An array that is fetched when it is needed, such as `TorchTensor`."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def read(self) -> np.ndarray: ...


_STORAGE_NAMES = {dtype: name for name, dtype in _STORAGES.items()}
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
        if depth > _MAX_DEPTH:
            raise TorchFileError(f"{where}: nested more than {_MAX_DEPTH} deep, or within itself")
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
    begin = file.tell() + _LOCAL_HEADER.size + len(name) + (20 if zip64 else 0)
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
    if len(data) > _MAX_PICKLE or len(pickler.arrays) > _MAX_ENTRIES - 3:
        raise TorchFileError(
            f"{path}: {len(pickler.arrays)} arrays described in {len(data)} bytes are too many for"
            f" one file (at most {_MAX_ENTRIES - 3} in {_MAX_PICKLE}): write several files"
        )
    stem = path.stem if re.fullmatch(r"\w[\w.-]*", path.stem, re.ASCII) else "archive"
    partial_path = path.with_name(path.name + ".partial")
    try:
        with open(partial_path, "wb") as file, zipfile.ZipFile(file, "w") as archive:
            _write_entry(archive, file, f"{stem}/data.pkl", data)
            _write_entry(archive, file, f"{stem}/byteorder", b"little")
            for key, (where, array) in enumerate(pickler.arrays):
                _write_entry(archive, file, f"{stem}/data/{key}", _array_bytes(array, where))
            _write_entry(archive, file, f"{stem}/version", b"3\n")
        partial_path.replace(path)
    except BaseException:
        partial_path.unlink(missing_ok=True)
        raise
