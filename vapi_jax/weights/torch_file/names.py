"""What the names in a checkpoint's pickle stand for, and nothing else may.

The table holds what state dicts, optimizer states, `argparse.Namespace` and numpy's numbers need.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from vapi_jax.weights import safe_pickle
from vapi_jax.weights.safe_pickle import Budget, GlobalName, NumpyDtype, Vocabulary
from vapi_jax.weights.torch_file.storage_file import MAX_DEPTH, StorageFile
from vapi_jax.weights.torch_file.tensors import (
    DTYPES,
    STORAGE_DTYPES,
    Storage,
    TorchTensor,
    are_sizes,
    make_tensor,
)

_MAX_ITEMS = 1_000_000


def _check_bare(hooks: Any, metadata: Any = None) -> None:
    for what, value in (("hooks", hooks), ("a conjugate or negative bit", metadata)):
        if value is not None and (type(value) is not dict or value):
            raise ValueError(f"a tensor with {what}")


def _rebuild_tensor(arguments: tuple[Any, ...], budget: Budget) -> TorchTensor:
    if len(arguments) != 4:
        raise ValueError(f"a tensor of {len(arguments)} parts, not 4")
    return make_tensor(*arguments)


def _rebuild_tensor_v2(arguments: tuple[Any, ...], budget: Budget) -> TorchTensor:
    if len(arguments) not in (6, 7):
        raise ValueError(f"a tensor of {len(arguments)} parts, not 6 or 7")
    _check_bare(*arguments[5:])
    return make_tensor(*arguments[:4])


def _rebuild_tensor_v3(arguments: tuple[Any, ...], budget: Budget) -> TorchTensor:
    if len(arguments) not in (7, 8):
        raise ValueError(f"a tensor of {len(arguments)} parts, not 7 or 8")
    _check_bare(arguments[5], *arguments[7:])
    storage, offset, shape, strides, _, _, dtype, *_ = arguments
    return make_tensor(storage, offset, shape, strides, dtype)


def _rebuild_parameter(arguments: tuple[Any, ...], budget: Budget) -> TorchTensor:
    """A parameter is its tensor; Python attributes, a fourth part, are left out."""
    if len(arguments) not in (3, 4) or type(arguments[0]) is not TorchTensor:
        raise ValueError("a parameter that is not made of a tensor, a flag and hooks")
    _check_bare(arguments[2])
    return arguments[0]


def _make_size(arguments: tuple[Any, ...], budget: Budget) -> tuple[int, ...]:
    if len(arguments) != 1 or not are_sizes(arguments[0]):
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


def find_storage(
    source: StorageFile,
    found: dict[str, Storage],
    room: Callable[[str], int],
    reference: Any,
    budget: Budget,
) -> Storage:
    """Resolves ("storage", class, key, device, number of elements).

    Args:
      source: the file to read the storage from.
      found: key -> storage, of those met before; the new one is added.
      room: name of a storage (`data/<key>`) -> how many bytes it may have; ValueError if none.
      reference: what the file says, of any type and content.
      budget: not touched, since nothing is made here.
    """
    if type(reference) is not tuple or len(reference) != 5 or reference[0] != "storage":
        raise ValueError("a persistent id that is not the five parts of a storage")
    _, cls, key, location, count = reference
    if not isinstance(cls, GlobalName) or cls.name not in STORAGE_DTYPES:
        raise ValueError("a storage whose class is not one of torch's")
    if type(key) is not str or not re.fullmatch("[0-9]{1,20}", key):
        raise ValueError("a storage whose key is not a number")
    if location == "meta":
        raise ValueError(f"storage {key} is on the meta device: the file does not hold its values")
    name = f"data/{key}"
    dtype, available = STORAGE_DTYPES[cls.name], room(name)
    if not are_sizes((count,)) or count * dtype.itemsize > available:
        raise ValueError(
            f"storage {key} claims more than the {available} bytes that can be its own"
        )
    storage = found.setdefault(key, Storage(source, name, dtype, count * dtype.itemsize))
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
        **dict.fromkeys([*DTYPES, *STORAGE_DTYPES]),
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


def interpret(
    data: bytes, source: StorageFile, what: str, persistent: Callable[[Any, Budget], Any]
) -> Any:
    """The object that a pickle describes, a tree at most 100 levels deep.

    Args:
      data: the pickle.
      source: the file it is from.
      what: what to call the pickle in errors.
      persistent: resolves the references to storages, as `find_storage` does.

    Raises:
      PickleRefused: damaged, or something that is not in the table.
      TorchFileError: too deep, too large when walked, or cyclic.
    """
    vocabulary = replace(_VOCABULARY, persistent=persistent)
    # Twice, because protocol 2 spells the bytes of a numpy array as text first.
    value = safe_pickle.loads(
        data, vocabulary, source=f"{source.path} ({what})", max_array_bytes=2 * len(data)
    )
    try:
        safe_pickle.check_tree(value, max_depth=MAX_DEPTH, max_items=max(_MAX_ITEMS, len(data)))
    except ValueError as error:
        raise source.error(f"the saved object is {error}") from error
    return value
