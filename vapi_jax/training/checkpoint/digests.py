"""Digests of arrays that may be spread over devices and processes: taken at a save, compared at a restore.

At a save each process copies the parts of arrays that it holds and hashes them in the background; the
manifest they make is one more item of the orbax save, so that it is committed by the same rename.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from vapi_jax.parallel.sharding import host_array
from vapi_jax.training.checkpoint.manifest import (
    ArrayFacts,
    Block,
    Manifest,
    array_digest,
    part_name,
    read_manifest,
    write_part,
)

Part = tuple[tuple[int, ...], np.ndarray]
"""Where a part of an array begins, and its values on this host."""


def dtype_of(leaf: Any) -> Any:
    """The dtype of an array, or of what numpy makes of a value."""
    return leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype


def described(leaf: Any) -> str:
    """ "float32 [2, 3]", of an array, a ShapeDtypeStruct or the facts in a manifest."""
    shape = leaf.shape if hasattr(leaf, "shape") else np.shape(leaf)
    return f"{dtype_of(leaf)} {list(shape)}"


# --- at a save ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Copied:
    """An array as it was at the moment of the save: the parts that this process vouches for."""

    shape: tuple[int, ...]
    dtype: str
    parts: tuple[Part, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the parts that this process vouches for."""
        return sum(host.nbytes for _, host in self.parts)


def copied(leaf: Any) -> Copied:
    """Takes hold of what this process vouches for: all of an array where one process can."""
    return Copied(tuple(np.shape(leaf)), str(dtype_of(leaf)), tuple(_vouched_for(leaf)))


def _vouched_for(leaf: Any) -> list[Part]:
    if not isinstance(leaf, jax.Array):
        return [((0,) * np.ndim(leaf), np.array(leaf))] if jax.process_index() == 0 else []
    # Where NumPy holds on to a buffer, a step that is given the array takes another one for itself.
    if leaf.is_fully_addressable or leaf.is_fully_replicated:
        return [((0,) * leaf.ndim, host_array(leaf))] if jax.process_index() == 0 else []
    return [
        (_start(shard.index), np.asarray(shard.data))
        for shard in leaf.addressable_shards
        if shard.replica_id == 0
    ]


def _start(index: tuple[slice, ...]) -> tuple[int, ...]:
    return tuple(part.start or 0 for part in index)


def _block(part: Part) -> Block:
    start, host = part
    return Block(start, host.shape, array_digest(host))


class ManifestHandler(ocp.AsyncCheckpointHandler):
    """Hashes and writes a manifest beside orbax's own writing, inside the same commit."""

    async def async_save(self, directory: Any, args: ManifestSave) -> list[Any]:
        work = _write(directory, args)
        return [ocp.future.CommitFutureAwaitingContractedSignals(work, name="manifest")]

    def save(self, directory: Any, args: ManifestSave) -> None:
        for future in asyncio.run(self.async_save(directory, args)):
            future.result()

    def restore(self, directory: Any, args: ManifestRestore | None = None) -> Manifest:
        del args
        return read_manifest(Path(directory).parent)


@ocp.args.register_with_handler(ManifestHandler, for_save=True)
@dataclasses.dataclass
class ManifestSave(ocp.args.CheckpointArgs):
    """What the manifest of a step is made of: `Manifest` with its arrays not yet hashed."""

    step: int
    saved: str
    arrays: Mapping[str, Copied]
    facts: Mapping[str, str]


@ocp.args.register_with_handler(ManifestHandler, for_restore=True)
@dataclasses.dataclass
class ManifestRestore(ocp.args.CheckpointArgs):
    """Orbax wants the pair."""


async def _write(directory: Any, args: ManifestSave) -> None:
    # hashlib lets other threads run; half of the cores are left to the training.
    workers = max(1, min(8, (os.cpu_count() or 1) // 2))
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        parts = itertools.chain.from_iterable(array.parts for array in args.arrays.values())
        blocks = pool.map(_block, parts)  # of all arrays beside one another
        arrays = {
            name: ArrayFacts(one.shape, one.dtype, tuple(itertools.islice(blocks, len(one.parts))))
            for name, one in args.arrays.items()
        }
    path = Path(directory) / part_name(jax.process_index())
    manifest = Manifest(args.step, args.saved, arrays, args.facts)
    write_part(path, jax.process_index(), jax.process_count(), manifest)


# --- at a restore ---------------------------------------------------------------------------------


def wrong_arrays(leaves: Mapping[str, Any], arrays: Mapping[str, ArrayFacts]) -> list[str]:
    """Names of the arrays that are not what the manifest says. A collective across processes."""
    wrong: list[str] = []
    seen: dict[str, list[int]] = {}

    def compared(name: str) -> tuple[list[int], bool]:
        return _compare(_parts_here(leaves[name]), arrays[name].blocks)

    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for name, (seen[name], right) in zip(leaves, pool.map(compared, leaves), strict=True):
            if not right or described(leaves[name]) != described(arrays[name]):
                wrong.append(name)
    if jax.process_count() == 1:
        return wrong
    everybody = [json.loads(text) for text in gather_text(json.dumps([wrong, seen]))]
    wrong = sorted({name for found, _ in everybody for name in found})
    for name, leaf in leaves.items():
        checked = {number for _, numbers in everybody for number in numbers[name]}
        if len(checked) < len(arrays[name].blocks) and name not in wrong:
            # Saved in other parts than it was restored in: no process holds such a part whole.
            whole = [((0,) * np.ndim(leaf), host_array(leaf))]
            if not _compare(whole, arrays[name].blocks)[1]:
                wrong.append(name)
    return wrong


def _parts_here(leaf: Any) -> list[Part]:
    """The parts of an array that this process can see."""
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
        return [((0,) * np.ndim(leaf), host_array(leaf))]
    return [(_start(s.index), np.asarray(s.data)) for s in leaf.addressable_shards]


def _compare(parts: list[Part], blocks: Sequence[Block]) -> tuple[list[int], bool]:
    """The blocks that lie within one of the parts, and whether all of those have their digest."""
    seen, right = [], True
    for number, block in enumerate(blocks):
        for start, host in parts:
            offsets = [b - s for b, s in zip(block.start, start, strict=True)]
            ends = [o + n for o, n in zip(offsets, block.shape, strict=True)]
            if all(o >= 0 and e <= n for o, e, n in zip(offsets, ends, host.shape, strict=True)):
                inside = host[tuple(slice(o, e) for o, e in zip(offsets, ends, strict=True))]
                right = right and array_digest(inside) == block.sha256
                seen.append(number)
                break
    return seen, right


def gather_text(text: str) -> list[str]:
    """The text of every process, in order of process. A collective across processes."""
    if jax.process_count() == 1:
        return [text]
    value = text.encode()
    length = int(multihost_utils.process_allgather(np.int64(len(value))).max())
    # Trailing zeros: JSON text and messages hold none, so they can be cut off again.
    padded = np.frombuffer(value.ljust(max(length, 1), b"\0"), np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [row.tobytes().rstrip(b"\0").decode() for row in rows]
