"""From the results of a study to its tables and what they say; numbers in, numbers and words out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vapi_jax.study.spec import BASE, Study
from vapi_jax.study.statistics import LEVEL, Difference, holm, paired

SETS = tuple[Mapping[str, float], ...]
_SPREAD = ("recall", "diversity")


@dataclasses.dataclass(frozen=True)
class Row:
    """One way to get images.

    Attributes:
      draw: the study's name of how they were drawn; "" for crops and reconstructions.
      name: of the arm, or of what it is beside.
      temperature: of an untrained or matched base.
      means: metric -> mean over trainings, each the mean of its sampling seeds.
      sds: metric -> standard deviation over trainings; over sampling seeds where nothing was trained.
      trainings: how many; 0 where nothing was trained.
    """

    draw: str
    name: str
    temperature: float | None
    means: dict[str, float]
    sds: dict[str, float | None]
    trainings: int


@dataclasses.dataclass(frozen=True)
class Comparison:
    """An arm against the base, or against the base at the arm's entropy.

    Attributes:
      draw, arm: which.
      against: "base" or "base at equal entropy".
      differences: metric -> arm less the other, over pairs of trainings.
      corrected: Holm's p of the headline, over all comparisons of the study; None where there is none.
    """

    draw: str
    arm: str
    against: str
    differences: dict[str, Difference]
    corrected: float | None = None


AGAINST = ("base", "base at equal entropy")


def headline(base: Mapping[str, Any], study: Study) -> str:
    """The metric of the verdict: in the first features, Fréchet's distance where samples allow it."""
    found = base["draws"][next(iter(study.draws))][0]
    name = f"frechet/{study.features[0]}"
    return name if name in found else f"kernel/{study.features[0]}"


def _average(sets: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([one[name] for one in sets])) for name in sets[0]}


def _row(
    draw: str, name: str, temperature: float | None, units: Sequence[Mapping[str, float]], n: int
) -> Row:
    means = _average(units)
    sds = {
        metric: float(np.std([one[metric] for one in units], ddof=1)) if len(units) > 1 else None
        for metric in means
    }
    return Row(draw, name, temperature, means, sds, n)


def rows_of(
    study: Study, base: Mapping[str, Any], arms: Mapping[str, Sequence[Mapping[str, Any]]]
) -> list[Row]:
    """The rows of every draw, and the floors."""
    rows = []
    for draw, how in study.draws.items():
        rows.append(_row(draw, BASE, how.temperature, base["draws"][draw], 0))
        for name, found in arms.items():
            drawn = [one["draws"][draw] for one in found]
            own = [
                {**_average(one["sets"]), **_held_out(result)}
                for one, result in zip(drawn, found, strict=True)
            ]
            rows.append(_row(draw, name, how.temperature, own, len(own)))
            at = float(np.mean([one["matched_temperature"] for one in drawn]))
            matched = [_average(one["matched"]) for one in drawn]
            rows.append(_row(draw, f"{BASE} at the entropy of {name}", at, matched, len(own)))
    rows += [
        _row(arm.name, arm.name, arm.draw.temperature, base["draws"][arm.name], 0)
        for arm in study.arms
        if arm.draw is not None
    ]
    rows.append(_row("", "tokenizer's floor", None, base["floor"], 0))
    rows.append(_row("", "other real crops", None, base["real"], 0))
    return rows


def _held_out(result: Mapping[str, Any]) -> dict[str, float]:
    """Of the teacher-forced metrics after training."""
    return {
        f"held_out/{n}": float(v) for n, v in result["held_out"].items() if n in ("ce", "reward")
    }


def comparisons(
    study: Study, base: Mapping[str, Any], arms: Mapping[str, Sequence[Mapping[str, Any]]]
) -> list[Comparison]:
    """Every arm against the base and against the base at its entropy, in every draw."""
    found = []
    for draw in study.draws:
        for name, results in arms.items():
            drawn = [one["draws"][draw] for one in results]
            own = [_average(one["sets"]) for one in drawn]
            others = {
                AGAINST[0]: [_average(base["draws"][draw])] * len(own),
                AGAINST[1]: [_average(one["matched"]) for one in drawn],
            }
            for against, theirs in others.items():
                differences = {
                    metric: paired([a[metric] for a in own], [b[metric] for b in theirs])
                    for metric in own[0]
                    if all(metric in b for b in theirs)
                }
                found.append(Comparison(draw, name, against, differences))
    metric = headline(base, study)
    p = {str(i): one.differences[metric].p for i, one in enumerate(found)}
    corrected = holm({name: value for name, value in p.items() if value is not None})
    return [
        dataclasses.replace(one, corrected=corrected.get(str(i))) for i, one in enumerate(found)
    ]


def says(comparison: Comparison, metric: str) -> str:
    """ "better", "worse", "no difference" beyond noise, or "one training" where there is no noise to tell."""
    difference = comparison.differences[metric]
    if difference.n == 1:
        return "one training"
    if comparison.corrected is None or comparison.corrected >= LEVEL:
        return "no difference"
    return "better" if difference.mean < 0 else "worse"


def lost_spread(comparison: Comparison) -> list[str]:
    """Which of recall and diversity fell beyond the 95 % interval."""
    found = []
    for name in _SPREAD:
        one = comparison.differences.get(name)
        if one is not None and one.margin is not None and one.mean + one.margin < 0:
            found.append(name)
    return found


def verdicts(found: Sequence[Comparison], metric: str) -> list[str]:
    """A sentence for every comparison, each with its interval."""
    sentences = []
    for one in found:
        difference = one.differences[metric]
        interval = f"{difference.mean:+.4g}"
        if difference.margin is not None:
            interval += f" ± {difference.margin:.2g}"
        text = f"{one.arm} against the {one.against}, {one.draw}: {interval} in {metric}"
        meaning = says(one, metric)
        if meaning == "no difference" and difference.detectable is not None:
            text += (
                f", no difference beyond noise; {difference.detectable:.2g} would have been seen"
            )
        elif meaning == "one training":
            text += ", of one training, which tells nothing about the next"
        else:
            text += f", {meaning} (p = {one.corrected:.2g} after Holm's correction)"
        lost = lost_spread(one)
        if lost and difference.mean < 0:
            text += f"; bought with {' and '.join(lost)}, which fell"
        sentences.append(text + ".")
    return sentences
