"""What a decoded sample is worth: the table of rewards, and a run's list of them."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from vapi_jax.common.options import Errors, build
from vapi_jax.common.plugins import UnknownNameError, find
from vapi_jax.models.vq import VQModel
from vapi_jax.rewards.clip import Aesthetic, CLIPScore, HPSv2, PickScore
from vapi_jax.rewards.http import HTTP
from vapi_jax.rewards.reconstruction import GAN, L1, LPIPS, MSE, CodebookCosine
from vapi_jax.rewards.reward import Batch, FunctionReward, Reward, RewardError, Rewards
from vapi_jax.rewards.scenes import SceneReward

__all__ = [
    "REWARDS",
    "Batch",
    "Reward",
    "RewardError",
    "RewardSpec",
    "Term",
    "check_rewards",
    "completed",
    "make_terms",
    "parse",
    "total",
]

REWARDS: dict[str, type[Reward]] = {
    "mse": MSE,
    "lpips": LPIPS,
    "l1": L1,
    "codebook_cosine": CodebookCosine,
    "gan": GAN,
    "clip": CLIPScore,
    "hpsv2": HPSv2,
    "pickscore": PickScore,
    "aesthetic": Aesthetic,
    "http": HTTP,
    "scenes": SceneReward,
}


@dataclasses.dataclass(frozen=True)
class RewardSpec:
    """One reward of a recipe.

    Attributes:
      name: of `REWARDS`, or "module:attribute".
      weight: what it is multiplied with in the sum.
      options: of the reward; "on_host" of a user's function has it called on NumPy arrays.
    """

    name: str
    weight: float = 1.0
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Term:
    """A reward ready to be used: under which name, with which weight."""

    name: str
    weight: float
    reward: Reward

    def __call__(self, weights: Any, pixels: Float[Array, "B G H W 3"], batch: Batch) -> Rewards:
        """What the reward says of every sample.

        Raises:
          RewardError: it has another shape, which would be broadcast, to other images' rewards perhaps.
        """
        found, wanted = self.reward(weights, pixels, batch), pixels.shape[:2]
        if (shape := jnp.shape(found)) != wanted:
            raise RewardError(
                f"reward {self.name} has shape {shape}, not [B, G] = {wanted}: it must give a number for "
                "each sample, as means over the last three axes of the pixels [B, G, H, W, 3] do"
            )
        return found


DEFAULT = (RewardSpec("mse"), RewardSpec("lpips"))
"""The paper's (Eq. 10), both with weight 1."""

_PRODUCT = re.compile(r"\s*(?:(?P<weight>[0-9.eE+-]+)\s*\*)?\s*(?P<name>[A-Za-z_][\w.:]*)\s*")


def parse(value: Any, errors: Errors) -> tuple[RewardSpec, ...]:
    """The rewards of a recipe: "mse, 0.5*lpips", or a list of such and of {name, weight, options}.

    A reward of weight 0 is none. Everything wrong becomes a line in `errors`.
    """
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, list | tuple):
        errors.append(f"rewards={value!r}: wants a list of names and of {{name, weight, options}}")
        return DEFAULT
    specs = []
    # A command line makes a tuple of one text where the recipe has a tuple.
    items = [part for x in listed for part in (x.split(",") if isinstance(x, str) else [x])]
    for item in items:
        spec = item if isinstance(item, RewardSpec) else _spec(item, errors)
        if spec is None:
            continue
        if not (math.isfinite(spec.weight) and spec.weight >= 0.0):
            errors.append(f"rewards: {spec.name} has weight {spec.weight}; wants at least 0")
        elif spec.weight > 0.0:
            specs.append(spec)
            _make(spec, None, errors)
    return tuple(specs)


def completed(specs: Sequence[RewardSpec], under: Sequence[RewardSpec]) -> tuple[RewardSpec, ...]:
    """The rewards of a list; options that one leaves open are those of its name in another list."""
    known = {spec.name: spec.options for spec in under}
    return tuple(
        dataclasses.replace(spec, options={**known.get(spec.name, {}), **spec.options})
        for spec in specs
    )


def _spec(item: Any, errors: Errors) -> RewardSpec | None:
    if isinstance(item, str):
        found = _PRODUCT.fullmatch(item)
        try:
            if found:
                return RewardSpec(found["name"], float(found["weight"] or 1.0))
        except ValueError:
            pass
        errors.append(f"rewards: {item!r} is no name, such as 'lpips' or '0.5*lpips'")
        return None
    if not isinstance(item, Mapping) or "name" not in item:
        errors.append(f"rewards: {item!r} is neither a name nor {{name, weight, options}}")
        return None
    before, name = len(errors), str(item["name"])
    spec = build(RewardSpec, item, f"rewards.{name}.", errors)
    return spec if len(errors) == before else None


def _make(spec: RewardSpec, tokenizer: VQModel | None, errors: Errors) -> Reward | None:
    where, options = f"rewards.{spec.name}.", dict(spec.options)
    try:
        found: Any = find(spec.name, REWARDS, "reward")
    except UnknownNameError as error:
        errors.append(f"rewards: {error}")
        return None
    if isinstance(found, type) and issubclass(found, Reward):
        return build(found, options, where, errors, tokenizer=tokenizer)
    on_host = bool(options.pop("on_host", False))
    wants_image = bool(options.pop("wants_image", True))
    try:
        inspect.signature(found).bind(None, None, **options)
    except (TypeError, ValueError) as error:
        errors.append(f"{where.rstrip('.')}: (pixels, batch, **options) cannot be passed: {error}")
        return None
    return FunctionReward(
        function=found,
        arguments=options,
        on_host=on_host,
        wants_image=wants_image,
        tokenizer=tokenizer,
    )


def make_terms(specs: Sequence[RewardSpec], tokenizer: VQModel | None = None) -> tuple[Term, ...]:
    """The rewards of a recipe's list, under names that differ.

    Raises:
      ValueError: for a list that `parse` finds errors in.
    """
    terms: list[Term] = []
    for spec in specs:
        errors = Errors()
        reward = _make(spec, tokenizer, errors)
        if reward is None or errors:
            raise ValueError("\n".join(errors))
        name = spec.name.rpartition(":")[2]
        taken = {term.name for term in terms}
        numbered = (f"{name}_{i}" if i > 1 else name for i in range(1, len(specs) + 1))
        unique = next(candidate for candidate in numbered if candidate not in taken)
        terms.append(Term(unique, spec.weight, reward))
    return tuple(terms)


def check_rewards(specs: Sequence[RewardSpec], side: int, errors: Errors) -> None:
    """Adds what is wrong with a list of rewards for images of `side` pixels; nothing is read."""
    if errors.concern("rewards"):
        return
    if not specs:
        errors.append("rewards: none has a weight above 0; the reward would be constant")
    for term in make_terms(specs):
        errors += [f"rewards.{term.name}: {line}" for line in term.reward.problems(side)]


def total(values: Mapping[str, Float[Array, "*b"]], terms: Sequence[Term]) -> Float[Array, "*b"]:
    """R = Σ weight · reward (Eq. 10 with -MSE and -LPIPS).

    Raises:
      KeyError: if a reward was not computed.
    """
    first, *rest = (term.weight * values[term.name] for term in terms)
    return sum(rest, start=first)
