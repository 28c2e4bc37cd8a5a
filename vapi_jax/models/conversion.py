"""Released weights into a directory of ours: streamed, accounted for, atomic.

A converted directory holds model.safetensors (or shards and their index), whose names are ours behind
"gpt/" or "vq/"; config.json, what the models are; and manifest.json, written last, with the digests
of sources and outputs. It is built under another name and renamed when complete.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vapi_jax import __version__
from vapi_jax.common.digests import sha256_file
from vapi_jax.common.files import new_folder
from vapi_jax.common.progress import byte_progress
from vapi_jax.common.trees import flatten
from vapi_jax.models import janus, llama, vq
from vapi_jax.models.architecture import Architecture, ModelConfig, infer_gpt, infer_vq
from vapi_jax.models.classes import FILE as CLASSES
from vapi_jax.models.classes import read_class_list, write_class_list
from vapi_jax.models.janus import JanusConfig
from vapi_jax.models.llama import LlamaConfig
from vapi_jax.models.loading import BUFFERS, CONFIG, MANIFEST, MODEL, read_origin
from vapi_jax.models.policies import make_policy
from vapi_jax.models.vq import VQConfig, VQModel
from vapi_jax.weights.names import Origin, Rule, WeightsError, check_finite, check_reference
from vapi_jax.weights.tensors import LazyTensor, Outgoing, TensorFile, open_tensors, write_sharded

SHARD_BYTES = 4 * 10**9
"""Weights beyond this are cut into shards."""


def model_shapes(config: ModelConfig) -> dict[str, Any]:
    """The parameters' shapes, nothing computed."""
    return jax.tree.map(lambda leaf: leaf, _traced_shapes(config))  # a tree of the caller's own


@lru_cache(maxsize=8)  # a run asks several times, and tracing takes a second
def _traced_shapes(config: ModelConfig) -> dict[str, Any]:
    if isinstance(config, VQConfig):
        side = 2 * config.downsample_factor
        image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
        return jax.eval_shape(VQModel(config).init, jax.random.key(0), image)["params"]
    kind = "janus"
    if isinstance(config, LlamaConfig):
        kind = "class" if config.model_type == "c2i" else "text"
    return jax.eval_shape(make_policy(kind, **dataclasses.asdict(config)).init, jax.random.key(0))


def name_rules(
    part: str, config: ModelConfig | None = None
) -> tuple[tuple[Rule, ...], tuple[str, ...]]:
    """The table of names of "gpt" or "vq", and the names that are no parameters.

    A generator is LlamaGen's unless its configuration is given and is another's.
    """
    generator = janus if isinstance(config, JanusConfig) else llama
    family = vq if part == "vq" else generator
    return family.NAME_RULES, family.IGNORED_NAMES


# --- in -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Part:
    """One model on its way in."""

    name: str  # "gpt" or "vq"
    file: TensorFile
    architecture: Architecture
    target: dict[str, Any]
    origins: dict[str, Origin]

    @property
    def buffers(self) -> list[str]:
        """Tensors of the source that are no parameters; kept, so that an export has them again."""
        used = {name for origin in self.origins.values() for name in origin.names}
        return [name for name in self.file.tensors if name not in used]

    def outgoing(self, dtype: Any) -> Iterator[Outgoing]:
        """Our parameters, each made from the source when it is written; finite, or a WeightsError."""
        for path, leaf in flatten(self.target).items():
            origin = self.origins[path]
            kept = self.file.tensors[origin.names[0]].dtype if dtype is None else dtype
            pieces = self._pieces(path, origin, jnp.dtype(kept))
            yield Outgoing(f"{self.name}/{path}", leaf.shape, jnp.dtype(kept), pieces)
        for name in self.buffers:
            tensor = self.file.tensors[name]
            pieces = partial(whole, tensor)
            yield Outgoing(f"{self.name}{BUFFERS}{name}", tensor.shape, tensor.dtype, pieces)

    def _pieces(
        self, path: str, origin: Origin, dtype: np.dtype
    ) -> Callable[[], Iterator[np.ndarray]]:
        def pieces() -> Iterator[np.ndarray]:
            for i, name in enumerate(origin.names):
                index = (slice(i, i + 1),) if origin.stacked else ()
                piece = read_origin(self.file.tensors, origin, index)
                check_finite(piece, f"{name} in {self.file.paths[0]}")
                with np.errstate(over="ignore"):
                    written = np.asarray(piece, dtype)
                if not np.isfinite(written).all():
                    raise WeightsError(
                        f"{name} in {self.file.paths[0]} has values up to {np.abs(piece).max():.3g}, too "
                        f"large for --dtype={dtype.name}: take bfloat16 or float32"
                    )
                yield written

        return pieces


def whole(tensor: LazyTensor) -> Iterator[np.ndarray]:
    """A tensor as the one piece that it is written in."""
    yield tensor.read()


def convert(
    out: Path,
    *,
    gpt: Path | None = None,
    vq: Path | None = None,
    gpt_args: Mapping[str, Any] | None = None,
    vq_args: Mapping[str, Any] | None = None,
    image_size: int | None = None,
    t2i: bool = False,
    entry: str = "",
    vq_entry: str = "",
    classes: str = "",
    dtype: str | None = None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, Any]:
    """Converts released LlamaGen files into the directory `out`.

    Args:
      out: must not exist, unless `overwrite`.
      gpt, vq: the generator's and the tokenizer's file, or a folder of shards; one of them at least.
      gpt_args, vq_args: LlamaGen's arguments, where a file is none of the released models.
      image_size: of the images that the generator was trained on, where the file does not tell.
      t2i: a text-conditional generator is expected.
      entry, vq_entry: of a file that holds several models, which; see `open_tensors`.
      classes: list of the generator's classes, as `read_class_list` takes it; kept as classes.txt.
      dtype: "float32" | "bfloat16" | "float16"; None keeps what the file has, bit for bit.
      overwrite: replace an existing directory once the new one is complete.
      shard_bytes: see `SHARD_BYTES`.

    Returns:
      The manifest.

    Raises:
      WeightsError: if a file is refused, holds values that are not finite, or not what is asked for.
      ClassesError: if the list cannot be read.
    """
    if gpt is None and vq is None:
        raise WeightsError("nothing to convert: give --gpt, --vq or both")
    check_place(out, overwrite)
    with ExitStack() as stack:
        parts = []
        if gpt is not None:
            file = stack.enter_context(open_tensors(gpt, entry))
            found = infer_gpt(
                file.shapes, gpt_args, file_name=gpt.name, image_size=image_size, t2i=t2i
            )
            parts.append(make_part("gpt", file, found))
        if vq is not None:
            file = stack.enter_context(open_tensors(vq, vq_entry))
            parts.append(make_part("vq", file, infer_vq(file.shapes, vq_args)))
        check_pair(parts)
        more = {}
        if classes:
            more[CLASSES] = partial(write_class_list, names=_class_names(parts, classes))
        with new_folder(out, replace=overwrite) as folder:
            manifest = write_parts(folder, parts, more, dtype, shard_bytes)
    return manifest


def check_place(out: Path, overwrite: bool) -> None:
    """Raises `WeightsError` where no conversion may be written."""
    if out.exists() and not overwrite:
        raise WeightsError(f"{out} exists: choose another place, or say --overwrite")
    if out.exists() and not (out / MANIFEST).is_file():
        raise WeightsError(f"{out} exists and was not made by a conversion: choose another place")


def _class_names(parts: Sequence[Part], which: str) -> tuple[str, ...]:
    names = read_class_list(which).names
    config = next((part.architecture.config for part in parts if part.name == "gpt"), None)
    if not isinstance(config, LlamaConfig) or config.model_type != "c2i":
        raise WeightsError(f"--classes={which}: no generator with classes is converted")
    if len(names) != config.num_classes:
        raise WeightsError(
            f"--classes={which}: it names {len(names)} classes, the generator has {config.num_classes}"
        )
    return names


def make_part(name: str, file: TensorFile, found: Architecture) -> Part:
    """A model whose tensors are all there, and nothing else.

    Raises:
      WeightsError: see `check_reference`.
    """
    target = model_shapes(found.config)
    try:
        origins = check_reference(file.tensors, target, *name_rules(name, found.config))
    except WeightsError as error:
        raise WeightsError(f"{file.paths[0]}, taken for {found.describe()}: {error}") from error
    return Part(name, file, found, target, origins)


def check_pair(parts: Sequence[Part]) -> None:
    """Raises `WeightsError` where generator and tokenizer have different codes."""
    configs = {part.name: part.architecture.config for part in parts}
    gpt, tokenizer = configs.get("gpt"), configs.get("vq")
    if not (isinstance(gpt, LlamaConfig | JanusConfig) and isinstance(tokenizer, VQConfig)):
        return
    if gpt.vocab_size != tokenizer.codebook_size:
        raise WeightsError(
            f"the generator predicts {gpt.vocab_size} codes and the tokenizer has "
            f"{tokenizer.codebook_size}: they do not belong together"
        )


def write_parts(
    directory: Path,
    parts: Sequence[Part],
    more: Mapping[str, Callable[[Path], Any]],
    dtype: str | None,
    shard_bytes: int,
    **facts: Any,
) -> dict[str, Any]:
    """Fills a converted directory.

    Args:
      directory: empty.
      parts: its models.
      more: name -> what writes that file, for others that belong to it.
      dtype, shard_bytes: as `convert` has them.
      facts: more for the manifest.

    Returns:
      The manifest, which is written last.
    """
    outgoing = [tensor for part in parts for tensor in part.outgoing(dtype)]
    holders: dict[Path, list[str]] = {}
    for part in parts:
        for path in part.file.paths:
            holders.setdefault(path, []).append(part.name)
    sources = [(", ".join(names), path) for path, names in holders.items()]
    total = sum(t.nbytes for t in outgoing) + sum(path.stat().st_size for _, path in sources)
    with byte_progress(total, "convert") as tick:
        described = [
            {
                "part": name,
                "file": path.name,
                "size": path.stat().st_size,
                "sha256": sha256_file(path, tick),
            }
            for name, path in sources
        ]
        digests = write_sharded(directory, MODEL, outgoing, shard_bytes, {"format": "pt"}, tick)
    config = {part.name: part.architecture.to_json() for part in parts}
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (directory / CONFIG).write_text(text, encoding="utf-8")
    digests[CONFIG] = sha256_file(directory / CONFIG)
    for name, write in more.items():
        write(directory / name)
        digests[name] = sha256_file(directory / name)
    manifest = {
        **facts,
        "converter": f"vapi_jax {__version__}",
        "sources": described,
        "outputs": {
            name: {"size": (directory / name).stat().st_size, "sha256": digest}
            for name, digest in digests.items()
        },
        "parameters": {
            part.name: sum(math.prod(leaf.shape) for leaf in flatten(part.target).values())
            for part in parts
        },
        "dtype": dtype or "as in the sources",
        "architecture": {part.name: part.architecture.describe() for part in parts},
        "buffers": {part.name: part.buffers for part in parts},
        "ignored": {part.name: list(part.file.ignored) for part in parts},
    }
    (directory / MANIFEST).write_text(
        json.dumps(manifest, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )
    return manifest
