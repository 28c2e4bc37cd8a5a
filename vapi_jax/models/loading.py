"""Initial weights from whatever file a user has, straight into sharded arrays.

A configuration names weights as one of: "demo" (the shipped ones), a directory that
vapi_jax.convert wrote, the workdir of a finished run, a safetensors file with our names, or
a released LlamaGen file (`.pt`, `.pth`, safetensors, sharded safetensors by its index or its folder),
which goes through the converter's own name table, check and inference on the way.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vapi_jax.common.digests import digest_of
from vapi_jax.common.files import read_json
from vapi_jax.common.trees import flatten, unflatten
from vapi_jax.models import classes
from vapi_jax.models.architecture import (
    ModelConfig,
    disagreements,
    gpt_differences,
    gpt_facts,
    vq_differences,
    vq_facts,
)
from vapi_jax.models.llama import LlamaConfig
from vapi_jax.models.vq import VQConfig
from vapi_jax.parallel.sharding import put_sharded
from vapi_jax.weights.names import (
    Origin,
    Rule,
    WeightsError,
    check_finite,
    check_like,
    check_reference,
    origin_of,
)
from vapi_jax.weights.store import SHIPPED, resolve_shipped
from vapi_jax.weights.tensors import ENDINGS, INDEX_SUFFIX, LazyTensor, TensorFile, open_tensors

logger = logging.getLogger(__name__)

CONFIG, MANIFEST = "config.json", "manifest.json"
MODEL = "model"
"""Stem of a converted directory's weights: model.safetensors, or its shards and their index."""

BUFFERS = ".buffers/"
"""Between a part's name and the reference's buffers that came with it: "vq.buffers/<name>"."""

PARTS = {"gpt": "policy", "vq": "tokenizer"}
"""Part of a model -> what a run calls it: RUN/weights/policy.safetensors."""

ADAPTERS = "lora"
"""What a run calls adapters that it has trained: RUN/weights/lora.safetensors."""

Read = Callable[[str, Any], np.ndarray]


@dataclasses.dataclass(frozen=True)
class ClassTable:
    """Where a generator keeps a row for each class.

    Attributes:
      path: of the parameter [classes + unconditional, D].
      unconditional: rows at its end that stand for no class, 0 or 1.
      fresh: seed of new rows for classes of other data; None to take those of the file.
    """

    path: str
    unconditional: int
    fresh: int | None = None


@dataclasses.dataclass(frozen=True)
class WeightsSource:
    """Weights that a configuration names, and the model that they are for.

    Attributes:
      path: as in the configuration.
      part: "gpt" or "vq".
      rules, ignored: the model's table of names, for files that carry the reference's.
      config: what the model looks like, to be compared with what a file says of itself.
      verify: compare the digests of a directory's manifest.
      classes: of a class-conditional generator.
    """

    path: str
    part: str
    rules: tuple[Rule, ...]
    ignored: tuple[str, ...]
    config: Any = None
    verify: bool = True
    classes: ClassTable | None = None


@dataclasses.dataclass(frozen=True)
class Weights:
    """Weights under our names, still in their files.

    Attributes:
      leaves: path -> ShapeDtypeStruct as stored.
      read: (path, index) -> that slice of a parameter; index may be ().
      buffers: what the reference keeps beside its parameters, under its names.
      files: those that are read.
    """

    leaves: dict[str, jax.ShapeDtypeStruct]
    read: Read
    buffers: Mapping[str, LazyTensor] = dataclasses.field(default_factory=dict)
    files: tuple[Path, ...] = ()


def load_weights(
    source: WeightsSource, target: Any, shardings: Any = None, dtype: Any = None
) -> Any:
    """The weights as a tree like `target`.

    Args:
      source: what to read.
      target: tree of ShapeDtypeStructs.
      shardings: tree of NamedShardings: each device then reads its own slices; None gives numpy.
      dtype: of the result in place of the target's.

    Raises:
      WeightsError: if the weights are missing, damaged, not finite or do not fit, with every misfit by
        name.
    """
    if dtype is not None:
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), target)
    with open_weights(source, target) as weights:
        check_like(unflatten(weights.leaves), target, f"the weights in {source.path}")
        read = partial(read_finite, weights, source.path)
        if shardings is not None:
            return put_sharded(read, target, shardings)
        return unflatten(
            {
                path: np.asarray(read(path, ()), dtype=leaf.dtype)
                for path, leaf in flatten(target).items()
            }
        )


def read_through(source: WeightsSource, target: Any) -> None:
    """Reads all that `load_weights` reads, a layer at a time, and keeps nothing.

    Raises:
      WeightsError: as it does.
    """
    with open_weights(source, target) as weights:
        check_like(unflatten(weights.leaves), target, f"the weights in {source.path}")
        for path, leaf in weights.leaves.items():
            for i in range(leaf.shape[0]) if len(leaf.shape) > 2 else (None,):
                read_finite(weights, source.path, path, () if i is None else (slice(i, i + 1),))


def read_finite(weights: Weights, where: str, path: str, index: Any) -> np.ndarray:
    """A slice of a parameter; raises `WeightsError` where a value of it is not finite."""
    array = weights.read(path, index)
    check_finite(array, f"{path} in {where}")
    return array


@contextlib.contextmanager
def open_weights(source: WeightsSource, target: Any = None) -> Iterator[Weights]:
    """The named weights under our names, to be read inside the context.

    Args:
      source: what to open.
      target: the model's parameters, needed where the file carries the reference's names.

    Raises:
      WeightsError: if the weights are missing, damaged, or not those of this model.
    """
    table = source.classes if source.classes and source.classes.fresh is not None else None
    wanted = target
    if table is not None:
        source, target = as_stored(source, target)
    if (Path(source.path) / MANIFEST).is_file():
        _check_converted(Path(source.path), source)
    path, prefix = locate(source)
    with open_tensors(path) as file:
        if any("/" in name for name in file.tensors):
            weights = _ours(path, file.tensors, source.part, prefix)
        else:
            weights = _theirs(source, file, target)
        weights = dataclasses.replace(weights, files=file.paths)
        yield weights if table is None else _with_fresh_rows(weights, table, wanted)


def locate(source: WeightsSource) -> tuple[Path, str]:
    """The file or folder of tensors that a source means, and what stands before our names in it.

    Raises:
      WeightsError: a directory without any, or shipped weights that are damaged.
    """
    if source.path in SHIPPED:
        return resolve_shipped(PARTS[source.part], source.path), ""
    path = Path(source.path)
    if not path.is_dir():
        return path, ""
    if (path / MANIFEST).is_file():
        index = path / f"{MODEL}{INDEX_SUFFIX}"
        return index if index.exists() else path / f"{MODEL}.safetensors", f"{source.part}/"
    trained = path / "weights" / f"{PARTS[source.part]}.safetensors"
    if trained.is_file():
        return trained, ""
    if any(next(path.glob(f"*{ending}"), None) for ending in ENDINGS):  # of others
        return path, ""
    raise WeightsError(_no_directory(path, trained.name))


def _no_directory(path: Path, trained: str) -> str:
    return (
        f"{path} is a directory without {MANIFEST} (vapi_jax.convert writes one, last of all, "
        f"so an interrupted conversion has none) and without weights/{trained} of a finished run"
    )


# --- classes --------------------------------------------------------------------------------------


def class_count(source: WeightsSource) -> int | None:
    """How many classes a generator's weights have a row for, that for no class not counted.

    None where that cannot be told; what is wrong with the weights is said when they are opened.
    """
    table, path = source.classes, Path(source.path)
    if table is None:
        return None
    try:
        if (path / MANIFEST).is_file():
            return int(read_manifest(path)[0][source.part]["num_classes"])
        file_path, _ = locate(source)
        theirs = origin_of(table.path, jax.ShapeDtypeStruct((1, 1), np.float32), source.rules)
        with open_tensors(file_path) as file:
            found = (file.tensors.get(name) for name in (table.path, theirs.names[0]))
            rows = next(tensor.shape[0] for tensor in found if tensor is not None)
        return rows - table.unconditional
    except (WeightsError, LookupError, StopIteration, TypeError, ValueError):
        return None


def class_list(source: WeightsSource) -> str:
    """The list of a generator's classes, as `read_class_list` takes it; "" where none is known.

    That is the demo's, the one beside the weights of a run or a conversion, or, for a thousand classes,
    ImageNet's.
    """
    if source.path == "demo":
        return "demo"
    path = Path(source.path)
    folders = [path] if path.is_dir() else [path.parent.parent] * (path.parent.name == "weights")
    for folder in folders:
        if (folder / classes.FILE).is_file():
            return str(folder / classes.FILE)
    return "imagenet" if class_count(source) == classes.IMAGENET_CLASSES else ""


def as_stored(source: WeightsSource, target: Any) -> tuple[WeightsSource, Any]:
    """A source and its parameters with as many classes as its weights have, whatever is asked for.

    Raises:
      WeightsError: the weights do not say how many.
    """
    table, count = source.classes, class_count(source)
    if table is None or count is None:
        raise WeightsError(
            f"{source.path} holds no table of classes, of which init.classes='new' would replace rows"
        )
    config = source.config
    if isinstance(config, LlamaConfig):
        config = dataclasses.replace(config, num_classes=count)
    leaves = flatten(target)
    asked = leaves[table.path]
    shape = (count + table.unconditional, *asked.shape[1:])
    leaves[table.path] = jax.ShapeDtypeStruct(shape, asked.dtype)
    return dataclasses.replace(source, config=config), unflatten(leaves)


def _with_fresh_rows(weights: Weights, table: ClassTable, target: Any) -> Weights:
    """The weights with a row for each class of other data.

    New rows are drawn with the mean and the standard deviation, column by column, of those that they
    replace, so that the other layers see what they know; the row for no class stays.
    """
    wanted = flatten(target)[table.path].shape
    stored = weights.leaves[table.path]

    @functools.cache
    def made() -> np.ndarray:
        old = np.asarray(weights.read(table.path, ()), np.float32)
        rows, none = np.split(old, [len(old) - table.unconditional])
        noise = np.random.default_rng(table.fresh).standard_normal(
            (wanted[0] - len(none), wanted[1])
        )
        fresh = rows.mean(axis=0) + rows.std(axis=0) * noise
        return np.concatenate([fresh, none]).astype(stored.dtype)

    def read(path: str, index: Any) -> np.ndarray:
        return made()[tuple(index)] if path == table.path else weights.read(path, index)

    leaves = {**weights.leaves, table.path: jax.ShapeDtypeStruct(wanted, stored.dtype)}
    return dataclasses.replace(weights, leaves=leaves, read=read)


def read_manifest(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json and manifest.json of a converted directory.

    Raises:
      WeightsError: if one cannot be read.
    """
    config, manifest = (read_json(directory / name, WeightsError) for name in (CONFIG, MANIFEST))
    return config, manifest


def verify_directory(directory: Path, manifest: Mapping[str, Any]) -> None:
    """Compares every file with the digest that the manifest keeps of it.

    Raises:
      WeightsError: naming the files that are damaged or missing.
    """
    outputs = manifest.get("outputs")
    if not isinstance(outputs, dict) or not outputs:
        raise WeightsError(f"{directory / MANIFEST} lists no files: convert the weights again")
    wrong = []
    for name, facts in outputs.items():
        path = directory / name
        if not isinstance(facts, dict):
            raise WeightsError(f"{directory / MANIFEST} is damaged: of {name} it has {facts!r}")
        if Path(name).name != name or not path.is_file():
            wrong.append(f"{name} (missing)")
        elif path.stat().st_size != facts.get("size") or digest_of(path) != facts.get("sha256"):
            wrong.append(f"{name} (its SHA-256 differs)")
    if wrong:
        raise WeightsError(
            f"{directory} is damaged: {', '.join(wrong)}. Convert the weights again, or bring the "
            "directory back from a copy"
        )


def _check_converted(directory: Path, source: WeightsSource) -> None:
    config, manifest = read_manifest(directory)
    if source.part not in config:
        raise WeightsError(
            f"{directory} holds {', '.join(config)} and no {source.part}: it was converted without "
            f"--{source.part}"
        )
    stored = config[source.part]
    known = isinstance(source.config, ModelConfig)
    if known and (different := disagreements(stored, source.config)):
        name = stored.get("name") or "another model"
        raise WeightsError("\n  ".join([f"{directory} holds {name}:", *different]))
    if source.verify:
        verify_directory(directory, manifest)
    else:
        logger.warning("%s: loaded without comparing digests (init.verify=False)", directory)


def _ours(path: Path, tensors: Mapping[str, LazyTensor], part: str, prefix: str) -> Weights:
    def behind(start: str) -> dict[str, LazyTensor]:
        return {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}

    mine = behind(prefix)
    if not prefix and all(name.partition("/")[0] in PARTS for name in mine):
        raise WeightsError(_no_directory(path.parent, f"{PARTS[part]}.safetensors"))
    if not mine:
        raise WeightsError(f"{path} holds nothing under {prefix!r}")
    leaves = {name: jax.ShapeDtypeStruct(t.shape, t.dtype) for name, t in mine.items()}
    return Weights(
        leaves, lambda name, index: mine[name].read(index or None), behind(part + BUFFERS)
    )


def _theirs(source: WeightsSource, file: TensorFile, target: Any) -> Weights:
    path, shapes = file.paths[0], {name: tensor.shape for name, tensor in file.tensors.items()}
    differences: Sequence[str] = ()
    if isinstance(source.config, LlamaConfig):
        differences = gpt_differences(gpt_facts(shapes, path.name), source.config)
    elif isinstance(source.config, VQConfig):
        differences = vq_differences(vq_facts(shapes), source.config)
    if differences:
        raise WeightsError(
            f"{path} and the configuration disagree:\n" + "\n".join(f"  {d}" for d in differences)
        )
    if target is None:
        raise WeightsError(f"{path} carries LlamaGen's names: convert it first")
    return reference_weights(file.tensors, target, source.rules, source.ignored)


def reference_weights(
    tensors: Mapping[str, LazyTensor],
    target: Any,
    rules: Sequence[Rule],
    ignored: Sequence[str],
) -> Weights:
    """The reference's tensors seen under our names and layout, converted as they are read.

    Raises:
      WeightsError: see `check_reference`.
    """
    origins = check_reference(tensors, target, rules, ignored)
    wanted = flatten(target)
    leaves = {
        path: jax.ShapeDtypeStruct(wanted[path].shape, tensors[origin.names[0]].dtype)
        for path, origin in origins.items()
    }

    def read(path: str, index: Any) -> np.ndarray:
        return read_origin(tensors, origins[path], tuple(index))

    return Weights(leaves, read)


def read_origin(
    tensors: Mapping[str, LazyTensor], origin: Origin, index: tuple[slice, ...]
) -> np.ndarray:
    """A slice of one of our parameters from the tensors it is made of, one of them at a time."""
    if not origin.stacked:
        return origin.to_ours(tensors[origin.names[0]].read())[index]
    layers, rest = (origin.names[index[0]], index[1:]) if index else (origin.names, ())
    return np.stack([origin.to_ours(tensors[name].read())[rest] for name in layers])
