"""Initial weights from whatever file a user has, straight into sharded arrays.

A configuration names weights as one of: "demo" (the shipped ones), a directory that
vapi_jax.convert wrote, the workdir of a finished run, a safetensors file with our names, or
a released LlamaGen file (`.pt`, `.pth`, safetensors, sharded safetensors by its index), which goes
through the converter's own name table, check and inference on the way.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vapi_jax.common.digests import digest_of
from vapi_jax.common.files import read_json
from vapi_jax.common.trees import flatten, unflatten
from vapi_jax.models.architecture import (
    disagreements,
    gpt_differences,
    gpt_facts,
    vq_differences,
    vq_facts,
)
from vapi_jax.models.llama import LlamaConfig
from vapi_jax.models.vq import VQConfig
from vapi_jax.parallel.sharding import put_sharded
from vapi_jax.weights.names import Origin, Rule, WeightsError, check_like, check_reference
from vapi_jax.weights.store import resolve_shipped
from vapi_jax.weights.tensors import INDEX_SUFFIX, LazyTensor, TensorFile, open_tensors

logger = logging.getLogger(__name__)

CONFIG, MANIFEST = "config.json", "manifest.json"
MODEL = "model"
"""Stem of a converted directory's weights: model.safetensors, or its shards and their index."""

BUFFERS = ".buffers/"
"""Between a part's name and the reference's buffers that came with it: "vq.buffers/<name>"."""

PARTS = {"gpt": "policy", "vq": "tokenizer"}
"""Part of a model -> what a run calls it: RUN/weights/policy.safetensors."""

Read = Callable[[str, Any], np.ndarray]


@dataclasses.dataclass(frozen=True)
class WeightsSource:
    """Weights that a configuration names, and the model that they are for.

    Attributes:
      path: as in the configuration.
      part: "gpt" or "vq".
      rules, ignored: the model's table of names, for files that carry the reference's.
      config: what the model looks like, to be compared with what a file says of itself.
      verify: compare the digests of a directory's manifest.
    """

    path: str
    part: str
    rules: tuple[Rule, ...]
    ignored: tuple[str, ...]
    config: Any = None
    verify: bool = True


@dataclasses.dataclass(frozen=True)
class Weights:
    """Weights under our names, still in their files.

    Attributes:
      leaves: path -> ShapeDtypeStruct as stored.
      read: (path, index) -> that slice of a parameter; index may be ().
      buffers: what the reference keeps beside its parameters, under its names.
    """

    leaves: dict[str, jax.ShapeDtypeStruct]
    read: Read
    buffers: Mapping[str, LazyTensor] = dataclasses.field(default_factory=dict)


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
      WeightsError: if the weights are missing, damaged or do not fit, with every misfit by name.
    """
    if dtype is not None:
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), target)
    with open_weights(source, target) as weights:
        check_like(unflatten(weights.leaves), target, f"the weights in {source.path}")
        if shardings is not None:
            return put_sharded(weights.read, target, shardings)
        return unflatten(
            {
                path: np.asarray(weights.read(path, ()), dtype=leaf.dtype)
                for path, leaf in flatten(target).items()
            }
        )


@contextlib.contextmanager
def open_weights(source: WeightsSource, target: Any = None) -> Iterator[Weights]:
    """The named weights under our names, to be read inside the context.

    Args:
      source: what to open.
      target: the model's parameters, needed where the file carries the reference's names.

    Raises:
      WeightsError: if the weights are missing, damaged, or not those of this model.
    """
    path, prefix = _locate(source)
    with open_tensors(path) as file:
        if any("/" in name for name in file.tensors):
            yield _ours(path, file.tensors, source.part, prefix)
        else:
            yield _theirs(source, file, target)


def _locate(source: WeightsSource) -> tuple[Path, str]:
    """The file of tensors that a source means, and what stands before our names in it."""
    if source.path == "demo":
        return resolve_shipped(PARTS[source.part]), ""
    path = Path(source.path)
    if not path.is_dir():
        return path, ""
    if (path / MANIFEST).is_file():
        _check_converted(path, source)
        index = path / f"{MODEL}{INDEX_SUFFIX}"
        return index if index.exists() else path / f"{MODEL}.safetensors", f"{source.part}/"
    trained = path / "weights" / f"{PARTS[source.part]}.safetensors"
    if trained.is_file():
        return trained, ""
    raise WeightsError(
        f"{path} is a directory without {MANIFEST} (vapi_jax.convert writes one, last of "
        f"all, so an interrupted conversion has none) and without weights/{trained.name} of a "
        "finished run"
    )


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
    known = isinstance(source.config, LlamaConfig | VQConfig)
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
