"""Condition contrastive alignment (arXiv 2410.09347): the true class of an image against another one.

    r(x, c) = β Σ_t [log π(x_t | x_<t, c) - log π_base(x_t | x_<t, c)]
    CCA         L = [-log σ(r(x, c)) - λ log σ(-r(x, c'))] / max(λ, 1)
    DPO         L = -log σ(r(x, c) - r(x, c'))
    unlearning  L = [-r(x, c) + λ r(x, c')] / (β max(λ, 1))

c' is the class of the next image in the batch. A share of the images is made unconditional on both sides,
which keeps guidance usable; there, and where c' happens to be c, the second term counts as a positive,
-λ log σ(r(x, c')). Of DPO such a pair says nothing, and its gradient is zero.

Only teacher-forced log-probabilities are needed: two forwards of the policy and two of the frozen base an
image, no decoder, no rollout. Source: thu-ml/CCA, `LlamaGen_finetune.py`, which gives what counts as a
positive the weight 1 in place of λ (`preset="reference"`), and has dropout on in policy and base.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from vapi_jax.common.options import Errors, NotNegative, Positive, Rate
from vapi_jax.methods.config import TrainConfig
from vapi_jax.methods.generator import GeneratorMethod, check_dropout, has_dropout, logits_bytes
from vapi_jax.methods.method import Aux, Curve, Flops, Scalars, mean_of
from vapi_jax.models import conditions
from vapi_jax.models.head import block_length, cross_entropy_and_entropy, token_log_probs


@dataclasses.dataclass(frozen=True)
class CCAOptions:
    """Section `cca` of a recipe: by default as published for LlamaGen-B, XL and XXL."""

    variant: Literal["cca", "dpo", "unlearning"] = "cca"
    beta: Positive = 0.02  # β
    negative_weight: NotNegative = 1000.0  # λ
    unconditional: Rate = 0.1  # share of images without their class
    positive_weight: Literal["negative", "one"] = "negative"  # of what counts as a positive: λ | 1
    dropout: bool = False  # the model's, in policy and base


def contrastive_loss(
    gap: Float[Array, " B"],
    other: Float[Array, " B"],
    positive: Bool[Array, " B"],
    options: CCAOptions,
) -> Float[Array, " B"]:
    """The losses above, an image each.

    Args:
      gap: Σ_t log π - log π_base of an image under its own class.
      other: the same under the other class.
      positive: where the other class is the same, or both are none.
      options: the method's.
    """
    beta, weight = options.beta, options.negative_weight
    weights = jnp.full(gap.shape, weight)
    if options.positive_weight == "one":
        weights = jnp.where(positive, 1.0, weights)
    away = jnp.where(positive, other, -other)
    if options.variant == "dpo":
        return -jax.nn.log_sigmoid(beta * (gap - other))
    if options.variant == "unlearning":
        return -(gap + weights * away) / max(weight, 1.0)
    own = jax.nn.log_sigmoid(beta * gap)
    return -(own + weights * jax.nn.log_sigmoid(beta * away)) / max(weight, 1.0)


@dataclasses.dataclass(frozen=True)
class CCA(GeneratorMethod):
    """The equations above; the base is the generator that the run starts from."""

    title: ClassVar[str] = "condition contrastive alignment"
    label: ClassVar[str] = "CCA"
    section: ClassVar[str] = "cca"
    Options: ClassVar[type] = CCAOptions
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "reference": {"cca": {"positive_weight": "one", "dropout": True}},
    }
    headline: ClassVar[tuple[str, ...]] = ("loss", "margin", "accuracy")
    curves: ClassVar[tuple[Curve, ...]] = (
        ("margin", "Margin of the true class", "nats per image, over the base's"),
        ("held_out/margin", "Margin, held-out", "nats per image"),
        ("accuracy", "True class preferred", "share of pairs"),
        ("ce", "Cross-entropy", "nats per token"),
        ("grad_norm", "Gradient norm", "L2 norm, unclipped"),
    )
    compares: ClassVar[bool] = True
    rolls_out: ClassVar[bool] = True  # a pair is of one batch, however that is cut up
    keeps_start: ClassVar[bool] = True

    @property
    def options(self) -> CCAOptions:
        return self.config.options

    @classmethod
    def flops(cls, config: TrainConfig, one: Flops) -> float:
        return config.batch_size * (one.encode + 2 * (3 + 1) * one.policy)

    @classmethod
    def depends_on_cut(cls, config: TrainConfig) -> bool:
        return bool(config.options.dropout and has_dropout(config))

    @classmethod
    def check(cls, config: TrainConfig, errors: Errors) -> None:
        super().check(config, errors)
        check_dropout(config, errors, "cca.unconditional", config.options.unconditional)

    def rollout(
        self,
        params: Any,
        frozen: Mapping[str, Any],
        batch: Mapping[str, Any],
        rng: PRNGKeyArray,
        step: Array,
    ) -> dict[str, Any]:
        """The batch, and for each image the condition of the next one."""
        del params, frozen, rng, step
        return {**batch, "other": jax.tree.map(_of_the_next, batch["condition"])}

    def log_probs(
        self, params: Any, condition: Any, tokens: Int[Array, "B T"], rng: PRNGKeyArray | None
    ) -> Float[Array, " B"]:
        """log π(x | c) of every image."""
        fed = tokens[:, : self.policy.context_length]
        hidden = self.policy.hidden(params, condition, fed, dropout_rng=rng)
        logps = token_log_probs(hidden, self.policy.head(params), tokens[:, None])
        return logps.sum(axis=(1, 2))

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
        options, kind = self.options, self.policy.condition
        tokens = self.true_tokens(frozen, batch)
        keys = jax.vmap(partial(jax.random.fold_in, rng))(batch["index"])
        dropped = conditions.dropped(keys, options.unconditional)
        pair = [batch["condition"], batch["other"]]
        positive = dropped | _same(*pair)
        if options.unconditional > 0.0:
            pair = [conditions.without(kind, dropped, one) for one in pair]
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), *pair)
        twice = jnp.concatenate([tokens, tokens])
        rngs: Any = (None, None)
        if options.dropout:
            rngs = jax.random.split(jax.random.fold_in(rng, batch["index"][0]))
        logps = self.log_probs(params, both, twice, rngs[0])
        base = jax.lax.stop_gradient(self.log_probs(frozen["base"], both, twice, rngs[1]))
        gap, other = (logps - base).reshape(2, -1)
        loss = contrastive_loss(gap, other, positive, options)
        aux = {
            "loss": loss,
            "margin": gap - other,
            "gap": gap,
            "other_gap": other,
            "accuracy": (gap > other).astype(jnp.float32),
            "ce": -logps[: len(gap)] / tokens.shape[1],
        }
        return loss.mean(), (aux, extra)

    def summarize(self, aux: Aux) -> Scalars:
        return mean_of(aux, *aux)

    def held_out(
        self,
        params: Any,
        frozen: Mapping[str, Any],
        batch: Mapping[str, Any],
        rng: PRNGKeyArray,
        temperature: Float[Array, ""],
    ) -> Scalars:
        """The margin is the policy's own, not over the base's; without dropped conditions."""
        del rng
        tokens, condition = self.true_tokens(frozen, batch), batch["condition"]
        fed = tokens[:, : self.policy.context_length]
        hidden, head = self.policy.hidden(params, condition, fed), self.policy.head(params)
        ce, entropy = cross_entropy_and_entropy(hidden, head, tokens, temperature)
        other = self.log_probs(params, jax.tree.map(_of_the_next, condition), tokens, None)
        margin = -ce * tokens.shape[1] - other
        return {"margin": margin.mean(), "ce": ce.mean(), "entropy": entropy.mean()}

    def memory(self, rows: int) -> Sequence[tuple[str, int, str]]:
        policy = self.policy
        at_once = block_length(2 * rows, policy.num_tokens, policy.vocab_size)
        logits = logits_bytes(2 * rows, at_once, policy.vocab_size)
        own = ("logits", logits, f"float32, of {at_once} position(s) at a time")
        return [*super().memory(rows), own]


def _of_the_next(x: Array) -> Array:
    return jnp.roll(x, -1, axis=0)


def _same(a: Any, b: Any) -> Bool[Array, " B"]:
    """Whether two conditions are one, sample by sample."""
    equal = [
        (x == y).reshape(x.shape[0], -1).all(axis=1)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    ]
    return jnp.stack(equal).all(axis=0)
