"""From the results of a study to its tables and what they say; numbers in, numbers and words out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vapi_jax.study.spec import BASE, Results, Study
from vapi_jax.study.statistics import LEVEL, Difference, detectable, holm, paired

_SPREAD = ("recall", "adm/recall", "diversity")
_UNMATCHED = 0.03  # nats a token, beyond which entropies are not called equal without a word


@dataclasses.dataclass(frozen=True)
class Row:
    """One way to get images.

    Attributes:
      draw: the study's name of how they were drawn; "" for crops and reconstructions.
      name: of the arm, or of what it is beside.
      temperature: of an untrained or matched base.
      means: metric -> mean over seeds, each the mean of its sets of samples.
      sds: metric -> standard deviation over seeds; None for one.
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
    """An arm against something else.

    Attributes:
      draw, arm: which.
      against: "base", "base at equal entropy", or the study's own arm for that.
      differences: metric -> arm less the other, over pairs of one seed.
      corrected: Holm's p of the headline, over all comparisons with the same; None where there is none.
      level: that its own p would have had to stay under.
    """

    draw: str
    arm: str
    against: str
    differences: dict[str, Difference]
    corrected: float | None = None
    level: float = LEVEL


AGAINST = ("base", "base at equal entropy")
BySeed = Mapping[int, Mapping[str, float]]
"""Seed -> what is measured of it."""


def higher_is_better(metric: str) -> bool:
    """Whether more of it is better, as it is not of distances."""
    scored = metric.startswith(("scenes/", "geneval/", "adm/"))
    return scored or metric in ("is", "precision", *_SPREAD)


def _average(sets: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of the metrics that all of them have."""
    names = [name for name in sets[0] if all(name in one for one in sets)]
    return {name: float(np.mean([one[name] for one in sets])) for name in names}


def _of_base(results: Results, draw: str) -> BySeed:
    return {one["seed"]: _average(one["draws"][draw]) for one in results.base}


def _of_arm(results: Results, arm: str, draw: str, which: str) -> BySeed:
    """`which` is "sets", the arm's own, or "matched", the base's at its entropy."""
    return {one["seed"]: _average(one["draws"][draw][which]) for one in results.arms[arm]}


def _draws_base_tokens(trainings: Sequence[Mapping[str, Any]], draw: str, base: BySeed) -> bool:
    """As the results say; older ones do not, and have the base's own metrics where it is so."""
    told = [(one["seed"], one["draws"][draw]) for one in trainings]
    return all(
        one.get("tokens_of_base", _average(one["matched"]) == base.get(seed)) for seed, one in told
    )


def _paired(own: BySeed, other: BySeed) -> dict[str, Difference]:
    """Each metric's of the seeds that have it in both; nothing where they share none."""
    seeds: dict[str, list[int]] = {}
    for seed in sorted(own.keys() & other.keys()):
        for name in (name for name in own[seed] if name in other[seed]):
            seeds.setdefault(name, []).append(seed)
    return {
        name: paired([own[seed][name] for seed in those], [other[seed][name] for seed in those])
        for name, those in seeds.items()
    }


def comparisons(study: Study, results: Results) -> list[Comparison]:
    """In every draw: every arm against the base, against the base at its entropy, and against the arm that
    the study names; and the base drawn otherwise against the base as the study draws it first.

    An arm that draws the base's tokens has no other base at its entropy than the base.
    """
    found = []

    def compare(draw: str, arm: str, against: str, own: BySeed, other: BySeed) -> None:
        if differences := _paired(own, other):
            found.append(Comparison(draw, arm, against, differences))

    for draw in study.draws:
        base = _of_base(results, draw)
        for name in results.arms:
            own = _of_arm(results, name, draw, "sets")
            compare(draw, name, AGAINST[0], own, base)
            matched = _of_arm(results, name, draw, "matched")
            if not _draws_base_tokens(results.arms[name], draw, base):
                compare(draw, name, AGAINST[1], own, matched)
            if study.against in results.arms and name != study.against:
                other = _of_arm(results, study.against, draw, "sets")
                compare(draw, name, study.against, own, other)
    first = next(iter(study.draws))
    for arm in study.untrained:
        compare(first, arm.name, AGAINST[0], _of_base(results, arm.name), _of_base(results, first))
    return _corrected(found, headline(study, found))


def _corrected(found: Sequence[Comparison], metric: str) -> list[Comparison]:
    """With Holm's p in a metric: all that is held against the same is corrected together."""
    done = list(found)
    for against in {one.against for one in found}:
        p = {
            str(i): one.differences[metric].p
            for i, one in enumerate(found)
            if one.against == against
        }
        corrected = holm({i: value for i, value in p.items() if value is not None})
        left = sum(value >= LEVEL for value in corrected.values())
        for i in map(int, p):
            level = LEVEL / max(left, 1)
            done[i] = dataclasses.replace(found[i], corrected=corrected.get(str(i)), level=level)
    return done


def headline(study: Study, found: Sequence[Comparison]) -> str:
    """The metric of the verdicts: the study's own, FID, or a distance in the first features.

    The first of these that all comparisons have; Fréchet's distance wants more samples than features.
    """
    first = study.features[0]
    for metric in (study.verdict, "fid", f"frechet/{first}"):
        if metric and found and all(metric in one.differences for one in found):
            return metric
    return f"kernel/{first}"


def _row(
    draw: str, name: str, temperature: float | None, units: Sequence[Mapping[str, float]], n: int
) -> Row:
    """Of each metric, over the units that have it."""
    means: dict[str, float] = {}
    sds: dict[str, float | None] = {}
    for metric in dict.fromkeys(metric for unit in units for metric in unit):
        values = [unit[metric] for unit in units if metric in unit]
        means[metric] = float(np.mean(values))
        sds[metric] = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Row(draw, name, temperature, means, sds, n)


def rows_of(study: Study, results: Results) -> list[Row]:
    """The rows of every draw, and the floors."""
    rows = []
    for draw, how in study.draws.items():
        rows.append(_row(draw, BASE, how.temperature, list(_of_base(results, draw).values()), 0))
        for name, found in results.arms.items():
            own = _of_arm(results, name, draw, "sets")
            units = [{**own[one["seed"]], **_held_out(one)} for one in found]
            rows.append(_row(draw, name, how.temperature, units, len(own)))
            at = float(np.mean([one["draws"][draw]["matched_temperature"] for one in found]))
            matched = list(_of_arm(results, name, draw, "matched").values())
            rows.append(_row(draw, f"{BASE} at the entropy of {name}", at, matched, len(own)))
    for arm in study.untrained:
        assert arm.draw is not None, "it is untrained"
        drawn = list(_of_base(results, arm.name).values())
        rows.append(_row(arm.name, arm.name, arm.draw.temperature, drawn, 0))
    for name, what in (("tokenizer's floor", "floor"), ("other real crops", "real")):
        rows.append(_row("", name, None, [one[what] for one in results.base], 0))
    return rows


def _held_out(result: Mapping[str, Any]) -> dict[str, float]:
    """Of the teacher-forced metrics after training."""
    return {
        f"held_out/{n}": float(v) for n, v in result["held_out"].items() if n in ("ce", "reward")
    }


def says(comparison: Comparison, metric: str) -> str:
    """ "better", "worse", "no difference" beyond noise, or "untested" where there is no noise to tell."""
    difference = comparison.differences[metric]
    if not difference.sd:
        return "untested"
    if comparison.corrected is None or comparison.corrected >= LEVEL:
        return "no difference"
    return "better" if (difference.mean > 0) == higher_is_better(metric) else "worse"


def the(against: str) -> str:
    """What is compared with, in a sentence."""
    return f"the {against}" if against in AGAINST else against


def lost_spread(comparison: Comparison) -> list[str]:
    """Which of recall and diversity fell beyond the 95 % interval."""
    found = []
    for name in _SPREAD:
        one = comparison.differences.get(name)
        if one is not None and one.margin is not None and one.mean + one.margin < 0:
            found.append(name)
    return found


def verdicts(found: Sequence[Comparison], metric: str, seeds: int) -> list[str]:
    """A sentence for every comparison, each with its interval; `seeds` are the study's."""
    return [f"{_verdict(one, metric, seeds)}." for one in found]


def _verdict(one: Comparison, metric: str, seeds: int) -> str:
    difference = one.differences[metric]
    interval = f"{difference.mean:+.4g}"
    if difference.margin is not None:
        interval += f" ± {difference.margin:.2g}"
    if difference.n < seeds:
        interval += f" ({difference.n} of {seeds} pairs)"
    text = f"{one.arm} against {the(one.against)}, {one.draw}: {interval} in {metric}"
    meaning = says(one, metric)
    entropy = one.differences.get("entropy")
    if one.against == AGAINST[1] and entropy is not None and abs(entropy.mean) > _UNMATCHED:
        text += f", at {entropy.mean:+.2g} nats a token"
    if meaning == "no difference":
        assert difference.sd is not None, "or it is untested"
        least = detectable(difference.sd, difference.n, one.level)
        return f"{text}, no difference beyond noise; {least:.2g} would have been seen"
    if meaning == "untested":
        many = f"the same in all {difference.n} pairs, which leaves no noise to test by"
        return f"{text}, {many if difference.n > 1 else 'of one pair, which tells nothing about the next'}"
    text += f", {meaning} (p = {one.corrected:.2g} after Holm's correction)"
    lost = lost_spread(one)
    if lost and meaning == "better":
        text += f"; bought with {' and '.join(lost)}, which fell"
    return text
