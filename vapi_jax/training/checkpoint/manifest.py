"""What a checkpoint must hold, written beside it: shape, dtype and SHA-256 of every array.

Each process vouches for the parts of arrays that it holds, in a file of its own
(`STEP/manifest/process_0.json`), so that nothing is gathered across processes to be hashed. A file
carries a digest of itself: a flipped byte in it is damage too, never another model.

Nothing here needs JAX.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vapi_jax.common.errors import ExpectedError
from vapi_jax.common.files import read_json
from vapi_jax.parallel.sharding import host_array

MANIFEST = "manifest"


class ManifestError(ExpectedError, ValueError):
    """A manifest that is missing, damaged or incomplete; names the file."""


@dataclasses.dataclass(frozen=True)
class Block:
    """A rectangular part of an array: where it begins, how far it goes, and its bytes' digest."""

    start: tuple[int, ...]
    shape: tuple[int, ...]
    sha256: str


@dataclasses.dataclass(frozen=True)
class ArrayFacts:
    """What an array must look like. Its blocks cover every element."""

    shape: tuple[int, ...]
    dtype: str
    blocks: tuple[Block, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        size = 2 if self.dtype == "bfloat16" else np.dtype(self.dtype).itemsize
        return math.prod(self.shape) * size


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The manifest of one step.

    Attributes:
      step: the training step.
      saved: when, ISO 8601 in UTC; for people, nothing is decided by it.
      arrays: "item/path/in/the/tree" -> what is there.
      facts: item -> SHA-256 of its JSON text.
    """

    step: int
    saved: str
    arrays: Mapping[str, ArrayFacts]
    facts: Mapping[str, str]

    @property
    def items(self) -> tuple[str, ...]:
        """The names of all items."""
        found = dict.fromkeys(name.split("/")[0] for name in self.arrays)
        return (*found, *self.facts)

    @property
    def digest(self) -> str:
        """SHA-256 over names, shapes, dtypes and bytes of all arrays.

        The same for the same values, whatever the mesh they were saved from, as long as one process
        held each array whole (any run of one process); parts saved by several processes are hashed
        part by part.
        """
        lines = [
            f"{name} {facts.dtype} {list(facts.shape)} {block.start} {block.shape} {block.sha256}\n"
            for name, facts in sorted(self.arrays.items())
            for block in sorted(facts.blocks, key=lambda block: block.start)
        ]
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def array_digest(leaf: Any) -> str:
    """SHA-256 of an array's bytes in C order: independent of its sharding.

    Takes NumPy and JAX arrays. For arrays split over processes it is a collective.
    """
    if not isinstance(leaf, np.ndarray):
        leaf = host_array(leaf)
    return hashlib.sha256(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data).hexdigest()


def facts_digest(value: Any) -> str:
    """SHA-256 of a JSON-able value, the same before and after a trip through a file."""
    return _text_digest(json.loads(json.dumps(value)))


def _text_digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_part(path: Path, process: int, processes: int, manifest: Manifest) -> None:
    """Writes what one process vouches for.

    Args:
      path: the file, named by `part_name`.
      process, processes: which of how many files this is.
      manifest: blocks may cover a part of the arrays only.
    """
    body = {"process": process, "processes": processes, **dataclasses.asdict(manifest)}
    text = json.dumps({"sha256": facts_digest(body), "manifest": body})
    path.write_text(text, encoding="utf-8")


def part_name(process: int) -> str:
    """The file name of a process's part."""
    return f"process_{process}.json"


def read_manifest(step_directory: Path) -> Manifest:
    """The manifest of a step, put together from the parts of all processes.

    Raises:
      ManifestError: naming the file that is missing, damaged or incomplete.
    """
    folder = step_directory / MANIFEST
    first, processes = _read_part(folder / part_name(0))
    parts = [first] + [_read_part(folder / part_name(i))[0] for i in range(1, processes)]
    arrays: dict[str, ArrayFacts] = {}
    for name, facts in first.arrays.items():
        blocks = tuple(block for part in parts for block in _blocks_of(part, name, folder))
        if sum(math.prod(block.shape) for block in blocks) != math.prod(facts.shape):
            raise ManifestError(f"{folder} does not cover all of {name}")
        arrays[name] = dataclasses.replace(facts, blocks=blocks)
    return dataclasses.replace(first, arrays=arrays)


def _blocks_of(part: Manifest, name: str, folder: Path) -> tuple[Block, ...]:
    if name not in part.arrays:
        raise ManifestError(f"{folder}: the processes saved different arrays ({name})")
    return part.arrays[name].blocks


def _read_part(path: Path) -> tuple[Manifest, int]:
    document = read_json(path, ManifestError)
    try:
        body = document["manifest"]
        if _text_digest(body) != document["sha256"]:
            raise ManifestError(f"{path} differs from its own digest")
        arrays = {name: _array_facts(value) for name, value in body["arrays"].items()}
        facts = {str(item): str(digest) for item, digest in body["facts"].items()}
        found = Manifest(int(body["step"]), str(body["saved"]), arrays, facts)
        return found, int(body["processes"])
    except (AttributeError, KeyError, TypeError) as error:
        raise ManifestError(f"{path} is incomplete: {error!r}") from error


def _array_facts(value: Mapping[str, Any]) -> ArrayFacts:
    blocks = tuple(
        Block(_sizes(block["start"]), _sizes(block["shape"]), str(block["sha256"]))
        for block in value["blocks"]
    )
    return ArrayFacts(_sizes(value["shape"]), str(value["dtype"]), blocks)


def _sizes(values: Iterable[Any]) -> tuple[int, ...]:
    return tuple(int(value) for value in values)
