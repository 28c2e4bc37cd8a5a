"""Named tensors in files, looked at without reading them and read one at a time.

`open_tensors` takes a safetensors file, a sharded one by its index, or a PyTorch checkpoint in any
of the nestings that LlamaGen's scripts leave behind; nothing in a file is ever executed. The writers
stream as well: neither side holds more than a tensor in memory, however large the model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np

from vapi_jax.common.files import new_file, read_json
from vapi_jax.weights.formats import head_of, is_safetensors, open_safetensors
from vapi_jax.weights.names import WeightsError
from vapi_jax.weights.safe_pickle import PickleRefused
from vapi_jax.weights.torch_file import TorchFileError, TorchTensor, open_torch_file

INDEX_SUFFIX = ".safetensors.index.json"
TORCH_INDEX_SUFFIX = ".bin.index.json"

_NESTS = ("model", "module", "state_dict")
_AVERAGES = ("ema", "model_ema", "ema_model")
# What wrappers of PyTorch put before every name of a state dict.
_PREFIXES = ("module.", "_orig_mod.", "_fsdp_wrapped_module.")
# More names of an input embedding in Hugging Face's checkpoints, often on one storage with it.
_TIED = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
_ZIP = b"PK\x03\x04"
_TORCH = (".pt", ".pth", ".bin", ".ckpt")
ENDINGS = (INDEX_SUFFIX, TORCH_INDEX_SUFFIX, ".safetensors", *_TORCH)
"""Of files of weights, in the order in which a folder is searched for the one that is meant."""

# Names of dtypes in a safetensors header.
_CODES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
_DTYPES = {code: jnp.dtype(name) for name, code in _CODES.items()}


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor that is still in its file.

    Attributes:
      shape, dtype: of the array that reading gives.
      fetch: reads it, or the part of it that a tuple of slices names.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    fetch: Callable[[tuple[slice, ...] | None], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """The array, or the named part of it."""
        return self.fetch(index)


@dataclasses.dataclass(frozen=True)
class TensorFile:
    """What `open_tensors` found.

    Attributes:
      paths: the files that hold the tensors, the named one first.
      tensors: name -> tensor.
      ignored: other entries of the checkpoint (optimizer, steps, arguments ...), which are not read.
    """

    paths: tuple[Path, ...]
    tensors: dict[str, LazyTensor]
    ignored: tuple[str, ...] = ()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}


@contextlib.contextmanager
def open_tensors(path: str | Path, entry: str = "") -> Iterator[TensorFile]:
    """Opens a file of named tensors, whatever its kind; tensors can be read inside the context.

    Names may stand behind the prefixes of DDP, FSDP or torch.compile, which are taken off.

    Args:
      path: `.safetensors`; `*.safetensors.index.json` or `*.bin.index.json` beside its shards; a folder
        that holds one of these; or a PyTorch checkpoint (zip format), whose state dict may be bare or
        nested.
      entry: of a file that holds several models, which: the key of a PyTorch checkpoint, or what the
        names of safetensors begin with. Empty for "model", "module" or "state_dict".

    Raises:
      WeightsError: if the file is missing, damaged, refused, or holds no state dict.
    """
    with contextlib.ExitStack() as stack:
        try:
            found = _open(Path(path), entry, stack)
        except (TorchFileError, PickleRefused, OSError) as error:
            raise WeightsError(f"{error}") from error
        yield found


def _open(path: Path, entry: str, stack: contextlib.ExitStack) -> TensorFile:
    if path.is_dir():
        path = _file_in(path)
    if not path.is_file():
        raise WeightsError(f"{path} does not exist: a file of weights is wanted")
    if path.name.endswith(TORCH_INDEX_SUFFIX):
        return _chosen(_open_torch_index(path, stack), entry)
    if path.name.endswith(INDEX_SUFFIX):
        return _chosen(_open_index(path), entry)
    head = head_of(path)
    named_torch = path.suffix in _TORCH and not is_safetensors(head)
    if head.startswith(_ZIP) or named_torch:
        file = _open_checkpoint(path, stack.enter_context(open_torch_file(path)).value, entry)
        return dataclasses.replace(file, tensors=_unwrapped(file.tensors))
    return _chosen(TensorFile((path,), _open_safetensors(path)), entry)


def _file_in(folder: Path) -> Path:
    """The one file or index of weights in a folder."""
    for ending in ENDINGS:
        found = sorted(folder.glob(f"*{ending}"))
        if len(found) == 1:
            return found[0]
        if found:
            named = ", ".join(path.name for path in found[:5])
            shards = any("-of-" in path.name for path in found)
            lost = f", which belong together by an index that is not there (*{INDEX_SUFFIX})"
            raise WeightsError(
                f"{folder} holds {len(found)} files *{ending}: {named}{lost if shards else ''}. Name "
                "the one that is meant"
            )
    raise WeightsError(f"{folder} is a directory without weights: neither safetensors nor .pt")


def _open_safetensors(path: Path) -> dict[str, LazyTensor]:
    def lazy(name: str) -> Callable[[tuple[slice, ...] | None], np.ndarray]:
        def fetch(index: tuple[slice, ...] | None) -> np.ndarray:
            # Opened for every tensor: the library maps the file, and pages once touched would count
            # as this process's memory until it is closed.
            with open_safetensors(path) as file:
                return file.get_slice(name)[index] if index else file.get_tensor(name)

        return fetch

    with open_safetensors(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        unknown = {part.get_dtype() for part in slices.values()} - _DTYPES.keys()
        if unknown:
            raise WeightsError(f"{path} holds tensors of unknown dtype {sorted(unknown)}")
        return {
            name: LazyTensor(tuple(part.get_shape()), _DTYPES[part.get_dtype()], lazy(name))
            for name, part in slices.items()
        }


def _read_index(path: Path, suffix: str) -> tuple[dict[str, str], list[Path]]:
    """Which shard holds which tensor, and the shards' paths."""
    try:
        index = read_json(path, WeightsError)["weight_map"]
        shards = sorted(set(index.values()))
    except (KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{path} is no index of {suffix[1:]} shards: {error!r}") from error
    for shard in shards:
        # A name from a file must not lead out of its folder.
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(suffix):
            raise WeightsError(f"{path} names {shard!r}, which is no file beside it")
    return index, [path.parent / shard for shard in shards]


def _gather(
    path: Path, suffix: str, open_shard: Callable[[Path], Mapping[str, LazyTensor]]
) -> TensorFile:
    index, shards = _read_index(path, suffix)
    tensors: dict[str, LazyTensor] = {}
    for shard in shards:
        if not shard.is_file():
            raise WeightsError(
                f"{path} promises {shard.name}, which is not beside it: fetch it as well"
            )
        tensors |= {
            name: tensor
            for name, tensor in open_shard(shard).items()
            if index.get(name) == shard.name
        }
    if missing := sorted(index.keys() - tensors.keys()):
        raise WeightsError(f"{path} promises {', '.join(missing[:5])}, absent from its shards")
    return TensorFile((path, *shards), tensors)


def _open_index(path: Path) -> TensorFile:
    return _gather(path, ".safetensors", _open_safetensors)


def _open_torch_index(path: Path, stack: contextlib.ExitStack) -> TensorFile:
    def open_shard(shard: Path) -> Mapping[str, LazyTensor]:
        if is_safetensors(head_of(shard)):
            return _open_safetensors(shard)
        file = stack.enter_context(open_torch_file(shard))
        return _open_checkpoint(shard, file.value, "").tensors  # by the names that the index has

    return _gather(path, ".bin", open_shard)


Found = TypeVar("Found")


def _unwrapped(found: Mapping[str, Found]) -> dict[str, Found]:
    """Without the prefixes that all names have of a wrapper."""
    found = dict(found)
    while found and (
        prefix := next((p for p in _PREFIXES if all(name.startswith(p) for name in found)), "")
    ):
        found = {name.removeprefix(prefix): value for name, value in found.items()}
    return found


_CHOOSE = "choose with --entry=NAME (of --vq: --vq-entry=NAME)"


def _chosen(file: TensorFile, entry: str) -> TensorFile:
    """The tensors of one model, where names of several begin with "model.", "ema." and the like."""
    groups = {name.partition(".")[0] for name in file.tensors}
    known = (*_NESTS, *_AVERAGES)
    if not entry and groups & set(_AVERAGES) and groups <= set(known):
        entry = next((nest for nest in _NESTS if nest in groups), "")
        if not entry:
            raise WeightsError(f"{file.paths[0]} holds {', '.join(sorted(groups))}: {_CHOOSE}")
    if entry and entry not in groups:
        raise WeightsError(
            f"{file.paths[0]} has no entry {entry!r}: its names begin with "
            f"{', '.join(sorted(groups)[:8])}"
        )
    start = f"{entry}." if entry else ""
    mine = {n.removeprefix(start): t for n, t in file.tensors.items() if n.startswith(start)}
    others = tuple(sorted(groups - {entry})) if entry else ()
    return TensorFile(file.paths, _unwrapped(mine), others)


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, dict) and any(isinstance(v, TorchTensor) for v in value.values())


def _open_checkpoint(path: Path, value: Any, entry: str) -> TensorFile:
    ignored: list[str] = []
    if entry:
        if not isinstance(value, dict) or not isinstance(value.get(entry), dict):
            there = ", ".join(map(str, value)) if isinstance(value, dict) else "no entries"
            raise WeightsError(f"{path} has no entry {entry!r} with a state dict; it has {there}")
        ignored += [str(key) for key in value if key != entry]
        value = value[entry]
    while isinstance(value, dict) and not _holds_tensors(value):
        nest = next((key for key in _NESTS if isinstance(value.get(key), dict)), None)
        if nest is None:
            break
        ignored += [str(key) for key in value if key != nest]
        value = value[nest]
    if not isinstance(value, dict):
        raise WeightsError(f"{path} holds a {type(value).__name__}, not a state dict")
    found = {k: v for k, v in value.items() if isinstance(v, TorchTensor) and isinstance(k, str)}
    if not found:
        others = [str(key) for key, inner in value.items() if _holds_tensors(inner)]
        choice = f". Tensors are under {', '.join(others)}: {_CHOOSE}"
        raise WeightsError(
            f"{path} holds no state dict: tensors were looked for at the top and under "
            f"{', '.join(_NESTS)}; it has {', '.join(map(str, value)) or 'nothing'}"
            f"{choice if others else ''}"
        )
    ignored += [str(key) for key in value if key not in found]

    def lazy(tensor: TorchTensor) -> LazyTensor:
        return LazyTensor(
            tensor.shape,
            tensor.dtype,
            lambda index: tensor.read()[index] if index else tensor.read(),
        )

    tensors = {name: lazy(tensor) for name, tensor in found.items()}
    total = sum(x.nbytes for name, x in _unwrapped(tensors).items() if name not in _TIED)
    size = path.stat().st_size
    if total > size:
        raise WeightsError(
            f"{path} has {size} bytes, yet its tensors would take {total}: many of them share their "
            "storage, as no release does"
        )
    return TensorFile((path,), tensors, tuple(ignored))


# --- writing --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Outgoing:
    """A tensor to be written: its pieces, in order, are its bytes in C order."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: Callable[[], Iterator[np.ndarray]]

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """The whole array."""
        parts = [np.ravel(part) for part in self.pieces()]
        return (parts[0] if len(parts) == 1 else np.concatenate(parts)).reshape(self.shape)


def write_safetensors(
    path: Path,
    tensors: Iterable[Outgoing],
    metadata: Mapping[str, str] | None = None,
    tick: Callable[[int], None] = lambda count: None,
) -> str:
    """Writes one safetensors file piece by piece and returns its SHA-256.

    Args:
      path: the file; a half-written one never carries this name.
      tensors: what to write.
      metadata: of the file's header.
      tick: told the bytes of every piece once it is written.
    """
    tensors = sorted(tensors, key=lambda t: t.name)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.nbytes
        header[tensor.name] = {
            "dtype": _CODES[tensor.dtype.name],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with new_file(path) as partial, partial.open("wb") as file:

        def put(data: Any) -> None:
            digest.update(data)
            file.write(data)

        put(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            written = 0
            for piece in tensor.pieces():
                # Through bytes: numpy has no buffer of the narrow floats' own.
                put(np.asarray(piece, dtype=tensor.dtype, order="C").reshape(-1).view(np.uint8))
                written += piece.size * tensor.dtype.itemsize
                tick(piece.size * tensor.dtype.itemsize)
            if written != tensor.nbytes:
                raise ValueError(f"{tensor.name}: {written} bytes came, {tensor.nbytes} announced")
    return digest.hexdigest()


def write_sharded(
    directory: Path,
    stem: str,
    tensors: Iterable[Outgoing],
    limit: int,
    metadata: Mapping[str, str] | None = None,
    tick: Callable[[int], None] = lambda count: None,
) -> dict[str, str]:
    """`<stem>.safetensors`, or shards of at most `limit` bytes with their index.

    A tensor larger than the limit gets a shard of its own.

    Returns:
      File name -> SHA-256.
    """
    groups: list[list[Outgoing]] = [[]]
    for tensor in sorted(tensors, key=lambda t: t.name):
        if groups[-1] and sum(t.nbytes for t in groups[-1]) + tensor.nbytes > limit:
            groups.append([])
        groups[-1].append(tensor)
    if len(groups) == 1:
        name = f"{stem}.safetensors"
        return {name: write_safetensors(directory / name, groups[0], metadata, tick)}
    names = [f"{stem}-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    digests = {
        name: write_safetensors(directory / name, group, metadata, tick)
        for name, group in zip(names, groups, strict=True)
    }
    index = {
        "metadata": {"total_size": sum(t.nbytes for group in groups for t in group)},
        "weight_map": {t.name: n for n, group in zip(names, groups, strict=True) for t in group},
    }
    name = f"{stem}{INDEX_SUFFIX}"
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (directory / name).write_text(text, encoding="utf-8")
    return {**digests, name: hashlib.sha256(text.encode()).hexdigest()}
