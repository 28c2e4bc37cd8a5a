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
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Annotated, Any, ClassVar, Literal, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from vapi_jax.common.options import Errors, NotNegative, Positive, Rate, Rule, Share
from vapi_jax.methods import grpo
from vapi_jax.methods.config import TrainConfig
from vapi_jax.methods.corruption import corrupt
from vapi_jax.methods.generator import GeneratorMethod, check_dropout, logits_bytes
from vapi_jax.methods.method import (
    Aux,
    Curve,
    HealthError,
    Network,
    Scalars,
    mean_of,
)
from vapi_jax.models import categorical
from vapi_jax.models.categorical import num_choices, sample_group, uniforms_24
from vapi_jax.models.conditions import drop
from vapi_jax.models.head import Head, block_length, draw, token_log_probs
from vapi_jax.models.pixels import PixelSpace
from vapi_jax.models.policy import Policy
from vapi_jax.rewards import Term, check_rewards, make_terms, total


@dataclasses.dataclass(frozen=True)
class VAPiOptions:
    """Section `vapi` of a recipe: the method's hyper-parameters, by default the paper's (Table 7, C2I)."""

    group_size: Annotated[int, Rule(lambda g: g >= 2, "at least 2, for advantages")] = 8  # G
    noise_rate: Share = 0.0  # ξ
    corruption: Literal["paper", "full"] = "paper"  # Eq. 28, without the true token | all of V
    temperature: Positive = 1.0  # of sampling and of log-probabilities
    ce_weight: NotNegative = 0.1  # β
    clip_epsilon: Positive = 0.2  # ε
    advantage_clip: Positive = 5.0
    advantage: Literal["sum", "per_reward"] = (
        "sum"  # of the sum of rewards | sum of each reward's own
    )
    ratio: Literal["token", "sequence"] = (
        "token"  # sequence: Eq. 11 as written; gradient T times larger
    )
    kl_weight: NotNegative = 0.0  # k3 KL to the frozen base
    monitor_kl: bool = False  # log the KL to the base though its weight is 0 (a second model)
    token_dropout: Rate = 0.0  # share of tokens left out of the policy loss
    shuffle_advantages: bool = False  # a control: advantages permuted inside each group
    policy_gradient: bool = True  # False leaves the CE term alone: a control
    fused: bool = True  # False: B·G sequences and a separate sampling forward
    update_dropout: bool = False  # the model's dropout in the update; needs fused=False
    label_dropout: Share = 0.1  # conditions dropped in an update with dropout

    @property
    def needs_base(self) -> bool:
        """Whether the frozen base generator has to be run."""
        return self.kl_weight > 0.0 or self.monitor_kl


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
Judge = Callable[[Int[Array, "B G T"], Mapping[str, Any]], dict[str, Float[Array, "B G"]]]


@dataclasses.dataclass(frozen=True)
class Judged:
    """What one image batch gives before any gradient."""

    tokens: Int[Array, "B T"]  # x* = Q(E(I))
    context: Int[Array, "B T"]  # x̃ ~ K_ξ(. | x*)
    samples: Int[Array, "B G T"]  # x_g ~ π_old(. | x̃)
    values: dict[str, Float[Array, "B G"]]  # each reward by itself
    rewards: Float[Array, "B G"]  # R, Eq. 10
    advantages: Float[Array, "B G"]  # A, Eq. 4


def purpose_keys(rng: PRNGKeyArray, index: Int[Array, " B"]) -> PRNGKeyArray:
    """Keys [4, B] that belong to an image and a purpose, whatever microbatch or device it is on."""
    keys = jax.vmap(lambda i: jax.random.split(jax.random.fold_in(rng, i), 4))(index)
    return jnp.swapaxes(keys, 0, 1)


def true_tokens(batch: Mapping[str, Any], encode: Encode) -> Int[Array, "B T"]:
    """x*: encoded here, or where the batch brings them, beforehand."""
    return batch["tokens"] if "tokens" in batch else encode(batch["image"])


def make_context(
    keys: PRNGKeyArray, tokens: Int[Array, "B T"], vocab_size: int, config: VAPiOptions
) -> Int[Array, "B T"]:
    """x̃ ~ K_ξ(. | x*), Eq. 28."""
    return jax.vmap(
        lambda key, x: corrupt(key, x, config.noise_rate, vocab_size, config.corruption)
    )(keys, tokens)


def judge_samples(
    samples: Int[Array, "B G T"],
    tokens: Int[Array, "B T"],
    context: Int[Array, "B T"],
    batch: Mapping[str, Any],
    keys: PRNGKeyArray,
    config: VAPiOptions,
    terms: Sequence[Term],
    judge: Judge,
) -> Judged:
    """Decodes and rewards the G samples of each image; no gradient."""
    values = jax.lax.stop_gradient(judge(samples, batch))
    rewards = total(values, terms)
    if config.advantage == "sum":
        advantages = grpo.group_advantages(rewards, config.advantage_clip)
    else:
        each = {t.name: grpo.group_advantages(values[t.name], math.inf) for t in terms}
        advantages = jnp.clip(total(each, terms), -config.advantage_clip, config.advantage_clip)
    if config.shuffle_advantages:
        advantages = jax.vmap(grpo.shuffled)(keys[2], advantages)
    return Judged(tokens, context, samples, values, rewards, advantages)


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
        hidden, head, group_uniforms(keys[1], tokens, policy.vocab_size, config), config.temperature
    )
    judged = judge_samples(samples, tokens, context, batch, keys, config, terms, judge)
    logps, true_logps = score(hidden, head, samples, tokens, config)  # of π_θ(. | x̃_<t), Eq. 7
    old_logps = jax.lax.stop_gradient(logps)  # one update per rollout: π_old is π_θ
    ce = -true_logps.mean(axis=-1)  # L_prior, Eq. 9
    return objective(
        logps, old_logps, ce, entropy, judged, batch, keys, policy, config, base_params
    )  # ρ is 1 and no metric


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


def plain_vapi_loss(
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
    judged = judge_samples(samples, tokens, context, batch, keys, config, terms, judge)
    old_logps = categorical.token_log_probs(old_logits, judged.samples, config.temperature)

    def per_sample(x: Array) -> Array:  # [B, ...] -> [B·G, ...], image-major
        return jnp.repeat(x, config.group_size, axis=0)

    condition = jax.tree.map(per_sample, batch["condition"])
    if dropout_rng is not None:
        label_rng, dropout_rng = jax.random.split(dropout_rng)
        label_keys = jax.vmap(lambda key: jax.random.split(key, config.group_size))(
            jax.vmap(lambda i: jax.random.fold_in(label_rng, i))(batch["index"])
        ).reshape(-1)
        condition = drop(policy.condition, label_keys, condition, config.label_dropout)
    logits = policy.logits(params, condition, per_sample(fed), dropout_rng=dropout_rng)
    sequences = judged.samples.reshape(-1, 1, judged.samples.shape[-1])
    logps = categorical.token_log_probs(logits, sequences, config.temperature)
    logps = logps.reshape(judged.samples.shape)
    ce = categorical.cross_entropy(logits, per_sample(tokens))
    ce = ce.reshape(judged.rewards.shape).mean(axis=1)
    entropy = categorical.entropy(jax.lax.stop_gradient(old_logits), config.temperature)
    loss, aux = objective(
        logps, old_logps, ce, entropy, judged, batch, keys, policy, config, base_params
    )
    return loss, {**aux, "ratio": jnp.exp(jax.lax.stop_gradient(logps) - old_logps)}


def objective(
    logps: Float[Array, "B G T"],
    old_logps: Float[Array, "B G T"],
    ce: Float[Array, " B"],
    entropy: Float[Array, "B T"],
    judged: Judged,
    batch: dict[str, Any],
    keys: PRNGKeyArray,
    policy: Policy,
    config: VAPiOptions,
    base_params: Any,
) -> tuple[Float[Array, ""], Aux]:
    """Eq. 11: mean over images and samples of the clipped surrogate, plus β CE (plus KL)."""
    aux: Aux = {f"reward_{name}": value for name, value in judged.values.items()}
    aux |= {
        "reward": judged.rewards,
        "advantage": judged.advantages,
        "ce": ce,
        "entropy": entropy.mean(axis=-1),
    }
    penalty = None
    if config.needs_base:
        fed = judged.context[:, : policy.context_length]
        base = policy.hidden(base_params, batch["condition"], fed)
        head = policy.head(base_params)
        base_logps = token_log_probs(base, head, judged.samples, config.temperature)
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
            logps, old_logps, judged.advantages, config.clip_epsilon, config.ratio, mask, penalty
        ).mean()
    aux["loss"] = jnp.broadcast_to(loss, ce.shape)
    return loss, aux


# --- the method as the trainer asks for it --------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class VAPi(GeneratorMethod):
    """VA-π: the functions above, bound to a policy, a tokenizer, rewards and devices."""

    title: ClassVar[str] = "VA-π post-training"
    section: ClassVar[str] = "vapi"
    Options: ClassVar[type] = VAPiOptions
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = PRESETS
    headline: ClassVar[tuple[str, ...]] = ("reward", "ce", "entropy")
    curves: ClassVar[tuple[Curve, ...]] = (
        ("reward", "Reward", "reward"),
        # On a scale of its own: held-out images are harder, and their curve is without sampling noise.
        ("held_out/reward", "Reward, held-out", "reward"),
        ("ce", "Cross-entropy", "nats per token"),
        ("entropy", "Policy entropy", "nats per token"),
        ("grad_norm", "Gradient norm", "L2 norm, unclipped"),
    )
    compares: ClassVar[bool] = True

    @property
    def options(self) -> VAPiOptions:
        return self.config.options

    @property
    def samples_per_image(self) -> int:
        return self.options.group_size

    @property
    def keeps_start(self) -> bool:
        return self.options.needs_base

    @property
    def temperature(self) -> float:
        return self.options.temperature

    @cached_property
    def terms(self) -> tuple[Term, ...]:
        """The recipe's rewards."""
        return make_terms(self.config.rewards, self.pixels.tokenizer)

    @cached_property
    def judged_pixels(self) -> PixelSpace:
        """`pixels`, its chunks sized for the rewards' networks too."""
        width = max((term.reward.width for term in self.terms), default=0)
        return dataclasses.replace(self.pixels, judge_width=width)

    @classmethod
    def check(cls, config: TrainConfig, errors: Errors) -> None:
        super().check(config, errors)
        options = config.options
        if options.fused and options.update_dropout:
            errors.append(
                "vapi.update_dropout: the fused step samples from its training forward; set "
                "vapi.fused=False to run dropout in the update"
            )
        if options.update_dropout:
            check_dropout(config, errors, "vapi.label_dropout", options.label_dropout)
        check_rewards(config.rewards, config.data.image_size, errors)

    def networks(self) -> list[Network]:
        found = super().networks()
        for term in self.terms:
            reward = term.reward
            if jax.tree.leaves(reward.shapes()):
                name = f"reward {term.name}"
                option = f"rewards.{term.name}"
                found.append(
                    Network(name, option, reward.shapes, origin=reward.origin, load=reward.load)
                )
        return found

    @property
    def precision(self) -> dict[str, Any]:
        rewards = {term.name: getattr(term.reward, "dtype", "float32") for term in self.terms}
        return {**super().precision, "rewards": rewards}

    def controls(self) -> dict[str, TrainConfig]:
        changes: dict[str, dict[str, Any]] = {
            "CE only": {"policy_gradient": False},
            "shuffled advantages": {"shuffle_advantages": True},
        }
        return {
            name: dataclasses.replace(
                self.config,
                options=dataclasses.replace(self.options, **change),
                name=f"control {name}",
            )
            for name, change in changes.items()
        }

    def load_frozen(self) -> dict[str, Any]:
        rewards = {term.name: term.reward.load() for term in self.terms}
        return {**super().load_frozen(), "rewards": {n: w for n, w in rewards.items() if w}}

    def frozen_shapes(self) -> dict[str, Any]:
        rewards = {term.name: term.reward.shapes() for term in self.terms}
        return {**super().frozen_shapes(), "rewards": {n: w for n, w in rewards.items() if w}}

    def parts(self, frozen: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of `vapi_loss` that this run decides."""
        seen = {name: frozen[name] for name in ("tokenizer", "rewards")}
        judges = {term.name: partial(says, term) for term in self.terms}
        return {
            "policy": self.policy,
            "encode": partial(self.pixels.encode, seen),
            "judge": lambda samples, batch: self.judged_pixels.judge(
                seen, samples, {name: batch[name] for name in ("image", "condition")}, judges
            ),
            "terms": self.terms,
            "config": self.options,
        }

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
        page, dropout_rng = (vapi_loss if self.options.fused else plain_vapi_loss), None
        if self.options.update_dropout:
            dropout_rng = jax.random.fold_in(jax.random.fold_in(rng, 1 << 20), batch["index"][0])
        base = frozen.get("base")
        parts = self.parts(frozen)
        loss, aux = page(
            params, dict(batch), rng, base_params=base, dropout_rng=dropout_rng, **parts
        )
        return loss, (aux, extra)

    def summarize(self, aux: Aux) -> Scalars:
        rewards = aux["reward"]
        names = [name for name in aux if name.startswith("reward_") or name == "kl_to_base"]
        found = {
            **mean_of(aux, "loss", "reward", "ce", "entropy", *names),
            "reward_std": jnp.std(rewards),
            "reward_group_std": jnp.std(rewards, axis=-1, ddof=1).mean(),
            "advantages_nonzero": jnp.mean(aux["advantage"] != 0.0),
        }
        if "ratio" not in aux:
            return found
        ratios = aux["ratio"]  # their quantiles would be a sort, which is slow on GPUs
        return {
            **found,
            "ratio_min": ratios.min(),
            "ratio_mean": ratios.mean(),
            "ratio_max": ratios.max(),
            "ratio_max_deviation": jnp.abs(ratios - 1.0).max(),
            "clip_fraction": grpo.clip_fraction(ratios, self.options.clip_epsilon),
        }

    def check_health(self, step: int, metrics: Mapping[str, float]) -> None:
        if self.options.policy_gradient and metrics["advantages_nonzero"] == 0.0:
            raise HealthError(
                f"step {step}: all samples of every group have the same reward, so there is no "
                "policy gradient. The policy may have collapsed to one token per position (look at "
                "the entropy), or the tokenizer decodes everything to the same image."
            )
        deviation = metrics.get("ratio_max_deviation", 0.0)
        if not self.options.update_dropout and not deviation <= _RATIO_TOLERANCE:
            raise HealthError(
                f"step {step}: a ratio of new to old policy is off 1 by {deviation:.3g}. With one "
                "update per rollout and no dropout it must be 1: sampling and update forwards "
                "disagree."
            )
        super().check_health(step, metrics)

    def held_out(
        self,
        params: Any,
        frozen: Mapping[str, Any],
        batch: Mapping[str, Any],
        rng: PRNGKeyArray,
        temperature: Float[Array, ""],
    ) -> Scalars:
        """Reward and entropy are those of sampling at this temperature, CE is the model's own."""
        batch = {**batch, "index": jnp.arange(batch["image"].shape[0])}
        traced = cast(float, temperature)  # a traced value does where a float does
        config = dataclasses.replace(
            self.options, temperature=traced, kl_weight=0.0, monitor_kl=False
        )
        _, aux = vapi_loss(params, batch, rng, **{**self.parts(frozen), "config": config})
        names = [name for name in aux if name.startswith("reward_")]
        return mean_of(aux, "reward", "ce", "entropy", *names)

    def memory(self, rows: int) -> Sequence[tuple[str, int, str]]:
        policy, options, side = self.policy, self.options, self.config.data.image_size
        group, length, vocab = options.group_size, policy.num_tokens, policy.vocab_size
        at_once = block_length(rows, length, vocab) if options.fused else length
        logits = logits_bytes(rows if options.fused else rows * group, at_once, vocab)
        images, maps = self.judged_pixels.at_once(rows, group, side)
        return [
            *super().memory(rows),
            ("logits", logits, f"float32, of {at_once} position(s) at a time"),
            ("decoding", maps, f"{images} sample(s) at a time, and their reward"),
        ]


# A bf16 update forward over B·G rows may round unlike its sampling forward over B rows.
_RATIO_TOLERANCE = 0.02


def says(term: Term, frozen: Mapping[str, Any], pixels: Array, batch: Mapping[str, Any]) -> Array:
    """What a reward says, given its own weights and the networks that it shares."""
    own, shared = frozen["rewards"].get(term.name, {}), term.reward.shares
    weights = {"own": own, **{name: frozen[name] for name in shared}} if shared else own
    return term.reward(weights, pixels, batch)
