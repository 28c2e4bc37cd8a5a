"""Next-token cross-entropy with label dropout: how LlamaGen trains its generators (method "base")."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
from jaxtyping import Array, Float, PRNGKeyArray

from vapi_jax.common.options import Errors, Share
from vapi_jax.methods.config import TrainConfig
from vapi_jax.methods.generator import (
    GeneratorMethod,
    check_dropout,
    has_dropout,
    logits_bytes,
)
from vapi_jax.methods.method import Aux, Curve, Scalars, mean_of
from vapi_jax.models.head import block_length, cross_entropy_and_entropy


@dataclasses.dataclass(frozen=True)
class NextTokenOptions:
    """Section `base` of a recipe."""

    label_dropout: Share = 0.1  # share of conditions dropped, so that guidance has its other half


@dataclasses.dataclass(frozen=True)
class NextToken(GeneratorMethod):
    """-log π(x*_t | x*_<t), mean over tokens."""

    title: ClassVar[str] = "training of a base generator"
    section: ClassVar[str] = "base"
    Options: ClassVar[type] = NextTokenOptions
    curves: ClassVar[tuple[Curve, ...]] = (
        ("ce", "Cross-entropy", "nats per token"),
        ("entropy", "Entropy", "nats per token"),
        ("grad_norm", "Gradient norm", "L2 norm, unclipped"),
        ("learning_rate", "Learning rate", "learning rate"),
    )

    @property
    def options(self) -> NextTokenOptions:
        return self.config.options

    @classmethod
    def depends_on_cut(cls, config: TrainConfig) -> bool:
        return has_dropout(config)

    @classmethod
    def check(cls, config: TrainConfig, errors: Errors) -> None:
        super().check(config, errors)
        option = f"{cls.section}.label_dropout"
        check_dropout(config, errors, option, config.options.label_dropout)

    def loss(
        self,
        params: Any,
        extra: Any,
        frozen: Mapping[str, Any],
        batch: Mapping[str, Any],
        rng: PRNGKeyArray,
        step: Array,
    ) -> tuple[Float[Array, ""], tuple[Aux, Any]]:
        del step
        tokens = self.true_tokens(frozen, batch)
        label_rng, dropout_rng = jax.random.split(rng)
        condition = self.drop_conditions(label_rng, batch, self.options.label_dropout)
        dropout_rng = jax.random.fold_in(dropout_rng, batch["index"][0])
        context = tokens[:, : self.policy.context_length]
        hidden = self.policy.hidden(params, condition, context, dropout_rng=dropout_rng)
        ce, entropy = cross_entropy_and_entropy(hidden, self.policy.head(params), tokens)
        return ce.mean(), ({"ce": ce, "entropy": entropy.mean(axis=-1)}, extra)

    def summarize(self, aux: Aux) -> Scalars:
        scalars = mean_of(aux, "ce", "entropy")
        return {"loss": scalars["ce"], **scalars}

    def held_out(
        self,
        params: Any,
        frozen: Mapping[str, Any],
        batch: Mapping[str, Any],
        rng: PRNGKeyArray,
        temperature: Float[Array, ""],
    ) -> Scalars:
        del rng
        tokens = self.true_tokens(frozen, batch)
        context = tokens[:, : self.policy.context_length]
        hidden, head = (
            self.policy.hidden(params, batch["condition"], context), self.policy.head(params)
        )  # fmt: skip
        ce, entropy = cross_entropy_and_entropy(hidden, head, tokens, temperature)
        return {"ce": ce.mean(), "entropy": entropy.mean()}

    def memory(self, rows: int) -> Sequence[tuple[str, int, str]]:
        policy = self.policy
        at_once = block_length(rows, policy.num_tokens, policy.vocab_size)
        logits = logits_bytes(rows, at_once, policy.vocab_size)
        own = ("logits", logits, f"float32, of {at_once} position(s) at a time")
        return [*super().memory(rows), own]
