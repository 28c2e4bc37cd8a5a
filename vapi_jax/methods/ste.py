"""Straight-through training: the pixel loss through the decoder and the choice of tokens (paper, C.1).

    p = softmax(l / τ),  k = argmax l,  z = stop(c_k - p C) + p C
    L = Σ weight · loss(D(z), I) + β CE

The value of z is the code c_k of the chosen token; its gradient is that of the mean code p C. With Gumbel
noise g, l + g stands for l: k is then a sample, as in the reference implementation
(`autoregressive/train/train_c2i_ste.py`). Argmax moves the mode alone; Gumbel's gradient is biased. Losses
and their weights are the recipe's `rewards`, each minus a loss, and have to be differentiable in the image.

p is B·T·V numbers; it exists a block of positions at a time, and is computed again for the gradient.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from vapi_jax.common.options import Errors, NotNegative, Positive, Share
from vapi_jax.methods.config import TrainConfig
from vapi_jax.methods.corruption import Variant, make_context, purpose_keys
from vapi_jax.methods.generator import check_dropout, has_dropout, logits_bytes
from vapi_jax.methods.method import Aux, Curve, Flops, Scalars, mean_of
from vapi_jax.methods.rewarded import RewardedMethod
from vapi_jax.models import conditions
from vapi_jax.models.head import (
    BLOCK_LOGITS,
    Head,
    block_length,
    blockwise,
    cross_entropy_and_entropy,
    project,
)
from vapi_jax.models.pixels import KEPT
from vapi_jax.rewards import make_terms, total


@dataclasses.dataclass(frozen=True)
class STEOptions:
    """Section `ste` of a recipe. The paper leaves τ and the weights open."""

    choice: Literal["argmax", "gumbel"] = "argmax"  # the most probable token | a sample
    codes: Literal["decoded", "raw"] = "decoded"  # as the decoder gets them | as they are stored
    tau: Positive = 1.0  # τ
    temperature: Positive = 1.0  # divides the logits, before the noise
    ce_weight: NotNegative = 0.1  # β
    noise_rate: Share = 0.0  # ξ
    corruption: Variant = "paper"  # Eq. 28, without the true token | all of V
    dropout: bool = False  # the model's, and labels'
    label_dropout: Share = 0.1  # conditions dropped, with dropout


def straight_through(
    logits: Float[Array, "*s V"],
    codes: Float[Array, "V D"],
    tau: float = 1.0,
    noise: Float[Array, "*s V"] | None = None,
) -> tuple[Float[Array, "*s D"], Int[Array, "*s"]]:
    """z and k of the module's equations."""
    logits = logits if noise is None else logits + noise
    chosen = jnp.argmax(logits, axis=-1)
    mean = jax.nn.softmax(logits / tau, axis=-1) @ codes
    return codes[chosen] + (mean - jax.lax.stop_gradient(mean)), chosen


def straight_through_of_hidden(
    hidden: Float[Array, "B T D"],
    head: Head,
    codes: Float[Array, "V E"],
    options: STEOptions,
    keys: PRNGKeyArray,
    limit: int = BLOCK_LOGITS,
) -> tuple[Float[Array, "B T E"], Int[Array, "B T"]]:
    """`straight_through` in blocks of positions; `keys` [B] make each image's noise."""

    def gumbel(key: PRNGKeyArray, places: Array) -> Array:
        at = jax.vmap(lambda place: jax.random.fold_in(key, place))(places)
        return jax.vmap(lambda k: jax.random.gumbel(k, codes.shape[:1]))(at)

    def block(hidden: Array, places: Array) -> tuple[Array, Array]:
        logits = project(hidden, head) / options.temperature
        noise = jax.vmap(gumbel)(keys, places) if options.choice == "gumbel" else None
        return straight_through(logits, codes, options.tau, noise)

    places = jnp.broadcast_to(jnp.arange(hidden.shape[1]), hidden.shape[:2])
    return blockwise(block, codes.shape[0], hidden, places, limit=limit)


@dataclasses.dataclass(frozen=True)
class STE(RewardedMethod):
    """The equations above, on contexts as VA-π has them."""

    title: ClassVar[str] = "straight-through training"
    label: ClassVar[str] = "STE"
    section: ClassVar[str] = "ste"
    Options: ClassVar[type] = STEOptions
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "reference": {
            "ste": {"choice": "gumbel", "codes": "raw", "ce_weight": 0.0, "dropout": True},
            "rewards": "mse",
        },
    }
    headline: ClassVar[tuple[str, ...]] = ("loss", "reward", "ce")
    curves: ClassVar[tuple[Curve, ...]] = (
        ("reward", "Reward", "reward"),
        ("held_out/reward", "Reward, held-out", "reward"),
        ("ce", "Cross-entropy", "nats per token"),
        ("entropy", "Policy entropy", "nats per token"),
        ("grad_norm", "Gradient norm", "L2 norm, unclipped"),
    )
    compares: ClassVar[bool] = True

    @property
    def options(self) -> STEOptions:
        return self.config.options

    @classmethod
    def flops(cls, config: TrainConfig, one: Flops) -> float:
        return config.batch_size * (one.encode + 3 * one.policy + 2 * one.decode + 3 * one.rewards)

    @classmethod
    def depends_on_cut(cls, config: TrainConfig) -> bool:
        return bool(config.options.dropout and has_dropout(config))

    @classmethod
    def check(cls, config: TrainConfig, errors: Errors) -> None:
        unknown = errors.concern("rewards")
        super().check(config, errors)
        if config.options.dropout:
            check_dropout(config, errors, "ste.label_dropout", config.options.label_dropout)
        for term in () if unknown else make_terms(config.rewards):
            if not term.reward.differentiable:
                errors.append(
                    f"rewards.{term.name}: has no gradient in the image, which this method learns from; "
                    "leave it out, or choose a method that compares samples ('vapi', 'ar_grpo')"
                )

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
        options, policy = self.options, self.policy
        keys = purpose_keys(rng, batch["index"])
        tokens = self.true_tokens(frozen, batch)
        noisy = make_context(
            keys[0], tokens, options.noise_rate, policy.vocab_size, options.corruption
        )
        condition, dropout_rng = batch["condition"], None
        if options.dropout:
            dropout_rng = jax.random.fold_in(rng, batch["index"][0])
            rate = options.label_dropout
            condition = conditions.drop(policy.condition, keys[2], condition, rate)
        hidden = policy.hidden(
            params, condition, noisy[:, : policy.context_length], dropout_rng=dropout_rng
        )
        head = policy.head(params)
        codes = self.codes(frozen)
        latents, chosen = straight_through_of_hidden(hidden, head, codes, options, keys[1])
        seen = {name: frozen[name] for name in ("tokenizer", "rewards")}
        known = {name: batch[name] for name in ("image", "condition")}
        values = self.judged_pixels.judge_latents(seen, latents, chosen, known, self.judges)
        ce, entropy = cross_entropy_and_entropy(hidden, head, tokens)
        reward = total(values, self.terms)
        loss = options.ce_weight * ce - reward
        aux = {f"reward_{name}": value for name, value in values.items()}
        aux |= {"loss": loss, "reward": reward, "ce": ce, "entropy": entropy.mean(axis=-1)}
        return loss.mean(), (aux, extra)

    def codes(self, frozen: Mapping[str, Any]) -> Float[Array, "V D"]:
        """The codebook that latents are mixed of."""
        if self.options.codes == "raw":
            return frozen["tokenizer"]["codebook"]["embedding"]
        params = {"params": frozen["tokenizer"]}
        found: Array = self.pixels.tokenizer.apply(params, method="codes")
        return found

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
        """Of the tokens that training chooses; without dropout."""
        del temperature
        batch = {**batch, "index": jnp.arange(batch["image"].shape[0])}
        still = dataclasses.replace(self.config, options=self._without_dropout)
        method = dataclasses.replace(self, config=still)
        _, (aux, _) = method.loss(params, {}, frozen, batch, rng, jnp.zeros((), jnp.int32))
        return mean_of(aux, *aux)

    @property
    def _without_dropout(self) -> STEOptions:
        return dataclasses.replace(self.options, dropout=False)

    def memory(self, rows: int) -> Sequence[tuple[str, int, str]]:
        policy, side = self.policy, self.config.data.image_size
        at_once = block_length(rows, policy.num_tokens, policy.vocab_size)
        logits = logits_bytes(rows, at_once, policy.vocab_size)
        images, maps = self.judged_pixels.at_once(rows, KEPT, side)
        return [
            *super().memory(rows),
            ("logits", logits, f"float32, of {at_once} position(s) at a time"),
            ("decoding", maps, f"{images // KEPT} image(s) at a time, for the backward pass"),
        ]
