"""The contract of a condition: from a raw label, caption or prompt to what a policy takes.

A condition object holds no arrays; a network that it looks through is loaded once in a process. What it
makes is a pytree with a leading batch axis on every leaf, which callers pass along and gather rows of
(`jax.tree.map(lambda x: x[rows], condition)`) without looking inside. A policy names the kind that it
takes; a recipe can put another in its place (`config.condition`, a name of `CONDITIONS` or
"module:Class"), which makes the same pytree from other raw data.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vapi_jax.common.digests import digest_of
from vapi_jax.common.options import Count, Dtype, given
from vapi_jax.common.paths import PathText
from vapi_jax.weights.names import WeightsError

if TYPE_CHECKING:
    from vapi_jax.models.janus_prompts import PromptTokenizer
    from vapi_jax.models.text_encoder import EncodedCaptions, TextEncoder

logger = logging.getLogger(__name__)

Tree = Any
"""A condition as a policy takes it: a pytree of arrays [B, ...]."""


@dataclasses.dataclass(frozen=True)
class Condition(abc.ABC):
    """What a generator is asked for.

    Attributes:
      droppable: whether the model has an unconditional embedding, for guidance and label dropout.
    """

    droppable: bool = given(True)

    @property
    def num_classes(self) -> int | None:
        """How many labels there are; None where conditions are no labels."""
        return None

    @abc.abstractmethod
    def example(self, batch: int) -> Tree:
        """A valid condition of this batch size, for initialisation and shape inference."""

    def longest(self, batch: int) -> Tree:
        """The `example` of the most room that a batch can take, for plans."""
        return self.example(batch)

    def prepare(self, raw: Any) -> Tree:
        """What a data source gives for B samples, as the policy takes it; NumPy, on the host.

        Each process brings samples of its own, so nothing here may wait for another.
        """
        return raw

    def store(self, raw: Any) -> np.ndarray:
        """`raw` as a source may bring it later in its place, when what `prepare` looks through is gone."""
        return np.asarray(raw)

    network_option: ClassVar[str] = ""
    """The option that names a frozen network which `prepare` looks through; "" for a kind without."""

    def shapes(self) -> Any:
        """Shapes of that network's parameters, as far as they can be told; no weights are read."""
        return {}

    def origin(self) -> tuple[str, str] | None:
        """(where its weights are from, what else it is), after a look at its files; None without any.

        Raises:
          WeightsError: they are missing, or do not belong together.
        """
        return None

    def load(self) -> Any:
        """Loads it, and keeps it for this process; raises `WeightsError`."""
        return None

    def describe(self) -> dict[str, Any]:
        """What its values depend on beside the options, such as digests of files; for records."""
        return {}

    def name(self, raw: Any) -> str:
        """What a picture calls one raw condition where nobody knows a better name."""
        return str(raw)

    def unconditional(self, condition: Tree) -> Tree:
        """The other half of classifier-free guidance: same structure, shapes and dtypes.

        Raises:
          ValueError: where the model has no unconditional embedding.
        """
        if not self.droppable:
            raise ValueError(
                "class_dropout_prob is 0: this model has no unconditional embedding, so neither "
                "guidance nor dropping of conditions is possible"
            )
        return self._unconditional(condition)

    @abc.abstractmethod
    def _unconditional(self, condition: Tree) -> Tree:
        """`unconditional` of a model that has one."""


@dataclasses.dataclass(frozen=True)
class Label(Condition):
    """A class: Int[B], 0 .. classes - 1; `classes` itself stands for none."""

    classes: int = 1000

    @property
    def num_classes(self) -> int:
        return self.classes

    def example(self, batch: int) -> Int[Array, " B"]:
        return jnp.zeros((batch,), dtype=jnp.int32)

    def prepare(self, raw: Any) -> Int[np.ndarray, " B"]:
        return np.asarray(raw, np.int32)

    def name(self, raw: Any) -> str:
        return f"class {int(raw)}"

    def _unconditional(self, condition: Int[Array, " B"]) -> Int[Array, " B"]:
        return jnp.full_like(condition, self.classes)


@dataclasses.dataclass(frozen=True)
class Caption(Condition):
    """An encoded caption.

    A dict of features Float[B, P, W] (LEFT padded), mask Bool[B, P] (False = padding) and dropped Bool[B]
    (True = the unconditional embedding replaces the features, under the same mask).

    Attributes:
      length, width: P and W; those of the generator where a recipe leaves them out.
      encoder: folder of the T5 that captions are encoded with, "scenes" for the one that ships; "" where
        the data bring features.
      dtype: that it computes in. LlamaGen's features are bfloat16's.
      clean, lower: see `vapi_jax.models.caption_text.clean_caption`.
    """

    length: Count = 120
    width: Count = 2048
    encoder: PathText = ""
    dtype: Dtype = "bfloat16"
    clean: bool = True
    lower: bool = True

    network_option: ClassVar[str] = "encoder"

    def example(self, batch: int) -> Tree:
        features = jnp.zeros((batch, self.length, self.width), dtype=jnp.float32)
        return text_condition(features, jnp.ones((batch, self.length), dtype=bool))

    def prepare(self, raw: Any) -> Tree:
        """From captions, an array of strings [B], through the encoder; or from their features.

        Raises:
          WeightsError: there is no encoder for captions, or features are of another size.
        """
        kind = getattr(raw, "dtype", np.dtype(object)).kind
        if kind == "U":
            parts = self._encoded(raw)
            features = np.concatenate([part.features for part in parts])
            mask = np.concatenate([part.left_mask for part in parts])
        elif kind == "V":
            features, mask = self._stored(raw)
        else:
            return raw
        return {"features": features, "mask": mask, "dropped": np.zeros(len(raw), bool)}

    def store(self, raw: Any) -> np.ndarray:
        raw, parts = np.asarray(raw), self._encoded(raw)
        letters = max(raw.dtype.itemsize // 4, 1)
        found = np.zeros(len(raw), stored_caption(self.length, self.width, letters))
        features = np.concatenate([part.features for part in parts])
        found["features"] = features.astype(jnp.bfloat16).view(np.uint16)
        found["length"] = np.concatenate([part.left_mask for part in parts]).sum(axis=1)
        found["caption"] = raw
        for flag in CAPTION_FLAGS:
            found[flag] = np.concatenate([getattr(part, flag) for part in parts])
        return found

    def _encoded(self, raw: np.ndarray) -> list[EncodedCaptions]:
        if not self.encoder:
            raise WeightsError(
                "captions have to be encoded: name the folder of a T5 encoder in "
                "condition.options.encoder (condition.name='caption'), or encode the data once, with "
                "python -m vapi_jax.encode dataset, and read that (data.name='encoded')"
            )
        encoder, texts = _text_encoder(self), raw.tolist()
        return [
            encoder(texts[start : start + _AT_ONCE]) for start in range(0, len(texts), _AT_ONCE)
        ]

    def _stored(self, raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found, wanted = raw["features"].shape[1:], (self.length, self.width)
        if found != wanted:
            raise WeightsError(
                f"the data bring {found[0]} features of width {found[1]} for a caption, and the generator "
                f"takes {wanted[0]} of width {wanted[1]}: encode the captions with its own encoder"
            )
        mask = np.arange(self.length) >= self.length - raw["length"][:, None]
        return raw["features"].view(jnp.bfloat16).astype(np.float32), mask

    def name(self, raw: Any) -> str:
        return str(raw["caption"] if getattr(raw, "dtype", None) and raw.dtype.kind == "V" else raw)

    def shapes(self) -> Any:
        from vapi_jax.models import t5, text_encoder

        try:
            folder = text_encoder.folder_of(self.encoder) if self.encoder else None
            config = text_encoder.read_config(folder) if folder else None
        except WeightsError:
            return {}
        return t5.shapes(config, self.dtype) if config else {}

    def origin(self) -> tuple[str, str] | None:
        from vapi_jax.models import text_encoder

        if not self.encoder:
            return None
        text_encoder.look(text_encoder.folder_of(self.encoder), self.width)
        cleaning = "cleaned as LlamaGen's" if self.clean else "as they are"
        return self.encoder, f"{self.dtype}; captions {cleaning}, {self.length} tokens"

    def load(self) -> TextEncoder | None:
        return _text_encoder(self) if self.encoder else None

    def describe(self) -> dict[str, Any]:
        return {} if (encoder := self.load()) is None else encoder.describe()

    def _unconditional(self, condition: Tree) -> Tree:
        return {**condition, "dropped": jnp.ones_like(condition["dropped"])}


_AT_ONCE = 128  # captions

CAPTION_FLAGS = ("empty", "cut", "unknown", "other_script")
"""What is counted of captions; see `vapi_jax.models.text_encoder.EncodedCaptions`."""


@functools.lru_cache(maxsize=2)
def _text_encoder(kind: Caption) -> TextEncoder:
    """The encoder of a condition on this process's devices, its weights split over them."""
    from vapi_jax.models.text_encoder import TextEncoder, folder_of
    from vapi_jax.parallel.sharding import make_mesh, without_virtual_devices

    mesh = without_virtual_devices(make_mesh(1, -1, jax.local_devices()))
    return TextEncoder(
        folder_of(kind.encoder), mesh, dtype=kind.dtype, length=kind.length, clean=kind.clean,
        lower=kind.lower, width=kind.width,
    )  # fmt: skip


def stored_caption(length: int, width: int, letters: int) -> np.dtype:
    """How a data source brings a caption's features: one record a sample, which `Caption` takes.

    "features" uint16 [length, width], bfloat16 by their bits and padded on the LEFT with zeros;
    "length", how many rows are not padding; "caption", the text; and `CAPTION_FLAGS`.
    """
    flags = [(flag, "?") for flag in CAPTION_FLAGS]
    features = ("features", "<u2", (length, width))
    return np.dtype([features, ("length", "<i4"), ("caption", f"<U{letters}"), *flags])


def text_condition(features: Float[Array, "B P W"], mask: Array) -> Tree:
    """The condition of a `Caption` from its features and their mask [B, P] (bool or 0/1)."""
    mask = jnp.asarray(mask).astype(bool)
    dropped = jnp.zeros(mask.shape[:1], dtype=bool)
    return {"features": jnp.asarray(features), "mask": mask, "dropped": dropped}


@dataclasses.dataclass(frozen=True)
class Prompt(Condition):
    """Tokens of a prompt: a dict of tokens Int[B, P] and mask Bool[B, P], padded on either side.

    Attributes:
      pad_id: stands for the caption of an unconditional prompt; that of the generator where a recipe
        leaves it out.
      vocab: rows of the generator's embedding; the same.
      tokenizer: folder of the tokenizer that captions go through; "" where the data bring tokens.
      lengths: P is the shortest of these that has room for a batch, so that few programs are
        compiled; the longest where several processes have to agree. Longer captions lose their end.
      side: of the padding. On the right is how the reference trains, and with policy.padding="counted".
    """

    pad_id: int = 100015
    vocab: Count = 102400
    tokenizer: PathText = ""
    lengths: tuple[Count, ...] = (32, 64, 128, 256)
    side: Literal["left", "right"] = "left"

    def prepare(self, raw: Any) -> Tree:
        """From captions, an array of strings [B], through the tokenizer; or tokens as they are.

        Raises:
          WeightsError: there is no tokenizer for captions, or it is another model's.
        """
        if getattr(raw, "dtype", np.dtype(object)).kind != "U":
            return raw
        if not self.tokenizer:
            raise WeightsError(
                "captions have to become tokens: name the folder that has the generator's tokenizer.json "
                "in condition.options.tokenizer (condition.name='prompt'); a converted one has it"
            )
        tokenizer = self.load()
        static = jax.process_count() > 1
        tokens, mask, cut = tokenizer(raw.tolist(), self.lengths, static, self.side)
        if cut.any():
            logger.warning(
                "%d of %d captions are longer than %d tokens and lose their end, such as %r "
                "(condition.options.lengths)",
                cut.sum(), len(cut), max(self.lengths), raw[cut][0][:80],
            )  # fmt: skip
        return {"tokens": tokens, "mask": mask}

    def load(self) -> PromptTokenizer:
        tokenizer = _prompt_tokenizer(self.tokenizer, self.vocab)
        if tokenizer.pad_id != self.pad_id:
            raise WeightsError(
                f"{tokenizer.path} pads with {tokenizer.pad_id} and the generator with {self.pad_id}: "
                "take the tokenizer of the same model"
            )
        return tokenizer

    def describe(self) -> dict[str, Any]:
        if not self.tokenizer:
            return {}
        lengths = list(self.lengths)
        return {"tokenizer": digest_of(self.load().path), "lengths": lengths, "side": self.side}

    def example(self, batch: int) -> Tree:
        tokens = jnp.zeros((batch, 2), dtype=jnp.int32)
        return {"tokens": tokens, "mask": jnp.ones_like(tokens, dtype=bool)}

    def longest(self, batch: int) -> Tree:
        tokens = jnp.zeros((batch, max(self.lengths)), dtype=jnp.int32)
        return {"tokens": tokens, "mask": jnp.ones_like(tokens, dtype=bool)}

    def _unconditional(self, condition: Tree) -> Tree:
        """All real prompt tokens but the first and the last become `pad_id`, and stay visible."""
        real = condition["mask"]
        count = jnp.cumsum(real.astype(jnp.int32), axis=1)
        inner = real & (count > 1) & (count < count[:, -1:])
        return {**condition, "tokens": jnp.where(inner, self.pad_id, condition["tokens"])}


@functools.lru_cache(maxsize=2)
def _prompt_tokenizer(folder: str, vocab: int) -> PromptTokenizer:
    from vapi_jax.models.janus_prompts import PromptTokenizer

    return PromptTokenizer(Path(folder), vocab)


CONDITIONS: dict[str, type[Condition]] = {"label": Label, "caption": Caption, "prompt": Prompt}


def drop(kind: Condition, keys: Array, condition: Tree, rate: float) -> Tree:
    """Makes each sample unconditional with probability `rate`, decided by its own key of `keys` [B]."""
    if rate <= 0:
        return condition
    return without(kind, dropped(keys, rate), condition)


def dropped(keys: Array, rate: float) -> Bool[Array, " B"]:
    """Which samples are made unconditional."""
    return jax.vmap(lambda key: jax.random.bernoulli(key, rate))(keys)


def without(kind: Condition, which: Bool[Array, " B"], condition: Tree) -> Tree:
    """The conditions, those of some samples unconditional."""

    def pick(empty: Array, given: Array) -> Array:
        return jnp.where(which.reshape(-1, *[1] * (given.ndim - 1)), empty, given)

    return jax.tree.map(pick, kind.unconditional(condition), condition)
