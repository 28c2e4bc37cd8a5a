"""Tensors of an open file: shape, strides and a place in a storage, read when they are asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

from vapi_jax.weights.safe_pickle import GlobalName
from vapi_jax.weights.torch_file.storage_file import StorageFile

_MAX_AXES = 32

STORAGES = {
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
DTYPES = {f"torch.{dtype.name}": dtype for dtype in (*STORAGES.values(), *_UNTYPED)}
STORAGE_DTYPES = {
    **{f"torch.{name}": dtype for name, dtype in STORAGES.items()},
    "torch.storage.UntypedStorage": np.dtype(np.uint8),
}


@dataclass(frozen=True)
class Storage:
    """What the pickle says of a storage; where its bytes lie is looked up when they are read."""

    source: StorageFile
    name: str
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
    _storage: Storage = field(repr=False)
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
        memory, and copied if the tensor is not contiguous in it. (Where the file has checksums, the
        first reading of a part of a storage passes over the whole in small blocks, to check it.)

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
        self._storage.source.read_into(self._storage.name, start, stretch.view(np.uint8))
        if not contiguous:
            out[...] = np.lib.stride_tricks.as_strided(stretch, self.shape, strides)
        return out


def are_sizes(value: Any) -> bool:
    """Whether a value from a file is a tuple of at most 32 whole numbers in [0, 2**63)."""
    return (
        type(value) is tuple
        and len(value) <= _MAX_AXES
        and all(type(n) is int and 0 <= n < 2**63 for n in value)
    )


def make_tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, dtype: Any = None
) -> TorchTensor:
    """A tensor that lies inside its storage; `dtype` is a torch dtype where the storage has none."""
    if type(storage) is not Storage:
        raise TypeError("a tensor without a storage")
    if not (are_sizes(shape) and are_sizes(strides) and are_sizes((offset,))):
        raise ValueError(
            "the shape, strides or offset of a tensor are not whole numbers from 0 on,"
            f" or there are more than {_MAX_AXES} axes"
        )
    if len(shape) != len(strides):
        raise ValueError(f"a tensor of {len(shape)} axes has {len(strides)} strides")
    kind = storage.dtype
    if dtype is not None:
        if not isinstance(dtype, GlobalName) or dtype.name not in DTYPES:
            raise ValueError("a tensor whose dtype is not a torch dtype")
        kind = DTYPES[dtype.name]
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
