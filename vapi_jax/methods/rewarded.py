"""What methods that reward decoded samples of a generator have in common: the rewards and their networks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from vapi_jax.common.errors import ExpectedError
from vapi_jax.common.options import Errors
from vapi_jax.methods import grpo
from vapi_jax.methods.config import TrainConfig
from vapi_jax.methods.generator import GeneratorMethod
from vapi_jax.methods.method import EMA, Aux, Network, NothingLearned, Scalars, mean_of
from vapi_jax.methods.objective import GRPOOptions
from vapi_jax.models.pixels import PixelSpace
from vapi_jax.rewards import Reward, Term, check_rewards, make_terms

PROMPTS = "prompts"
"""In a batch: reward -> what it made of the raw conditions (`Reward.prepare`)."""

ENTROPY_WEIGHT = "entropy_weight"
"""In the extra state, where a bonus holds entropy at a target."""

_ROUNDING = 1e-6
"""Of a reward: samples that are the same may be judged so differently, each at its place in a batch."""


@dataclasses.dataclass(frozen=True)
class RewardedMethod(GeneratorMethod):
    """A generator, a frozen tokenizer, and rewards of decoded images."""

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
        check_rewards(config.rewards, config.data.image_size, errors)

    def networks(self) -> list[Network]:
        found = super().networks()
        for term in self.terms:
            reward = term.reward
            if _has_weights(reward):
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

    def prepare(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        made = {term.name: term.reward.prepare(batch["condition"]) for term in self.terms}
        prompts = {name: made_of for name, made_of in made.items() if made_of is not None}
        return {**super().prepare(batch), **({PROMPTS: prompts} if prompts else {})}

    def example_batch(self, rows: int) -> dict[str, Any]:
        shapes = {term.name: term.reward.example(rows) for term in self.terms}
        prompts = {name: shape for name, shape in shapes.items() if shape is not None}
        return {**super().example_batch(rows), **({PROMPTS: prompts} if prompts else {})}

    def load_frozen(self) -> dict[str, Any]:
        rewards = {term.name: term.reward.load() for term in self.terms}
        return {**super().load_frozen(), "rewards": {n: w for n, w in rewards.items() if w}}

    def frozen_shapes(self) -> dict[str, Any]:
        rewards = {term.name: term.reward.shapes() for term in self.terms}
        return {**super().frozen_shapes(), "rewards": {n: w for n, w in rewards.items() if w}}

    def computed(self) -> dict[str, Any]:
        return {
            f"rewards/{term.name}/{name}": of
            for term in self.terms
            for name, of in term.reward.computed().items()
        }

    def judge(
        self, frozen: Mapping[str, Any], judges: Mapping[str, Callable[..., Any]]
    ) -> Callable[[Array, Mapping[str, Any]], dict[str, Array]]:
        """(samples, batch) -> what each judge says of the decoded samples."""
        seen = {name: frozen[name] for name in ("tokenizer", "rewards")}

        def judge(samples: Array, batch: Mapping[str, Any]) -> dict[str, Array]:
            known = {name: batch[name] for name in ("image", "condition", PROMPTS) if name in batch}
            return self.judged_pixels.judge(seen, samples, known, judges)

        return judge

    @property
    def judges(self) -> dict[str, Callable[..., Any]]:
        """Each reward, as `PixelSpace.judge` calls it."""
        return {term.name: partial(says, term) for term in self.terms}


@dataclasses.dataclass(frozen=True)
class GroupMethod(RewardedMethod):
    """Groups of samples and their advantages; its options are `GRPOOptions` and more."""

    @property
    def options(self) -> GRPOOptions:
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

    @classmethod
    def check(cls, config: TrainConfig, errors: Errors) -> None:
        super().check(config, errors)
        options = config.options
        several = config.microbatch_size not in (0, config.batch_size)
        if options.advantage_scale == "batch" and several and not cls.rolls_out:
            errors.append(
                f"{cls.section}.advantage_scale='batch': wants the whole batch at once, and "
                f"microbatch_size={config.microbatch_size} cuts it; set it to 0"
            )

    def init_extra(self, params: Any) -> Any:
        extra: dict[str, Any] = {}
        if self.options.ema_decay > 0.0:
            extra[EMA] = jax.tree.map(
                jnp.copy, params
            )  # or both would be one buffer, donated twice
        if self.options.entropy_target > 0.0:
            extra[ENTROPY_WEIGHT] = jnp.zeros(())
        return extra

    def after_update(
        self,
        params: Any,
        extra: Any,
        rng: PRNGKeyArray,
        step: Array,
        metrics: Mapping[str, Array],
    ) -> tuple[Any, Any]:
        del rng, step
        options, extra = self.options, dict(extra)
        if EMA in extra:
            share = 1.0 - options.ema_decay
            extra[EMA] = jax.tree.map(lambda a, p: a + share * (p - a), extra[EMA], params)
        if ENTROPY_WEIGHT in extra:
            missing = options.entropy_target - metrics["entropy"]
            moved = extra[ENTROPY_WEIGHT] + options.entropy_rate * missing
            extra[ENTROPY_WEIGHT] = jnp.clip(moved, -options.entropy_limit, options.entropy_limit)
        return params, extra

    def weights_of(self, params: Any, extra: Any) -> dict[str, Any]:
        found = super().weights_of(params, extra)
        [name] = found
        return {**found, f"{name}_ema": extra[EMA]} if EMA in extra else found

    def summarize(self, aux: Aux) -> Scalars:
        rewards = aux["reward"]
        names = [name for name in aux if name.startswith("reward_")]
        names += [name for name in ("ce", "energy", "kl_to_base", ENTROPY_WEIGHT) if name in aux]
        found = {
            **mean_of(aux, "loss", "reward", "entropy", *names),
            "reward_std": jnp.std(rewards),
            "reward_group_std": jnp.std(rewards, axis=-1, ddof=1).mean(),
            "advantages_nonzero": jnp.mean(aux["advantage"] != 0.0),
        }
        if "ratio" not in aux:
            return found
        ratios, options = aux["ratio"], self.options
        return {  # their quantiles would be a sort, which is slow on GPUs
            **found,
            "ratio_min": ratios.min(),
            "ratio_mean": ratios.mean(),
            "ratio_max": ratios.max(),
            "ratio_max_deviation": jnp.abs(ratios - 1.0).max(),
            "clip_fraction": grpo.clip_fraction(
                ratios, options.clip_epsilon, options.clip_epsilon_high
            ),
        }

    def check_health(self, step: int, metrics: Mapping[str, float]) -> None:
        same = metrics["reward_group_std"] <= _ROUNDING * abs(metrics["reward"])
        if same or metrics["advantages_nonzero"] == 0.0:
            raise NothingLearned(
                f"step {step}: all samples of every group have the same reward, so there is no "
                "policy gradient. The policy may have collapsed to one token per position (look at "
                "the entropy), the tokenizer may decode everything to the same image, or no sample "
                "has what the reward asks for."
            )
        super().check_health(step, metrics)


def _has_weights(reward: Reward) -> bool:
    try:
        return bool(jax.tree.leaves(reward.shapes()))
    except ExpectedError:  # of weights, or of a list of classes
        return True  # and `origin` says what is wrong with them


def _weights_for(term: Term, frozen: Mapping[str, Any]) -> Any:
    """What a reward takes: its own weights, and the networks that it shares."""
    own, shared = frozen["rewards"].get(term.name, {}), term.reward.shares
    return {"own": own, **{name: frozen[name] for name in shared}} if shared else own


def says(term: Term, frozen: Mapping[str, Any], pixels: Array, batch: Mapping[str, Any]) -> Array:
    """What a reward says, given its own weights and the networks that it shares."""
    known = {name: value for name, value in batch.items() if name != PROMPTS}
    if (prompt := batch.get(PROMPTS, {}).get(term.name)) is not None:
        known["prompt"] = prompt
    return term(_weights_for(term, frozen), pixels, known)


def inner_products(
    term: Term,
    cells: int,
    frozen: Mapping[str, Any],
    pixels: Float[Array, "B G H W 3"],
    batch: Mapping[str, Any],
) -> Float[Array, "B G G C"]:
    """`Reward.inner` in place of the reward, where credit or score ask for more than one number."""
    return term.reward.inner(_weights_for(term, frozen), pixels, batch, cells)
