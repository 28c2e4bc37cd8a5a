"""The format before PyTorch 1.6, in which some well-known files are still published.

Five pickles follow one another: a magic number, the protocol, facts about the machine, the saved
object, and a list of storage keys. Then each storage of that list comes as an int64 count and its
elements. A tensor refers to its storage by a key; only what the object says of that storage (its
class and count) tells how many bytes to expect.

So the object is interpreted first, by the same table of names as that of any checkpoint, and the
storages must then fill the file exactly. The format has no checksums: damage to the elements
themselves goes unnoticed here. Whoever knows a digest of the file should compare it.
"""

from __future__ import annotations

import io
import os
import pickletools
from functools import partial
from pathlib import Path
from typing import Any

from vapi_jax.weights import safe_pickle
from vapi_jax.weights.safe_pickle import Budget, Vocabulary
from vapi_jax.weights.torch_file.names import find_storage, interpret
from vapi_jax.weights.torch_file.storage_file import (
    MAX_ENTRIES,
    MAX_PICKLE,
    Entry,
    File,
    StorageFile,
)
from vapi_jax.weights.torch_file.tensors import Storage

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_PICKLES = ("magic number", "protocol", "machine", "saved object", "storage keys")
_NO_NAMES = Vocabulary(globals={})
_COUNT_SIZE = 8
_FIRST_LOOK = 2**16


def read_legacy(path: Path, file: File) -> Any:
    """The saved object of a file in this format, its tensors not read yet.

    Raises:
      TorchFileError: damaged or cut off, of another protocol or byte order, or with storages that
        are not those of the object or do not fill the file.
      PickleRefused: an object in the file that is not on the list; nothing was executed.
    """
    source = StorageFile(path, file)
    size = os.fstat(file.fileno()).st_size
    pickles, end = _split(source)
    magic, protocol, machine, keys = (
        safe_pickle.loads(pickles[what], _NO_NAMES, source=f"{path} ({what})")
        for what in _PICKLES
        if what != "saved object"
    )
    if magic != _MAGIC or protocol != _PROTOCOL:
        raise source.error(
            f"its magic number or protocol is not that of PyTorch's format before 1.6 ({_PROTOCOL})"
        )
    if type(machine) is not dict or machine.get("little_endian") is not True:
        raise source.error(
            "not from a little-endian machine, as files that are read have to be: re-save it on one"
        )
    found: dict[str, Storage] = {}
    value = interpret(
        pickles["saved object"], source, "saved object", partial(_find, source, found, size)
    )
    _place(source, found, keys, end, size)
    return value


def _split(source: StorageFile) -> tuple[dict[str, bytes], int]:
    """The five pickles by name, and where the last one ends; they are decoded, not interpreted."""
    size = _FIRST_LOOK
    while True:
        head = source.head(size)
        stream, pickles, what = io.BytesIO(head), {}, ""
        try:
            for what in _PICKLES:
                start = stream.tell()
                for _ in pickletools.genops(stream):
                    pass
                pickles[what] = head[start : stream.tell()]
            return pickles, stream.tell()
        # Decoding may warn of odd escapes, which is an error where the user made warnings errors.
        except (ValueError, TypeError, Warning) as error:
            # How long the pickles are is known only at their end: perhaps it lies further on.
            if len(head) == size < MAX_PICKLE:
                size *= 4
                continue
            raise source.error(
                f"its pickle of the {what} is damaged, cut off (as after an incomplete download:"
                f" fetch the file again) or does not end within {MAX_PICKLE} bytes"
            ) from error


def _find(
    source: StorageFile, found: dict[str, Storage], size: int, reference: Any, budget: Budget
) -> Storage:
    """`find_storage` of a reference with a sixth part, in a file of `size` bytes."""
    if type(reference) is not tuple or len(reference) != 6:
        raise ValueError("a persistent id that is not the six parts of a storage")
    if reference[5] is not None:
        raise ValueError("a storage that is a view of another, as only PyTorch 0.1 made them")
    return find_storage(source, found, lambda name: size, reference[:5], budget)


def _place(source: StorageFile, found: dict[str, Storage], keys: Any, end: int, size: int) -> None:
    """Finds where the storages lie, which have to fill the file from byte `end` to byte `size`."""
    if type(keys) is not list or not all(type(key) is str for key in keys):
        raise source.error("its list of storage keys is not a list of texts")
    if len(keys) > MAX_ENTRIES:
        raise source.error(f"{len(keys)} storages, at most {MAX_ENTRIES} are read")
    if sorted(keys) != sorted(found):
        raise source.error("its list of storage keys does not name those of the saved object once")
    for key in keys:
        storage, stated = found[key], bytearray(_COUNT_SIZE)
        entry = Entry(storage.name, end + _COUNT_SIZE, storage.nbytes)
        if entry.offset + entry.size > size:
            raise source.error(
                f"it ends within storage {key}, as after an incomplete download: fetch it again"
            )
        source.fill(stated, end)
        count, expected = int.from_bytes(stated, "little"), storage.nbytes // storage.dtype.itemsize
        if count != expected:
            raise source.error(
                f"storage {key} has {count} elements, {expected} in the saved object"
            )
        end = entry.offset + entry.size
        source.entries[entry.name] = entry
    if end != size:
        raise source.error(
            f"{size - end} bytes follow its last storage, which torch.save never adds"
        )
