"""VA-π on one page. Start here.

    images ─ E,Q ─▶ tokens x* ─ K_ξ ─▶ context x̃ ─ π_θ ─▶ logits ─ draw G ─▶ samples ─ D ─▶ pixels
                        │                                   │                              │ reward
                        └───────────── CE (Eq. 9) ──────────┤                              ▼
                                                            └── clipped policy gradient ◀─ advantages

Shapes: B images, G samples of each, T tokens of an image, V vocabulary, P conditioning positions.

There are two ways to the loss. `vapi_loss` uses that the G samples of an image share their
context, and that one update per rollout leaves ρ = π_θ/π_old = 1: ONE forward and ONE backward per
image serve sampling, policy gradient and cross-entropy, and of the logits only the few numbers that
these need ever exist (`vapi_jax.models.head`). `plain_vapi_loss` runs the B·G sequences of the reference
implementation with a sampling forward of their own, and all their logits; without dropout its
gradient is the same, and the tests hold the two together. It is in `vapi_jax.methods.vapi_plain`; what the
trainer asks of the method is in `vapi_jax.methods.vapi_method`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from vapi_jax.common.options import NotNegative, Rate, Share
from vapi_jax.methods import credit, grpo
from vapi_jax.methods.corruption import Variant, make_context, purpose_keys
from vapi_jax.methods.method import Aux
from vapi_jax.methods.objective import (
    GRPOOptions,
    Judged,
    advantages_of,
    kl_to_base,
    objective,
)
from vapi_jax.models.categorical import num_choices, uniforms_24
from vapi_jax.models.head import Head, draw, token_entropy, token_log_probs
from vapi_jax.models.policy import Policy
from vapi_jax.rewards import Term, total


@dataclasses.dataclass(frozen=True)
class VAPiOptions(GRPOOptions):
    """Section `vapi` of a recipe: the method's hyper-parameters, by default the paper's (Table 7, C2I)."""

    noise_rate: Share = 0.0  # ξ
    corruption: Variant = "paper"  # Eq. 28, without the true token | all of V
    ce_weight: NotNegative = 0.1  # β
    credit: Literal["image", "spatial"] = (
        "image"  # who earns a reward: a sample | each token its cell
    )
    score: Literal["reward", "energy"] = "reward"  # -distance (Eq. 10) | minus the energy score
    token_dropout: Rate = 0.0  # share of tokens left out of the policy loss
    fused: bool = True  # False: B·G sequences and a separate sampling forward
    update_dropout: bool = False  # the model's dropout in the update; needs fused=False
    label_dropout: Share = 0.1  # conditions dropped in an update with dropout

    @property
    def needs_pairs(self) -> bool:
        """Whether samples are compared with one another, or by cell."""
        return self.credit == "spatial" or self.score == "energy"


# What "paper" and "reference" mean; a third, "equations", takes Eq. 11 and 31 to the letter.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "reference": {
        "vapi": {"corruption": "full", "fused": False, "update_dropout": True, "monitor_kl": True}
    },
    "equations": {
        "vapi": {"ratio": "sequence"},
        "rewards": ({"name": "mse", "options": {"reduction": "sum"}}, "lpips"),
    },
}

Encode = Callable[[Float[Array, "B H W 3"]], Int[Array, "B T"]]
Judge = Callable[[Int[Array, "B G T"], Mapping[str, Any]], dict[str, Float[Array, "B G *more"]]]


def true_tokens(batch: Mapping[str, Any], encode: Encode) -> Int[Array, "B T"]:
    """x*: encoded here, or where the batch brings them, beforehand."""
    return batch["tokens"] if "tokens" in batch else encode(batch["image"])


def judge_samples(
    samples: Int[Array, "B G T"],
    tokens: Int[Array, "B T"],
    context: Int[Array, "B T"],
    batch: Mapping[str, Any],
    keys: PRNGKeyArray,
    config: VAPiOptions,
    terms: Sequence[Term],
    judge: Judge,
    axes: Sequence[str] = (),
) -> Judged:
    """Decodes and rewards the G samples of each image; no gradient."""
    found = jax.lax.stop_gradient(judge(samples, batch))
    if config.needs_pairs:  # `found` are inner products by cell, of which the rewards are a part
        values = {name: -credit.losses(inner).mean(axis=-1) for name, inner in found.items()}
        inner = total(found, terms)
        energy = config.score == "energy"
        signal = credit.energy_rewards(inner, True) if energy else -credit.losses(inner)
        signal = signal if config.credit == "spatial" else signal[..., 0]
        advantages = grpo.scaled_advantages(
            signal, config.advantage_scale, config.advantage_clip, axes
        )
        if energy:
            values["energy"] = credit.energy_rewards(inner).mean(axis=-1)
    else:
        values = found
        advantages = advantages_of(values, terms, config, axes)
    if config.shuffle_advantages:
        advantages = jax.vmap(grpo.shuffled)(keys[2], advantages)
    return Judged(tokens, context, samples, values, total(values, terms), advantages)


def vapi_loss(
    params: Any,
    batch: dict[str, Any],
    rng: PRNGKeyArray,
    *,
    policy: Policy,
    encode: Encode,
    judge: Judge,
    terms: Sequence[Term],
    config: VAPiOptions,
    base_params: Any = None,
    entropy_weight: Float[Array, ""] | None = None,
    axes: Sequence[str] = (),
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
      judge: what each reward says of samples [B, G, T], decoded, given the batch.
      terms: the rewards and their weights.
      config: the method's hyper-parameters.
      base_params: the frozen base generator, where config.needs_base.
      entropy_weight: of the entropy bonus, where there is one.
      axes: of the mesh, over which the batch is split where this runs inside `jax.shard_map`.
      dropout_rng: unused here; `plain_vapi_loss` takes it.

    Returns:
      The scalar loss, and per-image arrays for metrics.
    """
    del dropout_rng
    keys = purpose_keys(rng, batch["index"])
    tokens = true_tokens(batch, encode)  # x* = Q(E(I)), Eq. 1
    context = make_context(keys[0], tokens, config.noise_rate, policy.vocab_size, config.corruption)
    fed = context[:, : policy.context_length]  # x̃, Eq. 28; the last token predicts nothing
    hidden, head = policy.hidden(params, batch["condition"], fed), policy.head(params)
    samples, entropy = draw(
        hidden, head, group_uniforms(keys[1], tokens, policy.vocab_size, config), config.temperature
    )
    judged = judge_samples(samples, tokens, context, batch, keys, config, terms, judge, axes)
    logps, true_logps = score(hidden, head, samples, tokens, config)  # of π_θ(. | x̃_<t), Eq. 7
    old_logps = jax.lax.stop_gradient(logps)  # one update per rollout: π_old is π_θ; ρ is 1
    ce = -true_logps.mean(axis=-1)  # L_prior, Eq. 9
    kl = None
    if config.needs_base:
        where = batch["condition"], fed, hidden, head, samples, logps
        kl = kl_to_base(config, policy, base_params, *where)
    if entropy_weight is not None:
        entropy = token_entropy(hidden, head, config.temperature)  # as drawn from, differentiable
    loss, aux = objective(
        logps, old_logps, entropy, judged.advantages, config, kl=kl,
        mask=token_mask(keys[3], samples, config), entropy_weight=entropy_weight,
    )  # fmt: skip
    return with_prior(loss, aux, ce, judged, config)


def with_prior(
    loss: Float[Array, ""], aux: Aux, ce: Float[Array, " B"], judged: Judged, config: VAPiOptions
) -> tuple[Float[Array, ""], Aux]:
    """The policy's loss plus β L_prior (Eq. 11), and what is known of the images for metrics."""
    loss = config.ce_weight * ce.mean() + loss
    names = {name: name if name == "energy" else f"reward_{name}" for name in judged.values}
    return loss, {
        **{names[name]: value for name, value in judged.values.items()},
        "reward": judged.rewards,
        "advantage": judged.advantages,
        "ce": ce,
        **aux,
        "loss": jnp.broadcast_to(loss, ce.shape),
    }


def token_mask(
    keys: PRNGKeyArray, samples: Int[Array, "B G T"], config: VAPiOptions
) -> Bool[Array, "B G T"] | None:
    """Tokens that token dropout leaves in the policy's loss; None for all."""
    if config.token_dropout == 0.0:
        return None
    return jax.vmap(
        lambda key, row: jax.random.bernoulli(key, 1.0 - config.token_dropout, row.shape)
    )(keys, samples)


def group_uniforms(
    keys: PRNGKeyArray, tokens: Int[Array, "B T"], vocab_size: int, config: VAPiOptions
) -> Float[Array, "B T G C"]:
    """What the draws of each image are made from; its own, whatever the batch around it."""
    shape = tokens.shape[1], config.group_size, num_choices(vocab_size)
    return jax.vmap(lambda key: uniforms_24(key, shape))(keys)


def score(
    hidden: Float[Array, "B T D"],
    head: Head,
    samples: Int[Array, "B G T"],
    tokens: Int[Array, "B T"],
    config: VAPiOptions,
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
