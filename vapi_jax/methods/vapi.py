"""VA-π on one page. Start here.

    images ─ E,Q ─▶ tokens x* ─ K_ξ ─▶ context x̃ ─ π_θ ─▶ logits ─ draw G ─▶ samples ─ D ─▶ pixels
                        │                                   │                              │ reward
                        └───────────── CE (Eq. 9) ──────────┤                              ▼
                                                            └── clipped policy gradient ◀─ advantages

Shapes: B images, G samples of each, T tokens of an image, V vocabulary, P conditioning positions.

There are two ways through the page. `vapi_loss` uses that the G samples of an image share their
context, and that one update per rollout leaves ρ = π_θ/π_old = 1: ONE forward and ONE backward per
image serve sampling, policy gradient and cross-entropy, and of the logits only the few numbers that
these need ever exist (`vapi_jax.models.head`). `plain_vapi_loss` runs the B·G sequences of the reference
implementation with a sampling forward of their own, and all their logits; without dropout its
gradient is the same, and the tests hold the two together.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from vapi_jax.methods import grpo
from vapi_jax.methods.corruption import corrupt
from vapi_jax.models import categorical
from vapi_jax.models.categorical import sample_group, uniforms_24
from vapi_jax.models.head import Head, draw, token_log_probs
from vapi_jax.models.policy import Policy, drop_condition
from vapi_jax.rewards.reconstruction import RewardWeights, reward


@dataclasses.dataclass(frozen=True)
class VAPiConfig:
    """Hyper-parameters of the method; the defaults are the paper's (Table 7, C2I)."""

    group_size: int = 8  # G >= 2
    noise_rate: float = 0.0  # ξ in [0, 1]
    corruption: str = "paper"  # "paper": Eq. 28, without the true token | "full": all of V
    temperature: float = 1.0  # of sampling and of log-probabilities, > 0
    ce_weight: float = 0.1  # β
    clip_epsilon: float = 0.2  # ε
    advantage_clip: float = 5.0
    ratio: str = "token"  # "token" | "sequence" (Eq. 11 as written; gradient T times larger)
    mse_reduction: str = "mean"  # "mean" | "sum" (Eq. 31 as written)
    kl_weight: float = 0.0  # k3 KL to the frozen base
    monitor_kl: bool = False  # log the KL to the base though its weight is 0 (a second model)
    token_dropout: float = 0.0  # share of tokens left out of the policy loss, in [0, 1)
    shuffle_advantages: bool = False  # a control: advantages permuted inside each group
    policy_gradient: bool = True  # False leaves the CE term alone: a control
    fused: bool = True  # False: B·G sequences and a separate sampling forward
    update_dropout: bool = False  # the model's dropout in the update; needs fused=False
    label_dropout: float = 0.1  # conditions dropped in an update with dropout

    @property
    def needs_base(self) -> bool:
        """Whether the frozen base generator has to be run."""
        return self.kl_weight > 0.0 or self.monitor_kl


# What "paper" and "reference" mean; a third, "equations", takes Eq. 11 and 31 to the letter.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "reference": {
        "corruption": "full",
        "fused": False,
        "update_dropout": True,
        "monitor_kl": True,
    },
    "equations": {"ratio": "sequence", "mse_reduction": "sum"},
}

Aux = dict[str, Array]
Encode = Callable[[Float[Array, "B H W 3"]], Int[Array, "B T"]]
RewardLosses = Callable[
    [Int[Array, "B G T"], Float[Array, "B H W 3"]], dict[str, Float[Array, "B G"]]
]


@dataclasses.dataclass(frozen=True)
class Rollout:
    """What one image batch gives before any gradient."""

    tokens: Int[Array, "B T"]  # x* = Q(E(I))
    context: Int[Array, "B T"]  # x̃ ~ K_ξ(. | x*)
    samples: Int[Array, "B G T"]  # x_g ~ π_old(. | x̃)
    losses: dict[str, Float[Array, "B G"]]  # the reward's terms
    rewards: Float[Array, "B G"]  # R, Eq. 10
    advantages: Float[Array, "B G"]  # A, Eq. 4


def purpose_keys(rng: PRNGKeyArray, index: Int[Array, " B"]) -> PRNGKeyArray:
    """Keys [4, B] that belong to an image and a purpose, whatever microbatch or device it is on."""
    keys = jax.vmap(lambda i: jax.random.split(jax.random.fold_in(rng, i), 4))(index)
    return jnp.swapaxes(keys, 0, 1)


def true_tokens(batch: dict[str, Any], encode: Encode) -> Int[Array, "B T"]:
    """x*: encoded here, or where the batch brings them, beforehand."""
    return batch["tokens"] if "tokens" in batch else encode(batch["image"])


def make_context(
    keys: PRNGKeyArray, tokens: Int[Array, "B T"], vocab_size: int, config: VAPiConfig
) -> Int[Array, "B T"]:
    """x̃ ~ K_ξ(. | x*), Eq. 28."""
    return jax.vmap(
        lambda key, x: corrupt(key, x, config.noise_rate, vocab_size, config.corruption)
    )(keys, tokens)


def roll_out(
    samples: Int[Array, "B G T"],
    tokens: Int[Array, "B T"],
    context: Int[Array, "B T"],
    images: Float[Array, "B H W 3"],
    keys: PRNGKeyArray,
    config: VAPiConfig,
    weights: RewardWeights,
    reward_losses: RewardLosses,
) -> Rollout:
    """Decodes and rewards the G samples of each image; no gradient."""
    losses = jax.lax.stop_gradient(reward_losses(samples, images))
    rewards = reward(losses, weights)
    advantages = grpo.group_advantages(rewards, config.advantage_clip)
    if config.shuffle_advantages:
        advantages = jax.vmap(jax.random.permutation)(keys[2], advantages)
    return Rollout(tokens, context, samples, losses, rewards, advantages)


def vapi_loss(
    params: Any,
    batch: dict[str, Any],
    rng: PRNGKeyArray,
    *,
    policy: Policy,
    encode: Encode,
    reward_losses: RewardLosses,
    weights: RewardWeights,
    config: VAPiConfig,
    base_params: Any = None,
    dropout_rng: PRNGKeyArray | None = None,
) -> tuple[Float[Array, ""], Aux]:
    """-J_VA-π (Eq. 11) of a batch of images, one forward per image.

    Args:
      params: θ, the only thing that is trained.
      batch: "image" [B, H, W, 3] in [-1, 1], "condition" as the policy takes it, "index" [B]: the
        images' places in the whole batch, from which their randomness derives; and "tokens" [B, T]
        where the images are encoded already.
      rng: key of this step.
      policy: the generator's contract.
      encode: the frozen tokenizer's E and Q.
      reward_losses: the reward's terms of samples [B, G, T] against their images.
      weights: of those terms.
      config: the method's hyper-parameters.
      base_params: the frozen base generator, where config.needs_base.
      dropout_rng: unused here; `plain_vapi_loss` takes it.

    Returns:
      The scalar loss, and per-image arrays for metrics.
    """
    del dropout_rng
    keys = purpose_keys(rng, batch["index"])
    tokens = true_tokens(batch, encode)  # x* = Q(E(I)), Eq. 1
    context = make_context(keys[0], tokens, policy.vocab_size, config)  # x̃, Eq. 28
    fed = context[:, : policy.context_length]  # the last token predicts nothing
    hidden, head = policy.hidden(params, batch["condition"], fed), policy.head(params)
    samples, entropy = draw(
        hidden, head, group_uniforms(keys[1], tokens, config), config.temperature
    )
    rollout = roll_out(
        samples, tokens, context, batch["image"], keys, config, weights, reward_losses
    )
    logps, true_logps = score(hidden, head, samples, tokens, config)  # of π_θ(. | x̃_<t), Eq. 7
    old_logps = jax.lax.stop_gradient(logps)  # one update per rollout: π_old is π_θ
    ce = -true_logps.mean(axis=-1)  # L_prior, Eq. 9
    return objective(
        logps, old_logps, ce, entropy, rollout, batch, keys, policy, config, base_params
    )


def group_uniforms(
    keys: PRNGKeyArray, tokens: Int[Array, "B T"], config: VAPiConfig
) -> Float[Array, "B T G"]:
    """What the draws of each image are made from; its own, whatever the batch around it."""
    shape = (tokens.shape[1], config.group_size)
    return jax.vmap(lambda key: uniforms_24(key, shape))(keys)


def score(
    hidden: Float[Array, "B T D"],
    head: Head,
    samples: Int[Array, "B G T"],
    tokens: Int[Array, "B T"],
    config: VAPiConfig,
) -> tuple[Float[Array, "B G T"], Float[Array, "B T"]]:
    """Log-probabilities of the samples at the sampling temperature, and of the truth at 1."""
    if isinstance(config.temperature, float) and config.temperature == 1.0:
        together = jnp.concatenate([samples, tokens[:, None]], axis=1)
        logps = token_log_probs(hidden, head, together)
        return logps[:, :-1], logps[:, -1]
    return (
        token_log_probs(hidden, head, samples, config.temperature),
        token_log_probs(hidden, head, tokens[:, None])[:, 0],
    )


def plain_vapi_loss(
    params: Any,
    batch: dict[str, Any],
    rng: PRNGKeyArray,
    *,
    policy: Policy,
    encode: Encode,
    reward_losses: RewardLosses,
    weights: RewardWeights,
    config: VAPiConfig,
    base_params: Any = None,
    dropout_rng: PRNGKeyArray | None = None,
) -> tuple[Float[Array, ""], Aux]:
    """The same objective over B·G sequences, as the reference implementation runs it: the oracle.

    With `dropout_rng` the update forward drops activations and labels while sampling does not, so
    ρ differs from 1 at once. Arguments and results as `vapi_loss`.
    """
    keys = purpose_keys(rng, batch["index"])
    tokens = true_tokens(batch, encode)
    context = make_context(keys[0], tokens, policy.vocab_size, config)
    fed = context[:, : policy.context_length]
    old_logits = policy.logits(jax.lax.stop_gradient(params), batch["condition"], fed)
    samples = jax.vmap(
        lambda key, row: sample_group(key, row, config.group_size, config.temperature)
    )(keys[1], old_logits)
    rollout = roll_out(
        samples, tokens, context, batch["image"], keys, config, weights, reward_losses
    )
    old_logps = categorical.token_log_probs(old_logits, rollout.samples, config.temperature)

    def per_sample(x: Array) -> Array:  # [B, ...] -> [B·G, ...], image-major
        return jnp.repeat(x, config.group_size, axis=0)

    condition = jax.tree.map(per_sample, batch["condition"])
    if dropout_rng is not None:
        label_rng, dropout_rng = jax.random.split(dropout_rng)
        label_keys = jax.vmap(lambda key: jax.random.split(key, config.group_size))(
            jax.vmap(lambda i: jax.random.fold_in(label_rng, i))(batch["index"])
        ).reshape(-1)
        condition = drop_condition(policy, label_keys, condition, config.label_dropout)
    logits = policy.logits(params, condition, per_sample(fed), dropout_rng=dropout_rng)
    sequences = rollout.samples.reshape(-1, 1, rollout.samples.shape[-1])
    logps = categorical.token_log_probs(logits, sequences, config.temperature)
    logps = logps.reshape(rollout.samples.shape)
    ce = categorical.cross_entropy(logits, per_sample(tokens))
    ce = ce.reshape(rollout.rewards.shape).mean(axis=1)
    entropy = categorical.entropy(jax.lax.stop_gradient(old_logits), config.temperature)
    return objective(
        logps, old_logps, ce, entropy, rollout, batch, keys, policy, config, base_params
    )


def objective(
    logps: Float[Array, "B G T"],
    old_logps: Float[Array, "B G T"],
    ce: Float[Array, " B"],
    entropy: Float[Array, "B T"],
    rollout: Rollout,
    batch: dict[str, Any],
    keys: PRNGKeyArray,
    policy: Policy,
    config: VAPiConfig,
    base_params: Any,
) -> tuple[Float[Array, ""], Aux]:
    """Eq. 11: mean over images and samples of the clipped surrogate, plus β CE (plus KL)."""
    ratios = jnp.exp(jax.lax.stop_gradient(logps) - old_logps)
    aux: Aux = {f"reward_{name}": -value for name, value in rollout.losses.items()}
    aux |= {
        "reward": rollout.rewards,
        "advantage": rollout.advantages,
        "ratio": ratios,
        "ce": ce,
        "entropy": entropy.mean(axis=-1),
    }
    penalty = None
    if config.needs_base:
        fed = rollout.context[:, : policy.context_length]
        base = policy.hidden(base_params, batch["condition"], fed)
        head = policy.head(base_params)
        base_logps = token_log_probs(base, head, rollout.samples, config.temperature)
        kl = grpo.k3_kl(logps, jax.lax.stop_gradient(base_logps))
        aux["kl_to_base"] = kl.mean(axis=(1, 2))
        penalty = config.kl_weight * kl if config.kl_weight > 0.0 else None
    mask = None
    if config.token_dropout > 0.0:
        mask = jax.vmap(
            lambda key, row: jax.random.bernoulli(key, 1.0 - config.token_dropout, row.shape)
        )(keys[3], logps)
    loss = config.ce_weight * ce.mean()
    if config.policy_gradient:
        loss += grpo.clipped_surrogate(
            logps, old_logps, rollout.advantages, config.clip_epsilon, config.ratio, mask, penalty
        ).mean()
    aux["loss"] = jnp.broadcast_to(loss, ce.shape)
    return loss, aux
