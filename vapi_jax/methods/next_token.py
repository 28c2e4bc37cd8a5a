"""Next-token cross-entropy with label dropout: how LlamaGen trains its generators (method "base")."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from vapi_jax.common.options import Errors, Share
from vapi_jax.methods.config import TrainConfig
from vapi_jax.methods.generator import GeneratorMethod, check_dropout, logits_bytes
from vapi_jax.methods.method import Aux, Curve, Scalars, mean_of
from vapi_jax.models import categorical


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
    def check(cls, config: TrainConfig, errors: Errors) -> None:
        super().check(config, errors)
        check_dropout(config, errors, "base.label_dropout", config.options.label_dropout)

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
        logits = self.policy.logits(params, condition, context, dropout_rng=dropout_rng)
        ce = categorical.cross_entropy(logits, tokens)
        entropy = categorical.entropy(jax.lax.stop_gradient(logits)).mean(axis=-1)
        return ce.mean(), ({"ce": ce, "entropy": entropy}, extra)

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
        logits = self.policy.logits(params, batch["condition"], context)
        ce = categorical.cross_entropy(logits, tokens)
        return {"ce": ce.mean(), "entropy": jnp.mean(categorical.entropy(logits, temperature))}

    def memory(self, rows: int) -> Sequence[tuple[str, int, str]]:
        policy = self.policy
        logits = logits_bytes(rows, policy.num_tokens, policy.vocab_size)
        return [("logits", logits, "float32, of all tokens")]
