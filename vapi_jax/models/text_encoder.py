"""From captions to the features that a text-conditional generator takes, with a T5 of a user's folder.

The folder is one of Hugging Face: config.json, weights (safetensors or PyTorch's, in shards or not) and
a tokenizer. Everything in it is read as other people's files are: nothing is executed.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int
from safetensors.numpy import save_file

from vapi_jax.common.digests import digest_of
from vapi_jax.common.files import new_file, read_json, write_atomically
from vapi_jax.common.options import Errors, build, hints_of
from vapi_jax.common.progress import announce
from vapi_jax.models import caption_text, t5, text_tokens
from vapi_jax.models.caption_text import clean_caption, has_other_script
from vapi_jax.models.loading import read_finite, reference_weights
from vapi_jax.models.text_tokens import T5Tokenizer
from vapi_jax.parallel import compiler
from vapi_jax.parallel.sharding import host_array, put_sharded, shard_whole, tree_shardings
from vapi_jax.weights.names import WeightsError, to_reference
from vapi_jax.weights.store import SCENES, resolve_shipped
from vapi_jax.weights.tensors import LazyTensor, open_tensors

CONFIG = "config.json"
WEIGHTS = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
"""Names of a folder's weights; the first that is there is read."""

_KIND = {"model_type": "t5", "feed_forward_proj": "gated-gelu"}

LENGTH = 120
"""Tokens of a caption, the end token included, that LlamaGen's generators take."""


@dataclasses.dataclass(frozen=True)
class EncodedCaptions:
    """What a batch of captions became.

    Attributes:
      cleaned: the texts that were encoded.
      ids, mask: their tokens, padded on the right.
      features, left_mask: as a policy takes them, padded on the left; 0 where there is no token.
      cut: captions of more tokens than there is room for, which lost their end.
      unknown: captions with something that the tokenizer has no token for.
      other_script: captions with letters that are not Latin.
    """

    cleaned: tuple[str, ...]
    ids: Int[np.ndarray, "B P"]
    mask: Bool[np.ndarray, "B P"]
    features: Float[np.ndarray, "B P W"]
    left_mask: Bool[np.ndarray, "B P"]
    cut: Bool[np.ndarray, " B"]
    unknown: Bool[np.ndarray, " B"]
    other_script: Bool[np.ndarray, " B"]

    @property
    def empty(self) -> Bool[np.ndarray, " B"]:
        """Captions of which nothing is left: all the generator sees of them is the end token."""
        return np.array([not text for text in self.cleaned], bool)


class TextEncoder:
    """A T5 encoder and its tokenizer on a mesh.

    Attributes:
      folder: where it is from.
      config: of the network.
      length: rows of features, P.
      width: of a feature, W.

    Args:
      folder: of Hugging Face's layout.
      mesh: the batch is split over all its devices, the weights over "fsdp".
      dtype: of weights and arithmetic, "float32" or "bfloat16" (what LlamaGen's features are from).
      length: tokens of a caption; longer ones are cut.
      clean, lower: see `clean_caption`.
      width: that features must have for the generator at hand; None takes any.

    Raises:
      WeightsError: files are missing, damaged, of another model or of another width.
    """

    def __init__(
        self,
        folder: Path,
        mesh: Mesh,
        *,
        dtype: str = "float32",
        length: int = LENGTH,
        clean: bool = True,
        lower: bool = True,
        width: int | None = None,
    ):
        self.folder, self.length, self.dtype = folder, length, dtype
        self.config, self._tokenizer = _open(folder, width)
        self.width = self.config.d_model
        self._clean, self._mesh = {"clean": clean, "lower": lower}, mesh
        self._weights, self._params = _load(folder, self.config, mesh, dtype)
        self._features = jax.jit(
            partial(_features, config=self.config, mesh=mesh),
            compiler_options=compiler.options(mesh),
        )

    def clean(self, caption: str) -> str:
        """The caption before it becomes tokens."""
        return clean_caption(caption, **self._clean)

    def kept(self, caption: str) -> str:
        """What is left of a caption in its tokens."""
        return self._tokenizer.kept(self.clean(caption), self.length)

    def flags(self, captions: Sequence[str]) -> dict[str, Bool[np.ndarray, " B"]]:
        """What `EncodedCaptions` says of captions by `CAPTION_FLAGS`, without encoding them."""
        cleaned = list(map(self.clean, captions))
        tokens = self._tokenizer(cleaned, self.length)
        return {
            "empty": np.array([not text for text in cleaned], bool),
            "cut": tokens.cut,
            "unknown": tokens.unknown,
            "other_script": np.array(list(map(has_other_script, captions)), bool),
        }

    def __call__(self, captions: Sequence[str], rows: int | None = None) -> EncodedCaptions:
        """Encodes captions; every process must bring the same ones.

        Args:
          captions: as people wrote them.
          rows: of the batch that is computed: fewer captions are filled up, so that one program
            serves a short last batch as well.
        """
        cleaned = tuple(map(self.clean, captions))
        tokens = self._tokenizer(cleaned, self.length)
        count = max(rows or 0, len(captions))
        fill = [(0, count - len(captions) + -count % self._mesh.size), (0, 0)]
        ids, mask = np.pad(tokens.ids, fill), np.pad(tokens.mask, fill)
        sharded = shard_whole({"ids": ids, "mask": mask}, self._mesh)
        features, left_mask = self._features(self._params, **sharded)
        other = np.array([has_other_script(caption) for caption in captions], bool)
        left, left_mask = (host_array(x)[: len(captions)] for x in (features, left_mask))
        return EncodedCaptions(
            cleaned, tokens.ids, tokens.mask, left, left_mask, tokens.cut, tokens.unknown, other
        )

    def describe(self) -> dict[str, Any]:
        """What features depend on, for the record."""
        files = (self.folder / CONFIG, self._tokenizer.path, *self._weights)
        libraries = (
            *text_tokens.LIBRARIES,
            *(caption_text.LIBRARIES if self._clean["clean"] else ()),
        )
        return {
            "text_encoder": {path.name: digest_of(path) for path in files},
            "dtype": self.dtype,
            "length": self.length,
            **self._clean,
            "libraries": {name: importlib.metadata.version(name) for name in libraries},
        }


def _features(
    params: t5.Params, ids: Array, mask: Array, config: t5.T5Config, mesh: Mesh
) -> tuple[Float[Array, "B P W"], Bool[Array, "B P"]]:
    features = t5.encode(params, ids, mask, config, mesh)
    return t5.left_padded(features.astype(jnp.float32), mask)


def folder_of(name: str) -> Path:
    """The folder that a recipe names: "scenes" is the one that ships with the package.

    Raises:
      WeightsError: a file of the shipped one is missing or damaged.
    """
    return resolve_shipped("encoder", SCENES) if name == SCENES else Path(name)


def write_config(folder: Path, config: t5.T5Config) -> Path:
    """Writes an encoder's sizes as Hugging Face does, into a folder that is made if absent."""
    folder.mkdir(parents=True, exist_ok=True)
    said = {**_KIND, **dataclasses.asdict(config)}
    write_atomically(folder / CONFIG, json.dumps(said, indent=2) + "\n")
    return folder / CONFIG


def write_weights(folder: Path, params: t5.Params, dtype: Any = np.float32) -> Path:
    """Writes an encoder's weights beside its config.json, under Hugging Face's names."""
    tensors = to_reference(params, t5.NAME_RULES)
    path = folder / "model.safetensors"
    with new_file(path) as unfinished:
        save_file({name: x.astype(dtype) for name, x in tensors.items()}, unfinished)
    return path


def read_config(folder: Path, width: int | None = None) -> t5.T5Config:
    """What config.json of a folder says of the encoder.

    Args:
      folder: of a T5.
      width: that features must have for the generator at hand; None takes any.

    Raises:
      WeightsError: there is none, it is of another kind of model or another width, or its sizes are none.
    """
    path = folder / CONFIG
    if not path.is_file() and folder.is_dir():
        inner = sorted(p.name for p in folder.iterdir() if (p / CONFIG).is_file())
        if inner:
            raise WeightsError(
                f"{folder} has no {CONFIG}, but {', '.join(inner)} in it has: give that"
            )
    said = read_json(path, WeightsError)
    kind, gate = (said.get(name) for name in _KIND)
    if (kind, gate) != tuple(_KIND.values()):
        raise WeightsError(
            f"{path}: model_type={kind!r}, feed_forward_proj={gate!r}; an encoder of T5 v1.1 is wanted "
            "('t5', 'gated-gelu'), such as Flan-T5"
        )
    known, errors = hints_of(t5.T5Config), Errors()
    config = build(t5.T5Config, {k: v for k, v in said.items() if k in known}, "", errors)
    if errors:
        raise WeightsError(f"{path}: " + "; ".join(errors))
    if width not in (None, config.d_model):
        raise WeightsError(
            f"{folder} makes features of width {config.d_model}, the generator takes {width}: Flan-T5 "
            "XL has 2048, XXL 4096, large 1024, base 768. Give the encoder that it was trained with"
        )
    return config


def look(folder: Path, width: int | None = None) -> None:
    """Opens all files of a folder and compares them with one another; no weights are read.

    Raises:
      WeightsError: as `TextEncoder`, as far as can be told without them.
    """
    config, _ = _open(folder, width)
    with open_tensors(_weights_in(folder)) as file:
        target = t5.shapes(config)
        reference_weights(_one_table(file.tensors), target, t5.NAME_RULES, (t5.DECODER,))


def _open(folder: Path, width: int | None) -> tuple[t5.T5Config, T5Tokenizer]:
    c = read_config(folder, width)
    return c, T5Tokenizer(folder, c.vocab_size, c.pad_token_id, c.eos_token_id)


def _weights_in(folder: Path) -> Path:
    path = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        raise WeightsError(f"{folder} has no weights: one of {', '.join(WEIGHTS)} is wanted")
    return path


def _load(
    folder: Path, config: t5.T5Config, mesh: Mesh, dtype: str
) -> tuple[tuple[Path, ...], t5.Params]:
    """The files of weights, and the parameters on the mesh."""
    path, target = _weights_in(folder), t5.shapes(config, dtype)
    with open_tensors(path) as file:
        tensors = _one_table(file.tensors)
        weights = reference_weights(tensors, target, t5.NAME_RULES, (t5.DECODER,))
        announce(
            f"{path}: {len(tensors)} tensors, of which "
            f"{sum(not name.startswith(('shared', 'encoder')) for name in tensors)} are a decoder's "
            "and not read"
        )
        read = partial(read_finite, weights, str(path))
        params = put_sharded(read, target, tree_shardings(target, mesh))
    return file.paths, params


def _one_table(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The tensors with one embedding, which a file may hold under two names, or either of them."""
    table, tied = dict(tensors), "encoder.embed_tokens.weight"
    if tied in table:
        table.setdefault("shared.weight", table[tied])
        del table[tied]
    return table
