"""VA-π as the trainer asks for it. What it computes is in `vapi_jax.methods.vapi`."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from vapi_jax.common.options import Errors
from vapi_jax.methods.config import TrainConfig
from vapi_jax.methods.generator import check_dropout, has_dropout, logits_bytes
from vapi_jax.methods.method import Aux, Curve, Flops, HealthError, Scalars, mean_of
from vapi_jax.methods.rewarded import ENTROPY_WEIGHT, GroupMethod, inner_products
from vapi_jax.methods.sft import SFTOptions
from vapi_jax.methods.vapi import PRESETS, VAPiOptions, vapi_loss
from vapi_jax.methods.vapi_plain import plain_vapi_loss
from vapi_jax.models.head import block_length
from vapi_jax.parallel.sharding import split_axes
from vapi_jax.rewards import make_terms
from vapi_jax.rewards.pairs import pair_bytes


@dataclasses.dataclass(frozen=True)
class VAPi(GroupMethod):
    """VA-π: the functions above, bound to a policy, a tokenizer, rewards and devices."""

    title: ClassVar[str] = "VA-π post-training"
    label: ClassVar[str] = "VA-π"
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

    @classmethod
    def flops(cls, config: TrainConfig, one: Flops) -> float:
        options, images = config.options, config.batch_size
        samples = images * options.group_size
        trained = 3 * images if options.fused else images + 3 * samples
        return (
            images * one.encode
            + (trained + images * options.needs_base) * one.policy
            + samples * one.decode
            + (samples + images) * one.rewards
        )

    @classmethod
    def depends_on_cut(cls, config: TrainConfig) -> bool:
        return bool(config.options.update_dropout and has_dropout(config))

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
        if options.needs_pairs:
            _check_pairs(config, errors)
        if options.entropy_target > 0.0 and not options.fused:
            errors.append("vapi.entropy_target: only the fused step has an entropy bonus")

    def controls(self) -> dict[str, TrainConfig]:
        options, found = self.options, {}
        if options.ce_weight > 0.0:  # at weight 0 nothing of it is left to train
            prior = SFTOptions(
                noise_rate=options.noise_rate,
                corruption=options.corruption,
                weight=options.ce_weight,
            )
            sft = dataclasses.replace(self.config, method="sft", section="sft", preset="paper")
            found["CE only"] = dataclasses.replace(sft, options=prior)
        same = dataclasses.replace(options, shuffle_advantages=True)
        found["shuffled advantages"] = dataclasses.replace(self.config, options=same)
        return {
            name: dataclasses.replace(config, name=f"control {name}")
            for name, config in found.items()
        }

    def parts(self, frozen: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of `vapi_loss` that this run decides."""
        judges = self.judges
        if self.options.needs_pairs:
            cells = round(self.policy.num_tokens**0.5) if self.options.credit == "spatial" else 1
            judges = {term.name: partial(inner_products, term, cells) for term in self.terms}
        return {
            "policy": self.policy,
            "encode": partial(self.pixels.encode, frozen),
            "judge": self.judge(frozen, judges),
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
        loss, aux = page(
            params,
            dict(batch),
            rng,
            base_params=frozen.get("base"),
            entropy_weight=extra.get(ENTROPY_WEIGHT),
            axes=split_axes(),
            dropout_rng=dropout_rng,
            **self.parts(frozen),
        )
        if ENTROPY_WEIGHT in extra:
            aux[ENTROPY_WEIGHT] = jnp.broadcast_to(extra[ENTROPY_WEIGHT], aux["ce"].shape)
        return loss, (aux, extra)

    def check_health(self, step: int, metrics: Mapping[str, float]) -> None:
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
        names = [name for name in aux if name.startswith("reward_") or name == "energy"]
        return mean_of(aux, "reward", "ce", "entropy", *names)

    def memory(self, rows: int) -> Sequence[tuple[str, int, str]]:
        policy, options, side = self.policy, self.options, self.config.data.image_size
        group, length, vocab = options.group_size, policy.num_tokens, policy.vocab_size
        at_once = block_length(rows, length, vocab) if options.fused else length
        logits = logits_bytes(rows if options.fused else rows * group, at_once, vocab)
        images, maps = self.judged_pixels.at_once(rows, group, side)
        found = [
            *super().memory(rows),
            ("logits", logits, f"float32, of {at_once} position(s) at a time"),
            ("decoding", maps, f"{images} sample(s) at a time, and their reward"),
        ]
        if options.needs_pairs:
            pairs = pair_bytes(images, group, side)
            found.append(("pairs", pairs, f"of these samples, each with {group}, pixel by pixel"))
        return found


# A bf16 update forward over B·G rows may round unlike its sampling forward over B rows.
_RATIO_TOLERANCE = 0.02


def _check_pairs(config: TrainConfig, errors: Errors) -> None:
    """Adds what is wrong with credit and score that are made of inner products."""
    options = config.options
    if options.score == "energy" and options.group_size < 3:
        errors.append(
            f"vapi.group_size={options.group_size}: the energy score compares a sample with the others "
            "of its group; take at least 3"
        )
    asked = "score='energy'" if options.score == "energy" else "credit='spatial'"
    if options.advantage == "per_reward":
        errors.append(f"vapi.advantage='per_reward': vapi.{asked} has one sum of rewards")
    if options.credit == "spatial" and options.ratio != "token":
        errors.append(f"vapi.ratio={options.ratio!r}: vapi.credit='spatial' wants 'token'")
    if errors.concern("rewards"):
        return
    for term in make_terms(config.rewards):
        if not term.reward.has_inner:
            errors.append(
                f"rewards.{term.name}: is no distance to an image, which vapi.{asked} is made of; "
                "leave it out"
            )
