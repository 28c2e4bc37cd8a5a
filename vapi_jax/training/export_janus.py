"""A trained or converted Janus back into a folder as it was published."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vapi_jax import __version__
from vapi_jax.common.files import new_folder, read_json
from vapi_jax.common.progress import byte_progress
from vapi_jax.models.architecture import from_json
from vapi_jax.models.conversion import SHARD_BYTES, name_rules
from vapi_jax.models.janus import JanusConfig
from vapi_jax.models.janus_folder import COMPLETE, FILES, KEPT, LAYOUT
from vapi_jax.models.janus_names import DEEPSEEK, TOKENIZER, TRANSFORMERS, from_deepseek
from vapi_jax.models.loading import (
    CONFIG,
    MANIFEST,
    Weights,
    WeightsSource,
    open_weights,
    read_manifest,
)
from vapi_jax.models.lora import A, B
from vapi_jax.training.export import open_adapters, open_trained, reference_tensors
from vapi_jax.weights.names import WeightsError, origin_of
from vapi_jax.weights.tensors import Outgoing, write_safetensors, write_sharded

RECORD = "vapi_jax.json"
"""In the folder: what wrote it, and the SHA-256 of its weights."""


@dataclasses.dataclass(frozen=True)
class Unchanged:
    """How many weights are those of the model before training.

    Attributes:
      weights: all that are trained.
      float32, bfloat16: how many are the same in that precision.
    """

    weights: int
    float32: int
    bfloat16: int

    def describe(self) -> str:
        """One line for people."""
        wide, narrow = (100 * n / max(self.weights, 1) for n in (self.float32, self.bfloat16))
        return (
            f"unchanged by training: {wide:.2f} % of {self.weights:,} weights in float32, {narrow:.2f} % "
            "in bfloat16"
        )


@dataclasses.dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
      digests: file of weights -> SHA-256.
      complete: whether the understanding side is in it.
      unchanged: None where nothing was trained.
    """

    digests: Mapping[str, str]
    complete: bool
    unchanged: Unchanged | None


def export_janus(
    ckpt: Path,
    out: Path,
    *,
    source: Path | None = None,
    step: int | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> Exported:
    """Writes a folder in the layout that the converted one had.

    Args:
      ckpt: a run's workdir, or a directory of `convert_janus`.
      out: the folder; must not exist, unless `overwrite` and it was written here.
      source: the directory of `convert_janus` that the run began with; None for what its recipe says.
      step: of the run's checkpoints, -1 for the newest; None for its final weights.
      dtype: of all floating-point tensors; None keeps each as it is, bit for bit.
      overwrite, shard_bytes: as `convert_janus` has them.

    Raises:
      WeightsError: something is missing, damaged, or not of a Janus.
    """
    if out.exists() and not (overwrite and (out / RECORD).is_file()):
        raise WeightsError(f"{out} exists: choose another place, or --overwrite an earlier export")
    trained = not (ckpt / MANIFEST).is_file()
    source = (source or _began_with(ckpt)) if trained else ckpt
    config, manifest = read_manifest(source)
    layout, kept = manifest.get(LAYOUT), manifest.get(KEPT)
    if layout not in (DEEPSEEK, TRANSFORMERS) or not isinstance(kept, dict):
        raise WeightsError(
            f"{source} was not made by convert_janus, which keeps what an export needs"
        )
    generator = from_json(config["gpt"], JanusConfig)
    rules = name_rules("gpt", generator)
    with contextlib.ExitStack() as stack:
        start = stack.enter_context(open_weights(WeightsSource(str(source), "gpt", *rules)))
        tokenizer = stack.enter_context(
            open_weights(WeightsSource(str(source), "vq", *name_rules("vq")))
        )
        weights, unchanged = start, None
        if trained:
            weights, theirs = stack.enter_context(open_trained(ckpt, "gpt", step, source))
            if theirs != rules[0] or _shapes(weights) != _shapes(start):
                raise WeightsError(f"{ckpt} did not train the model that is in {source}")
            unchanged = _compare(weights, start)
            weights = dataclasses.replace(weights, buffers=start.buffers)
        tensors = [
            *reference_tensors(weights, rules[0], None),
            *(
                dataclasses.replace(tensor, name=TOKENIZER + tensor.name)
                for tensor in reference_tensors(tokenizer, name_rules("vq")[0], None)
            ),
        ]
        tensors = [_leaving(tensor, layout, dtype) for tensor in tensors]
        with (
            new_folder(out, replace=overwrite) as folder,
            byte_progress(sum(tensor.nbytes for tensor in tensors), "export") as tick,
        ):
            digests = write_sharded(folder, "model", tensors, shard_bytes, {"format": "pt"}, tick)
            _copy(source, kept, folder, dtype)
            record = {"exporter": f"vapi_jax {__version__}", "sha256": digests, "step": step}
            _write_json(folder / RECORD, record)
    return Exported(digests, bool(manifest.get(COMPLETE)), unchanged)


def export_adapters(
    ckpt: Path,
    out: Path,
    *,
    source: Path | None = None,
    step: int | None = None,
    overwrite: bool = False,
) -> dict[str, str]:
    """Writes the adapters of a run apart, in PEFT's layout; returns file -> SHA-256.

    Arguments and errors as `export_janus` has them. Names are those of the layout of `source`, so
    that adapters go onto the folder that was converted.
    """
    if out.exists() and not (overwrite and (out / RECORD).is_file()):
        raise WeightsError(f"{out} exists: choose another place, or --overwrite an earlier export")
    layout = read_manifest(source or _began_with(ckpt))[1].get(LAYOUT)
    if layout not in (DEEPSEEK, TRANSFORMERS):
        raise WeightsError(
            f"{source or ckpt} was not made by, or did not begin with, convert_janus"
        )
    rules, tensors, maps = name_rules("gpt", JanusConfig())[0], [], set()
    with open_adapters(ckpt, step) as (weights, lora), new_folder(out, replace=overwrite) as folder:
        for path, leaf in weights.leaves.items():
            stem, _, own = path.rpartition("/")
            kernel = jax.ShapeDtypeStruct((leaf.shape[0], 1, 1), leaf.dtype)
            shape, theirs = leaf.shape[:0:-1], {A: "lora_A", B: "lora_B"}[own]
            for i, name in enumerate(origin_of(f"{stem}/kernel", kernel, rules).names):
                module = from_deepseek(name, layout).removesuffix(".weight")
                maps.add(module.rpartition(".")[2])
                pieces = partial(_transposed, weights, path, i)
                name = f"base_model.model.{module}.{theirs}.weight"
                tensors.append(Outgoing(name, shape, leaf.dtype, pieces))
        file = "adapter_model.safetensors"
        digests = {file: write_safetensors(folder / file, tensors, {"format": "pt"})}
        settings = {
            "peft_type": "LORA", "task_type": None, "base_model_name_or_path": None, "bias": "none",
            "r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": 0.0, "inference_mode": True,
            "fan_in_fan_out": False, "init_lora_weights": True,
            # The side that looks at images has maps of the same names.
            "target_modules": rf".*language_model\..*\.({'|'.join(sorted(maps))})",
        }  # fmt: skip
        _write_json(folder / "adapter_config.json", settings)
        _write_json(folder / RECORD, {"exporter": f"vapi_jax {__version__}", "sha256": digests})
    return digests


def _transposed(weights: Weights, path: str, layer: int) -> Iterator[np.ndarray]:
    yield np.ascontiguousarray(weights.read(path, (slice(layer, layer + 1),))[0].T)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _leaving(tensor: Outgoing, layout: str, dtype: str | None) -> Outgoing:
    """A tensor as it is written: under its name in that layout, and in that precision."""
    floating = jnp.issubdtype(tensor.dtype, jnp.floating)
    kept = tensor.dtype if dtype is None or not floating else jnp.dtype(dtype)
    return dataclasses.replace(tensor, name=from_deepseek(tensor.name, layout), dtype=kept)


def _began_with(workdir: Path) -> Path:
    """The directory that a run's recipe names for its generator."""
    init = read_json(workdir / CONFIG, WeightsError).get("init")
    named = init.get("gpt") if isinstance(init, dict) else None
    if not isinstance(named, str) or not (Path(named) / MANIFEST).is_file():
        raise WeightsError(
            f"{workdir} began with {named!r}, which is no directory of convert_janus; name the one that "
            "has the rest of the model, --source DIR"
        )
    return Path(named)


def _shapes(weights: Weights) -> dict[str, tuple[int, ...]]:
    return {path: tuple(leaf.shape) for path, leaf in weights.leaves.items()}


def _compare(trained: Weights, start: Weights) -> Unchanged:
    """Counts, with a layer of two models in memory at a time."""
    rules = name_rules("gpt", JanusConfig())[0]
    total, same = 0, {np.dtype(np.float32): 0, np.dtype(jnp.bfloat16): 0}
    for path, leaf in start.leaves.items():
        stacked = origin_of(path, leaf, rules).stacked
        for index in [(slice(i, i + 1),) for i in range(leaf.shape[0])] if stacked else [()]:
            new, old = (np.asarray(weights.read(path, index)) for weights in (trained, start))
            total += new.size
            for dtype in same:
                same[dtype] += int(np.count_nonzero(new.astype(dtype) == old.astype(dtype)))
    return Unchanged(total, *same.values())


def _copy(source: Path, kept: Mapping[str, Any], folder: Path, dtype: str | None) -> None:
    """The files beside the weights, as they were; config.json names the dtype of the weights."""
    for theirs, ours in FILES.items():
        if theirs in kept:
            shutil.copyfile(source / ours, folder / theirs)
    if dtype is not None:
        settings = read_json(folder / CONFIG, WeightsError)
        for part in (settings, *(value for value in settings.values() if isinstance(value, dict))):
            if "torch_dtype" in part:
                part["torch_dtype"] = dtype
        _write_json(folder / CONFIG, settings)
