"""Eq. 11 with its variants: what VA-π and AR-GRPO do with samples that have been judged.

Shapes as in `vapi_jax.methods.grpo`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vapi_jax.common.options import NotNegative, Positive, Rate, Rule
from vapi_jax.methods import grpo
from vapi_jax.methods.method import Aux
from vapi_jax.models.head import Head, exact_kl, token_log_probs
from vapi_jax.models.policy import Policy
from vapi_jax.rewards import Term, total

AboveZero = Annotated[float, Rule(lambda share: 0.0 < share <= 1.0, "more than 0, at most 1")]


@dataclasses.dataclass(frozen=True)
class GRPOOptions:
    """Options of every method that rewards groups of samples; docs/methods.md has the table."""

    group_size: Annotated[int, Rule(lambda g: g >= 2, "at least 2, for advantages")] = 8  # G
    temperature: Positive = 1.0  # of sampling and of log-probabilities
    clip_epsilon: Positive = 0.2  # ε
    clip_epsilon_high: NotNegative = 0.0  # ε above 1 (clip-higher); 0 for ε
    advantage_clip: Positive = 5.0
    advantage: Literal["sum", "per_reward"] = (
        "sum"  # of the sum of rewards | sum of each reward's own
    )
    advantage_scale: grpo.Scale = "group"  # std of the group | of the batch | none: Dr.GRPO | RLOO
    ratio: Literal["token", "sequence", "sequence_mean"] = (
        "token"  # sequence: Eq. 11 as written; gradient T times larger | sequence_mean: GSPO
    )
    kl: Literal["k3", "k2", "forward", "reverse"] = (
        "k3"  # estimated at the samples, or exact: KL(base || π) | KL(π || base)
    )
    kl_weight: NotNegative = 0.0  # of the KL to the frozen base
    monitor_kl: bool = False  # log the KL to the base though its weight is 0 (a second model)
    entropy_share: AboveZero = 1.0  # share of an image's tokens, those of most entropy, in the loss
    entropy_target: NotNegative = (
        0.0  # nats a token that a learned bonus holds entropy at; 0 for none
    )
    entropy_rate: Positive = 5e-5  # what the bonus's weight moves a step for each nat missing
    entropy_limit: Positive = 1e-3  # largest weight of the bonus, either way
    shuffle_advantages: bool = False  # a control: advantages permuted inside each group
    ema_decay: Rate = 0.0  # of an average of the policy, saved beside it; 0 for none

    @property
    def needs_base(self) -> bool:
        """Whether the frozen base generator has to be run."""
        return self.kl_weight > 0.0 or self.monitor_kl


@dataclasses.dataclass(frozen=True)
class Judged:
    """What one image batch gives before any gradient."""

    tokens: Int[Array, "B T"]  # x* = Q(E(I))
    context: Int[Array, "B T"]  # x̃ ~ K_ξ(. | x*)
    samples: Int[Array, "B G T"]  # x_g ~ π_old(. | x̃)
    values: dict[str, Float[Array, "B G"]]  # each reward by itself
    rewards: Float[Array, "B G"]  # R, Eq. 10
    advantages: Float[Array, "B G *T"]  # A, Eq. 4


def advantages_of(
    values: Mapping[str, Float[Array, "B G"]],
    terms: Sequence[Term],
    config: GRPOOptions,
    axes: Sequence[str] = (),
) -> Float[Array, "B G"]:
    """A of rewards, summed and then normalised, or each normalised and then summed (GDPO)."""
    scale, clip = config.advantage_scale, config.advantage_clip
    if config.advantage == "sum":
        return grpo.scaled_advantages(total(values, terms), scale, clip, axes)
    own: grpo.Scale = "group" if scale == "batch" else scale
    each = {t.name: grpo.scaled_advantages(values[t.name], own, float("inf")) for t in terms}
    summed = total(each, terms)
    if scale == "batch":
        summed = summed / (grpo.batch_std(summed, axes) + 1e-8)
    return jnp.clip(summed, -clip, clip)


def kl_to_base(
    config: GRPOOptions,
    policy: Policy,
    base_params: Any,
    condition: Any,
    fed: Int[Array, "B S"],
    hidden: Float[Array, "BR T D"],
    head: Head,
    samples: Int[Array, "B G T"],
    logps: Float[Array, "B G T"],
) -> Float[Array, "B R T"]:
    """The KL of every token to the frozen base, which runs once for each image.

    Estimated at the samples, or exact: then one number a position for all samples that share `hidden`.
    """
    base = jax.lax.stop_gradient(policy.hidden(base_params, condition, fed))
    base_head = policy.head(jax.lax.stop_gradient(base_params))
    if config.kl in ("k2", "k3"):
        found = token_log_probs(base, base_head, samples, config.temperature)
        return (grpo.k3_kl if config.kl == "k3" else grpo.k2_kl)(logps, found)
    rows = hidden.shape[0] // base.shape[0]
    base = jnp.repeat(base, rows, axis=0)
    kl = exact_kl(hidden, head, base, base_head, config.kl, config.temperature)
    return kl.reshape(-1, rows, kl.shape[-1])


def objective(
    logps: Float[Array, "B G T"],
    old_logps: Float[Array, "B G T"],
    entropy: Float[Array, "BR T"],
    advantages: Float[Array, "B G *t"],
    config: GRPOOptions,
    *,
    kl: Float[Array, "B R T"] | None = None,
    mask: Bool[Array, "B R T"] | None = None,
    weights: Float[Array, "B G T"] | None = None,
    entropy_weight: Float[Array, ""] | None = None,
) -> tuple[Float[Array, ""], Aux]:
    """Mean over images and samples of the clipped surrogate, plus KL and entropy bonus.

    Args:
      logps: log-probabilities under the policy being updated.
      old_logps: the same tokens' under the policy that drew them.
      entropy: of the distributions of an image's tokens, or of each sample's, for masks and metrics;
        differentiable where `entropy_weight` is given.
      advantages: A of each sample, or of each of its tokens.
      config: the method's hyper-parameters.
      kl: from `kl_to_base`.
      mask: tokens that count.
      weights: of tokens in the policy term.
      entropy_weight: of the entropy bonus.
    """
    aux: Aux = {"entropy": entropy.mean(axis=-1)}
    penalty = None
    if kl is not None:
        aux["kl_to_base"] = kl.mean(axis=(1, 2))
        penalty = config.kl_weight * kl if config.kl_weight > 0.0 else None
    if config.entropy_share < 1.0:
        highest = grpo.highest_entropy(jax.lax.stop_gradient(entropy), config.entropy_share)
        highest = highest.reshape(logps.shape[0], -1, logps.shape[-1])
        mask = highest if mask is None else mask & highest
    loss = grpo.clipped_surrogate(
        logps, old_logps, advantages, config.clip_epsilon, config.ratio, mask, penalty,
        config.clip_epsilon_high, weights,
    ).mean()  # fmt: skip
    if entropy_weight is not None:
        loss -= entropy_weight * entropy.mean()
    return loss, aux
