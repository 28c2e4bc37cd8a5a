"""What a study is: arms, seeds and the protocol that judges them all."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vapi_jax.common.errors import ExpectedError
from vapi_jax.common.recipes import change, read_recipe
from vapi_jax.evaluation.features import FEATURES
from vapi_jax.methods import find_method

BASE = "base"
"""The arm that every study has: the generator before any training."""


class StudyError(ExpectedError, ValueError):
    """A study that cannot be read, or that contradicts itself or what its folder holds."""


@dataclasses.dataclass(frozen=True)
class Draw:
    """How tokens are drawn.

    Attributes:
      temperature: T.
      cfg_scale: guidance; 1 for none.
      top_k: most likely tokens kept; 0 for all.
      top_p: share of probability kept.
    """

    temperature: float = 1.0
    cfg_scale: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    @property
    def settings(self) -> dict[str, Any]:
        """Those of `vapi_jax.models.sampling.generate` that are not its defaults; without the temperature."""
        default = Draw()
        found = dataclasses.asdict(self)
        del found["temperature"]
        return {name: value for name, value in found.items() if value != getattr(default, name)}


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to get a generator.

    Attributes:
      name: in the tables.
      changes: of the study's recipe, option by dotted path; empty and untrained for the base drawn otherwise.
      recipe: another recipe than the study's; its generator and tokenizer have to be the same.
      draw: for an untrained arm, how the base is drawn; trained arms are drawn by the study's settings.
      trained: False for the base.
      published: metric -> what is published of it, shown beside.
    """

    name: str
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    recipe: str = ""
    draw: Draw | None = None
    trained: bool = True
    published: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def slug(self) -> str:
        """Its folder."""
        name = self.name.lower().replace("π", "pi")
        return "".join(c if c.isascii() and c.isalnum() else "_" for c in name)


@dataclasses.dataclass(frozen=True)
class Study:
    """Arms under one protocol.

    Attributes:
      name: of the study.
      question: what it asks, in a sentence.
      recipe: of all arms that name no other; a variant follows a colon.
      arms: beside the base, which every study has.
      changes: of every arm's recipe, under the arm's own.
      draws: name -> how every trained arm, and the base, is drawn.
      seeds: training seeds of an arm, 0 to seeds - 1.
      sampling_seeds: sets of samples of each training.
      samples: images of a set.
      features: networks that judge, the first of them for the verdict; it should be one that no arm's
        reward has seen.
    """

    name: str
    question: str
    recipe: str
    arms: tuple[Arm, ...]
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    draws: Mapping[str, Draw] = dataclasses.field(default_factory=lambda: {"plain": Draw()})
    seeds: int = 4
    sampling_seeds: int = 2
    samples: int = 2048
    features: tuple[str, ...] = ("efficientnet_lite0_112", "alex_conv5", "vgg_relu4_3")

    def __post_init__(self) -> None:
        problems = []
        for what, names in (
            ("arms", [BASE, *(arm.name for arm in self.arms)]),
            ("folders of arms", [arm.slug for arm in self.arms]),
            ("features", list(self.features)),
        ):
            twice = [name for name, count in Counter(names).items() if count > 1]
            if twice:
                problems.append(f"{what}: {', '.join(twice)} more than once")
        problems += [
            f"features: {name!r} is none of {', '.join(FEATURES)}"
            for name in self.features
            if name not in FEATURES
        ]
        problems += [
            f"{number}: {getattr(self, number)}, wants at least 1"
            for number in ("seeds", "sampling_seeds", "samples")
            if getattr(self, number) < 1
        ]
        if not self.draws:
            problems.append("draws: at least one")
        for arm in self.arms:
            if arm.trained and arm.draw is not None:
                problems.append(f"arm {arm.name!r}: a trained arm is drawn by the study's draws")
            if not arm.trained and (arm.draw is None or arm.changes or arm.recipe):
                problems.append(f"arm {arm.name!r}: untrained, it wants a draw and nothing else")
        if problems:
            raise StudyError(f"study {self.name}: " + "; ".join(problems))

    @property
    def trained(self) -> tuple[Arm, ...]:
        """Arms that train."""
        return tuple(arm for arm in self.arms if arm.trained)


def read_study(given: str) -> Study:
    """A study from its file, PATH.py or PATH.py:VARIANT, whose `get_study(variant)` makes it.

    Raises:
      StudyError: there is no such file, it has no get_study, or what that returns is no study.
    """
    name, _, variant = given.partition(":")
    path = Path(name)
    if not path.is_file():
        raise StudyError(f"{path}: no such study; see configs/studies/")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None, "a file with a name"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    make = getattr(module, "get_study", None)
    if make is None:
        raise StudyError(f"{path}: has no function get_study(variant)")
    study = make(variant)
    if not isinstance(study, Study):
        raise StudyError(f"{path}: get_study returned {type(study).__name__}, a Study is wanted")
    return study


def recipe_of(study: Study, arm: Arm, seed: int) -> Any:
    """The recipe of one training, as `vapi_jax.main` would take it."""
    config = read_recipe(os.fspath(arm.recipe or study.recipe))
    changes = {**study.changes, **arm.changes, "seed": seed, "eval.compare": False}
    if changes.get("method", config.method) != config.method:
        section = find_method(config.method).section  # with the other method's options
        if section in config:
            with config.unlocked():
                del config[section]
    return change(config, changes)
