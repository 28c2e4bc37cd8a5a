"""What a study is: arms, seeds and the protocol that judges them all."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vapi_jax.common.errors import ExpectedError
from vapi_jax.common.paths import local_path
from vapi_jax.common.recipes import RECIPES, call, change, read_recipe
from vapi_jax.evaluation.features import FEATURES
from vapi_jax.generation.protocols import PROTOCOLS
from vapi_jax.methods import find_method

BASE = "base"
"""The arm that every study has: the generator before any training."""

_OWN = ("seed", "eval.compare", "eval.samples", "eval.sampled")
"""Options of recipes that follow from the study."""

STUDIES = RECIPES / "studies"
"""The studies that come with the package."""


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
class Files:
    """The published way of judging, see `vapi_jax.study.files`.

    Attributes:
      protocol: of `vapi_jax.generation.protocols.PROTOCOLS`.
      checkpoint: of the base, as `vapi_jax.sample` takes it.
      dtype: what all is drawn in.
      reference: images or statistics that "adm50k" is held against; without, nothing is measured.
      inception: file of FID's weights.
      features: network of the metrics.
      prompts: file of GenEval's metadata.
      text_encoder: of captions, where the checkpoint wants one.
      changes: of the protocol's flags, for trials.
    """

    protocol: str
    checkpoint: str
    dtype: str = "bfloat16"
    reference: str = ""
    inception: str = ""
    features: str = "inception"
    prompts: str = ""
    text_encoder: str = ""
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def asked(self) -> bool:
        """Whether there is what it needs."""
        return bool(self.reference or self.prompts)

    @property
    def paths(self) -> tuple[str, ...]:
        """What it reads, as it is named."""
        named = self.checkpoint, self.reference, self.inception, self.prompts, self.text_encoder
        return tuple(filter(None, named))

    def under(self, changes: Mapping[str, Any]) -> Files:
        """The same beside recipes with these changes: the base in files is the one that they train from."""
        same = {field: changes[name] for name, field in _OF_FILES.items() if name in changes}
        return dataclasses.replace(self, **same)


Figures = Mapping[str, Mapping[str, float]]
"""Draw -> metric -> value."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to get a generator.

    Attributes:
      name: in the tables.
      changes: of the study's recipe, option by dotted path; empty and untrained for the base drawn otherwise.
      recipe: another recipe than the study's; its generator and tokenizer have to be the same.
      draw: for an untrained arm, how the base is drawn; trained arms are drawn by the study's settings.
      trained: False for the base.
      average: judged by the average of its parameters (`ema_decay`), in their place.
      published: what is published of it, shown beside.
    """

    name: str
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    recipe: str = ""
    draw: Draw | None = None
    trained: bool = True
    average: bool = False
    published: Figures = dataclasses.field(default_factory=dict)

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
      sampling_seeds: sets of samples of each training, of other uniforms for each of its seeds; the base is
        drawn with the same.
      samples: images of a set.
      features: networks that judge, the first of them for the verdict; it should be one that no arm's
        reward has seen.
      verdict: metric of the verdict where it is measured; else FID, else a distance in the first features.
      against: an arm that all others are held against, too, seed by seed.
      files: the published way of judging, beside the study's own.
      published: of the base.
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
    verdict: str = ""
    against: str = ""
    files: Files | None = None
    published: Figures = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        problems = []
        for what, names in (
            ("arms", [BASE, *(arm.name for arm in self.arms)]),
            ("folders of arms", [BASE, *(arm.slug for arm in self.arms)]),
            ("draws", [*self.draws, *(arm.name for arm in self.untrained)]),
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
        if self.against and self.against not in [arm.name for arm in self.trained]:
            problems.append(f"against={self.against!r} is no arm that trains")
        if self.files is not None and self.files.protocol not in PROTOCOLS:
            problems.append(f"files: {self.files.protocol!r} is none of {', '.join(PROTOCOLS)}")
        if self.files is not None and (names := [arm.name for arm in self.arms if arm.average]):
            problems.append(
                f"files: drawn from a run's weights, not its average ({', '.join(names)})"
            )
        if not self.draws:
            problems.append("draws: at least one")
        for arm in self.arms:
            if arm.trained and arm.draw is not None:
                problems.append(f"arm {arm.name!r}: a trained arm is drawn by the study's draws")
            if not arm.trained and (arm.draw is None or arm.changes or arm.recipe or arm.average):
                problems.append(f"arm {arm.name!r}: untrained, it wants a draw and nothing else")
        if problems:
            raise StudyError(f"study {self.name}: " + "; ".join(problems))

    @property
    def trained(self) -> tuple[Arm, ...]:
        """Arms that train."""
        return tuple(arm for arm in self.arms if arm.trained)

    @property
    def untrained(self) -> tuple[Arm, ...]:
        """Other draws of the base."""
        return tuple(arm for arm in self.arms if not arm.trained)


@dataclasses.dataclass(frozen=True)
class Results:
    """What is there of a study, each result as its file has it.

    Attributes:
      base: a seed each.
      arms: name -> a training each.
      failed: sentences of trainings that broke down.
    """

    base: list[dict[str, Any]]
    arms: dict[str, list[dict[str, Any]]]
    failed: list[str]


def read_file(given: str) -> object:
    """What a study's file, PATH.py or PATH.py:VARIANT, has to say: its `get_study(variant)`.

    What is not there is looked for among those that ship with the package, as recipes are.

    Raises:
      StudyError: there is no such file.
      RecipeError: it has no get_study, or that raises something.
    """
    name, _, variant = given.partition(":")
    path = local_path(name if name.endswith(".py") else f"{name}.py")
    if not path.exists() and path.parent in (Path(), Path("configs/studies")):
        path = STUDIES / path.name
    if not path.is_file():
        known = ", ".join(sorted(found.stem for found in STUDIES.glob("*.py"))) or "none"
        raise StudyError(f"there is no study {name!r}; known by name: {known}")
    return call(path, "get_study", variant)


def study_of(given: str, found: object) -> Study:
    """What a study's file gives, if that is a study.

    Raises:
      StudyError: it is something else.
    """
    if not isinstance(found, Study):
        raise StudyError(f"{given}: get_study gives a {type(found).__name__}, a Study is wanted")
    return found


def read_study(given: str) -> Study:
    """A study from its file; see `read_file` and `study_of`."""
    return study_of(given, read_file(given))


_OF_FILES = {
    "init.gpt": "checkpoint",
    "policy.dtype": "dtype",
    "condition.options.encoder": "text_encoder",
}
"""Options of recipes -> fields of `Files` that say the same."""


def with_changes(study: Study, changes: Mapping[str, Any]) -> Study:
    """The study with changes of every arm's recipe.

    Raises:
      StudyError: an arm, or the study itself, sets one of them otherwise.
    """
    own = dict.fromkeys(_OWN, "the study")
    for arm in study.trained:
        own |= dict.fromkeys(arm.changes, f"arm {arm.name!r}")
    if taken := [f"{name} ({own[name]})" for name in changes if name in own]:
        raise StudyError(
            f"study {study.name}: {', '.join(taken)} is set there, and not for all arms"
        )
    files = study.files and study.files.under(changes)
    return dataclasses.replace(study, changes={**study.changes, **changes}, files=files)


def recipe_of(study: Study, arm: Arm | None = None, seed: int = 0) -> Any:
    """The recipe of one training, as `vapi_jax.main` would take it; without an arm, of the judge."""
    arm = arm or Arm(BASE)
    config = read_recipe(os.fspath(arm.recipe or study.recipe))
    asked = max(3, study.samples // 2)  # captions, so that each is drawn of twice
    own = dict(zip(_OWN, (seed, False, asked, asked), strict=True))
    changes = {**study.changes, **arm.changes, **own}
    if "lora" in config.get("policy", {}):
        raise StudyError(
            f"arm {arm.name!r}: a study judges whole generators, and this recipe trains adapters"
        )
    if changes.get("method", config.method) != config.method:
        section = find_method(config.method).section  # with the other method's options
        if section in config:
            with config.unlocked():
                del config[section]
    config = change(config, changes)
    section = find_method(config.method).section
    if arm.average and not config.get(section, {}).get("ema_decay"):
        raise StudyError(
            f"arm {arm.name!r}: it is judged by the average of its parameters, and keeps none: set "
            f"{section}.ema_decay"
        )
    return config
