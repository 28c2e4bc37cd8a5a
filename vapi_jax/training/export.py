"""Trained or converted weights back to LlamaGen's names and layout."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vapi_jax.common.digests import sha256_file
from vapi_jax.common.files import make_room, read_json
from vapi_jax.common.progress import byte_progress
from vapi_jax.common.trees import flatten
from vapi_jax.methods import METHODS, Method
from vapi_jax.methods.tokenizer import TokenizerTraining
from vapi_jax.models import vq
from vapi_jax.models.architecture import policy_kind
from vapi_jax.models.conversion import name_rules, whole
from vapi_jax.models.janus import JanusConfig
from vapi_jax.models.loading import (
    ADAPTERS,
    MANIFEST,
    Weights,
    WeightsSource,
    open_weights,
    read_manifest,
)
from vapi_jax.models.lora import A, B, LoRA
from vapi_jax.models.policies import make_policy
from vapi_jax.training.checkpoint import Checkpointer
from vapi_jax.weights.names import Origin, Rule, WeightsError, origin_of
from vapi_jax.weights.tensors import LazyTensor, Outgoing, write_safetensors
from vapi_jax.weights.torch_file import write_torch_file


def export(out: Path, weights: Weights, rules: Sequence[Rule], dtype: str | None = None) -> str:
    """Writes our weights under LlamaGen's names and in its layout; returns the file's SHA-256.

    Args:
      out: `.safetensors`, or `.pt` for the release layout {"model": state dict}.
      weights: ours.
      rules: the model's table of names.
      dtype: of the file; None keeps that of the weights, bit for bit.

    Raises:
      WeightsError: for another suffix, or weights that the table does not know.
      OutputError: `out` is a file that the weights are read from, or a folder.
    """
    if out.suffix not in (".safetensors", ".pt", ".pth"):
        raise WeightsError(f"{out}: the name must end in .safetensors or .pt")
    make_room([out], weights.files)
    tensors = list(reference_tensors(weights, rules, dtype))
    with byte_progress(sum(tensor.nbytes for tensor in tensors), "export") as tick:
        if out.suffix == ".safetensors":
            return write_safetensors(out, tensors, {"format": "pt"}, tick)

        def counted(tensor: Outgoing) -> LazyTensor:
            def fetch(index: Any) -> np.ndarray:
                del index  # the writer asks for whole tensors
                array = tensor.read()
                tick(array.nbytes)
                return array

            return LazyTensor(tensor.shape, tensor.dtype, fetch)

        write_torch_file(out, {"model": {tensor.name: counted(tensor) for tensor in tensors}})
    return sha256_file(out)


def reference_tensors(
    weights: Weights, rules: Sequence[Rule], dtype: str | None
) -> Iterator[Outgoing]:
    """Our weights and their buffers under the reference's names, each read when it is written.

    Args:
      weights: ours.
      rules: the model's table of names.
      dtype: of the parameters; None keeps that of the weights. Buffers stay as they are.

    Raises:
      WeightsError: the table does not know a parameter.
    """
    for name, buffer in weights.buffers.items():
        yield Outgoing(name, buffer.shape, buffer.dtype, partial(whole, buffer))
    for path, leaf in weights.leaves.items():
        origin = origin_of(path, leaf, rules)
        kept = jnp.dtype(leaf.dtype if dtype is None else dtype)
        for i, name in enumerate(origin.names):
            index = (slice(i, i + 1),) if origin.stacked else ()
            pieces = partial(_piece, weights, path, index, origin, kept)
            yield Outgoing(name, origin.their_shape(leaf.shape), kept, pieces)


def _piece(
    weights: Weights, path: str, index: tuple[slice, ...], origin: Origin, dtype: Any
) -> Iterator[np.ndarray]:
    """One of the reference's tensors, the only piece that it is written in."""
    part = weights.read(path, index)
    part = part[0] if origin.stacked else part
    yield np.asarray(origin.to_theirs(part), dtype=dtype, order="C")


@contextlib.contextmanager
def open_trained(
    ckpt: Path, part: str | None = None, step: int | None = None, base: Path | None = None
) -> Iterator[tuple[Weights, tuple[Rule, ...]]]:
    """Weights to export, and the table of names that belongs to them.

    Args:
      ckpt: a run's workdir, or a converted directory.
      part: "gpt" or "vq"; None for what the run trained, or the generator of a converted directory.
      step: of the run's checkpoints, -1 for the newest; None for its final weights.
      base: what a run that trains adapters adapts, which they are merged into; None for what its recipe says.

    Raises:
      WeightsError: if there is nothing of that kind.
      CheckpointError: if the checkpoint is damaged.
    """
    ckpt = ckpt.absolute()  # a folder called "demo" is no name of shipped weights
    if (ckpt / MANIFEST).is_file():
        if step is not None:
            raise WeightsError(f"{ckpt} is a converted directory and has no steps")
        config = read_manifest(ckpt)[0]
        part = part or next(iter(sorted(config)))
        janus = policy_kind(config.get("gpt", {})) == "janus"
        table = name_rules(part, JanusConfig() if janus else None)
        with open_weights(WeightsSource(str(ckpt), part, *table)) as weights:
            yield weights, table[0]
        return
    trained, rules, lora, adapted = _trained_part(ckpt)
    if part not in (None, trained):
        raise WeightsError(f"{ckpt} trained the {trained}; its {part} is where it came from")
    shapes = vq.BUFFER_SHAPES if trained == "vq" else {}
    buffers = {name: _zeros(shape) for name, shape in shapes.items()}
    with contextlib.ExitStack() as stack:
        if lora is not None:
            adapters, _ = stack.enter_context(open_adapters(ckpt, step))
            source = WeightsSource(str(base or adapted), trained, rules, ())
            weights = _merged(stack.enter_context(open_weights(source)), adapters, lora)
        elif step is not None:
            weights = _checkpointed(ckpt / "checkpoints", trained, step)
        else:
            source = WeightsSource(str(ckpt), trained, rules, ())
            weights = stack.enter_context(open_weights(source))
        yield dataclasses.replace(weights, buffers=buffers), rules


@contextlib.contextmanager
def open_adapters(ckpt: Path, step: int | None = None) -> Iterator[tuple[Weights, LoRA]]:
    """The adapters alone that a run has trained; arguments and errors as `open_trained`'s."""
    part, rules, lora, _ = _trained_part(ckpt)
    if lora is None:
        raise WeightsError(f"{ckpt} trained no adapters (policy.lora)")
    if step is not None:
        yield _checkpointed(ckpt / "checkpoints", part, step), lora
        return
    place = ckpt / "weights" / f"{ADAPTERS}.safetensors"
    with open_weights(WeightsSource(str(place), part, rules, ())) as weights:
        yield weights, lora


def _merged(base: Weights, adapters: Weights, lora: LoRA) -> Weights:
    """Weights with adapters in them: float32 where there are any, for bfloat16 would round them away."""
    stems = {path.removesuffix(f"/{A}") for path in adapters.leaves if path.endswith(f"/{A}")}
    if absent := [stem for stem in sorted(stems) if f"{stem}/kernel" not in base.leaves]:
        raise WeightsError(f"these weights have no {absent[0]}, which adapters were trained for")

    def read(path: str, index: Any) -> np.ndarray:
        array, stem = base.read(path, index), path.removesuffix("/kernel")
        if stem not in stems:
            return array
        a, b = (adapters.read(f"{stem}/{name}", index) for name in (A, B))
        return np.asarray(array, np.float32) + np.float32(lora.scale) * np.matmul(a, b)

    wide = {
        path: jax.ShapeDtypeStruct(leaf.shape, np.float32)
        for path, leaf in base.leaves.items()
        if path.removesuffix("/kernel") in stems
    }
    files = base.files + adapters.files
    return dataclasses.replace(base, leaves={**base.leaves, **wide}, read=read, files=files)


def _zeros(shape: tuple[int, ...]) -> LazyTensor:
    return LazyTensor(shape, np.dtype(np.float32), lambda index: np.zeros(shape, np.float32))


def _trained_part(workdir: Path) -> tuple[str, tuple[Rule, ...], LoRA | None, str]:
    """Which part of a model a run trains, its table of names, and adapters and what they adapt."""
    try:
        config = read_json(workdir / "config.json", WeightsError)
        method, policy = config["method"], dict(config["policy"])
        begun = str(config.get("init", {}).get("gpt", ""))
    except (WeightsError, KeyError, TypeError) as error:
        raise WeightsError(
            f"{workdir} is neither the workdir of a run nor a converted directory: {error}"
        ) from error
    if issubclass(
        METHODS.get(method, Method), TokenizerTraining
    ):  # a file's name is never imported
        return "vq", name_rules("vq")[0], None, ""
    made = make_policy(**policy)
    return "gpt", made.name_rules, made.lora, begun


def _checkpointed(directory: Path, part: str, step: int) -> Weights:
    if not directory.is_dir():
        raise WeightsError(f"{directory} does not exist: the run kept no checkpoints")
    with Checkpointer(directory) as saver:
        steps = saver.steps()
        chosen = max(steps, default=None) if step == -1 else step
        if chosen not in steps:
            have = ", ".join(map(str, steps)) or "none"
            raise WeightsError(f"{directory} has no step {step}; it has {have}")
        abstract = {"params": saver.abstract_item(chosen, "params")}
        found, items = saver.restore(chosen, abstract)
    if found != chosen:
        raise WeightsError(f"step {chosen} is damaged; the newest that verifies is {found}")
    params: Any = items["params"]
    # What a method trains beside a network lies beside it; alone it is all that there is.
    flat = flatten(params.get({"vq": "tokenizer", "gpt": "policy"}[part], params))
    leaves = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in flat.items()}
    return Weights(leaves, lambda name, index: np.asarray(flat[name])[index])
