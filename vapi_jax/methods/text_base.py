"""Next-token cross-entropy of a generator and of the text encoder in front of it, trained together.

A small generator that starts from nothing has no use for the features of a large language model: it
learns a T5 of its own over the words of its captions. Afterwards the encoder is frozen: written as a
folder, it stands where others have Flan-T5.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from vapi_jax.common.digests import digest_of
from vapi_jax.common.options import Errors
from vapi_jax.common.paths import PathText
from vapi_jax.methods.config import TrainConfig
from vapi_jax.methods.method import Aux, Network, SampledPolicy, Scalars
from vapi_jax.methods.next_token import NextToken, NextTokenOptions
from vapi_jax.models import t5, text_encoder
from vapi_jax.models.caption_text import clean_caption
from vapi_jax.models.conditions import Caption
from vapi_jax.models.text_tokens import T5Tokenizer


@dataclasses.dataclass(frozen=True)
class TextBaseOptions(NextTokenOptions):
    """Section `text_base` of a recipe."""

    # folder with the config.json and the tokenizer of a T5 v1.1, whose weights are drawn anew
    encoder: PathText = ""


@dataclasses.dataclass(frozen=True)
class TextBase(NextToken):
    """-log π(x*_t | x*_<t, T5(caption)), mean over tokens; both networks learn from it."""

    title: ClassVar[str] = "training of a base generator and its text encoder"
    section: ClassVar[str] = "text_base"
    Options: ClassVar[type] = TextBaseOptions
    independent_images: ClassVar[bool] = False  # The compiler places collectives of both networks.

    @property
    def options(self) -> TextBaseOptions:
        return self.config.options

    @classmethod
    def check(cls, config: TrainConfig, errors: Errors) -> None:
        super().check(config, errors)
        if not config.options.encoder:
            errors.append(
                "text_base.encoder: name a folder with the config.json and tokenizer.json of a T5"
            )
        if config.init.gpt:
            errors.append(
                f"init.gpt={config.init.gpt!r}: a generator and its encoder start together, from nothing"
            )
        if config.eval.sampled_every:
            errors.append(
                "eval.sampled_every: samples want a frozen encoder; set it to 0, and sample afterwards"
            )
        if config.condition.name != "caption" or config.condition.options.get("encoder"):
            errors.append(
                "condition.name: text_base wants 'caption', without condition.options.encoder"
            )

    @cached_property
    def captions(self) -> Caption:
        """The kind of condition, whose encoder is trained here."""
        assert isinstance(self.condition, Caption), "checked before"
        return self.condition

    @cached_property
    def _folder(self) -> Path:
        return Path(self.options.encoder)

    @cached_property
    def encoder(self) -> t5.T5Config:
        """Sizes of the text encoder."""
        return text_encoder.read_config(self._folder, self.captions.width)

    @cached_property
    def _tokenizer(self) -> T5Tokenizer:
        c = self.encoder
        return T5Tokenizer(self._folder, c.vocab_size, c.pad_token_id, c.eos_token_id)

    def networks(self) -> list[Network]:
        return [
            *super().networks(),
            Network("encoder", "text_base.encoder", lambda: t5.shapes(self.encoder)),
        ]

    @property
    def init_from(self) -> None:
        return None

    def init(self, rng: PRNGKeyArray) -> Any:
        first, second = jax.random.split(rng)
        return {"policy": self.policy.init(first), "encoder": t5.init(second, self.encoder)}

    def describe(self) -> dict[str, Any]:
        return {"text_tokenizer": digest_of(self._tokenizer.path)}

    def prepare(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Captions as token ids, padded on the right."""
        kind = self.captions
        texts = [
            clean_caption(x, clean=kind.clean, lower=kind.lower)
            for x in batch["condition"].tolist()
        ]
        tokens = self._tokenizer(texts, kind.length)
        return {**batch, "condition": {"ids": tokens.ids, "mask": tokens.mask}}

    def example_batch(self, rows: int) -> dict[str, Any]:
        shape = rows, self.captions.length
        ids, mask = jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, bool)
        return {**super().example_batch(rows), "condition": {"ids": ids, "mask": mask}}

    def _encoded(self, params: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The batch with features of its captions, as the generator takes them."""
        ids, mask = batch["condition"]["ids"], batch["condition"]["mask"]
        features, mask = t5.left_padded(
            t5.encode(params["encoder"], ids, mask, self.encoder, self.mesh), mask
        )
        dropped = jnp.zeros(len(ids), bool)
        return {**batch, "condition": {"features": features, "mask": mask, "dropped": dropped}}

    def loss(
        self,
        params: Any,
        extra: Any,
        frozen: Mapping[str, Any],
        batch: Mapping[str, Any],
        rng: PRNGKeyArray,
        step: Array,
    ) -> tuple[Float[Array, ""], tuple[Aux, Any]]:
        batch = self._encoded(params, batch)
        return super().loss(params["policy"], extra, frozen, batch, rng, step)

    def held_out(
        self,
        params: Any,
        frozen: Mapping[str, Any],
        batch: Mapping[str, Any],
        rng: PRNGKeyArray,
        temperature: Float[Array, ""],
    ) -> Scalars:
        batch = self._encoded(params, batch)
        return super().held_out(params["policy"], frozen, batch, rng, temperature)

    def weights_of(self, params: Any, extra: Any) -> dict[str, Any]:
        del extra
        return {"policy": params["policy"], "encoder": params["encoder"]}

    def narrowed(self, params: Any) -> Any:
        return {**params, "policy": self.policy.narrowed(params["policy"])}

    def sampled(self) -> SampledPolicy | None:
        """None: conditions of samples are made on the host, by an encoder that is done."""
        return None
