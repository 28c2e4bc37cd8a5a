"""Supervised fine-tuning: the cross-entropy of VA-π alone, on the same images, contexts and steps (Eq. 9).

    L = w · mean_t -log π(x*_t | x̃_<t),  x* = Q(E(I)),  x̃ ~ K_ξ(. | x*)

The control without a reward: row "CE only" of the paper's Table 4, and of our tables. It draws the contexts
that VA-π draws at the same step of the same seed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from jaxtyping import Array, Float, PRNGKeyArray

from vapi_jax.common.options import Errors, Positive, Share
from vapi_jax.methods.config import TrainConfig
from vapi_jax.methods.corruption import Variant, make_context, purpose_keys
from vapi_jax.methods.method import Aux, Flops
from vapi_jax.methods.next_token import NextToken
from vapi_jax.models.head import cross_entropy_and_entropy


@dataclasses.dataclass(frozen=True)
class SFTOptions:
    """Section `sft` of a recipe."""

    noise_rate: Share = 0.0  # ξ
    corruption: Variant = "paper"  # Eq. 28, without the true token | all of V
    weight: Positive = 1.0  # w; under AdamW it matters where gradients are clipped or tiny


@dataclasses.dataclass(frozen=True)
class SFT(NextToken):
    """The loss above; neither labels nor activations are dropped."""

    title: ClassVar[str] = "supervised fine-tuning"
    label: ClassVar[str] = "SFT"
    section: ClassVar[str] = "sft"
    Options: ClassVar[type] = SFTOptions
    compares: ClassVar[bool] = True

    @property
    def options(self) -> Any:
        return self.config.options

    @classmethod
    def flops(cls, config: TrainConfig, one: Flops) -> float:
        return config.batch_size * (one.encode + 3 * one.policy)

    @classmethod
    def depends_on_cut(cls, config: TrainConfig) -> bool:
        del config
        return False

    @classmethod
    def check(cls, config: TrainConfig, errors: Errors) -> None:
        super(NextToken, cls).check(config, errors)

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
        options: SFTOptions = self.config.options
        tokens = self.true_tokens(frozen, batch)
        keys = purpose_keys(rng, batch["index"])
        vocab = self.policy.vocab_size
        context = make_context(keys[0], tokens, options.noise_rate, vocab, options.corruption)
        fed = context[:, : self.policy.context_length]
        hidden, head = (
            self.policy.hidden(params, batch["condition"], fed), self.policy.head(params)
        )  # fmt: skip
        ce, entropy = cross_entropy_and_entropy(hidden, head, tokens)
        return options.weight * ce.mean(), ({"ce": ce, "entropy": entropy.mean(axis=-1)}, extra)
