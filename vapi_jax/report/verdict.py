"""What a run's numbers say, in plain words: better, worse, or not to be told apart.

A difference of two Fréchet distances counts when it lies outside the 95 % interval of Student's paired
t-test over sampling seeds. That interval holds the noise of sampling only: one training run says nothing
about the next, and the text says so.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy.special import stdtrit

_DIM = 512  # of features of summaries that do not say it


def number(value: Any) -> float | None:
    """A finite float, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def show(value: Any, digits: int = 4) -> str:
    """Four significant digits without exponents where possible; an en dash for what is absent."""
    value = number(value)
    if value is None:
        return "–"
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    if magnitude >= 7 or magnitude < -4:
        text = f"{value:.{digits - 1}e}"
    else:
        text = f"{value:.{max(0, digits - 1 - magnitude)}f}"
    return text.replace("-", "−")


def show_distance(estimate: Mapping[str, Any] | None) -> str:
    """'458.4 ± 1.0' (with no-break spaces), or without ± where there is no standard deviation."""
    mean = number((estimate or {}).get("mean"))
    if estimate is None or mean is None:
        return "–"
    sd = number(estimate.get("sd"))
    decimals = 1 if abs(mean) >= 10 else 2 if abs(mean) >= 1 else 4
    text = f"{mean:.{decimals}f}".replace("-", "−")
    if sd is None or (number(estimate.get("n")) or 0) < 2:
        return text
    return f"{text}\u00a0±\u00a0{sd:.{decimals}f}"


def show_score(estimate: Mapping[str, Any] | None) -> str:
    """A score and its 95 % interval."""
    values = [number((estimate or {}).get(key)) for key in ("value", "low", "high")]
    if None in values:
        return "–"
    value, low, high = (f"{x:.3f}".replace("-", "−") for x in values)
    return f"{value} [{low}, {high}]"


def _scene_sentences(summary: Mapping[str, Any]) -> list[str]:
    """The mean of the six scene scores before and after, and against the base at equal entropy."""
    scenes = summary.get("scenes") or {}
    overall = {kind: found.get("overall") for kind, found in scenes.items() if kind != "changes"}
    changes = {k: v.get("overall") or {} for k, v in (scenes.get("changes") or {}).items()}
    if not overall.get("base") or not overall.get("vapi"):
        return []

    def told(change: Mapping[str, Any]) -> str:
        outside = (number(change.get("low")) or 0) > 0 or (number(change.get("high")) or 0) < 0
        where = "outside" if outside else "inside"
        return f"a difference of {show_score(change)}, {where} the noise of prompts"

    found = [
        "The overall scene score, the mean of GenEval's six tasks with its 95 % interval, went from"
        f" {show_score(overall['base'])} to {show_score(overall['vapi'])},"
        f" {told(changes.get('base', {}))}."
    ]
    if overall.get("matched"):
        found.append(
            f"The base at equal entropy has {show_score(overall['matched'])}:"
            f" {told(changes.get('matched', {}))}."
        )
    if overall.get("floor"):
        found.append(
            "The detector's ceiling, its score on the tokenizer's reconstructions of true scenes, is"
            f" {show_score(overall['floor'])}."
        )
    return found


@dataclass(frozen=True)
class Comparison:
    """How distance `a` compares with distance `b`; lower is better.

    Attributes:
      outcome: "better" or "worse" (outside the noise), "same" (inside it), "unknown" (no noise estimate:
        fewer than two seeds on a side) or "absent" (a number is missing).
      difference: a - b.
      margin: half width of the 95 % interval of the difference; None when unknown.
    """

    outcome: str
    difference: float = 0.0
    margin: float | None = None


def compare(a: Mapping[str, Any] | None, b: Mapping[str, Any] | None) -> Comparison:
    """Student's paired comparison of two {"mean", "sd", "n", "values"}, whose values share their uniforms
    seed by seed; Welch's where values are missing or of different count.
    """
    means = [number((x or {}).get("mean")) for x in (a, b)]
    if a is None or b is None or means[0] is None or means[1] is None:
        return Comparison("absent")
    difference = means[0] - means[1]
    counts = [number(x.get("n")) or 0 for x in (a, b)]
    deviations = [number(x.get("sd")) for x in (a, b)]
    if min(counts) < 2 or deviations[0] is None or deviations[1] is None:
        return Comparison("unknown", difference)
    parts = [sd**2 / n for sd, n in zip(deviations, counts, strict=True) if sd is not None]
    variance = sum(parts)
    margin = 0.0
    ours, theirs = (x.get("values") or () for x in (a, b))
    if len(ours) == len(theirs) > 1:
        apart = [x - y for x, y in zip(ours, theirs, strict=True)]
        spread = statistics.stdev(apart) / math.sqrt(len(apart))
        margin = float(stdtrit(len(apart) - 1, 0.975)) * spread
    elif variance > 0:
        freedom = variance**2 / sum(p**2 / (n - 1) for p, n in zip(parts, counts, strict=True))
        margin = float(stdtrit(freedom, 0.975)) * math.sqrt(variance)
    if abs(difference) <= margin or difference == 0:
        return Comparison("same", difference, margin)
    return Comparison("better" if difference < 0 else "worse", difference, margin)


def rows_of(summary: Mapping[str, Any], kind: str) -> list[Mapping[str, Any]]:
    """The rows of the table of one kind."""
    return [row for row in summary.get("table") or [] if row.get("kind") == kind]


def first_row(summary: Mapping[str, Any], kind: str) -> Mapping[str, Any] | None:
    return next(iter(rows_of(summary, kind)), None)


def distances(summary: Mapping[str, Any], features: str) -> dict[str, Mapping[str, Any] | None]:
    """{"before", "after", "floor"} of "frechet" or "frechet_unseen", from the table where absent."""
    block = summary.get(features) or {}
    kinds = {"before": "base", "after": "vapi", "floor": "floor"}
    return {
        name: block.get(name) or (first_row(summary, kind) or {}).get(features)
        for name, kind in kinds.items()
    }


def feature_name(summary: Mapping[str, Any], features: str) -> str:
    named = (summary.get(features) or {}).get("feature")
    return str(named) if named else "seen features" if features == "frechet" else "unseen features"


def _noise(c: Comparison) -> str:
    """How a difference stands to the noise, for use after a comma or inside parentheses."""
    margin = "" if c.margin is None else f" (±\u00a0{show(c.margin, 2)})"
    return {
        "better": f"more than the noise{margin}",
        "worse": f"more than the noise{margin}",
        "same": f"inside the noise{margin}",
        "unknown": "from one seed, so with no estimate of the noise",
    }[c.outcome]


@dataclass(frozen=True)
class Verdict:
    """tone: "good", "mixed", "bad" or "plain"; headline: one line; sentences: the paragraph."""

    tone: str
    headline: str
    sentences: tuple[str, ...]


def _reward_sentence(summary: Mapping[str, Any]) -> tuple[str | None, str]:
    """('rose' | 'fell' | 'stayed' | None, a sentence or '')."""
    reward = summary.get("reward") or {}
    first, last = number(reward.get("first")), number(reward.get("last"))
    if first is None or last is None:
        return None, ""
    if abs(last - first) < 1e-3 * max(abs(first), abs(last)):
        return "stayed", f"The reward on held-out images stayed at {show(last)}."
    way = "rose" if last > first else "fell"
    return way, f"The reward on held-out images {way} from {show(first)} to {show(last)}."


def too_few_samples(summary: Mapping[str, Any]) -> bool:
    """Whether the table is a trial's: of no more samples than features, so that distances mean nothing."""
    found = (summary.get(name) or {} for name in ("frechet", "frechet_unseen"))
    return any(
        number(block.get("samples")) is not None and block["samples"] <= block.get("dim", _DIM)
        for block in found
    )


def _distance_sentences(summary: Mapping[str, Any]) -> tuple[Comparison, Comparison, list[str]]:
    """Before against after, in the features of the reward and in the others."""
    seen, unseen = distances(summary, "frechet"), distances(summary, "frechet_unseen")
    change = compare(seen["after"], seen["before"])
    other = compare(unseen["after"], unseen["before"])
    sentences = []
    if change.outcome != "absent":
        before, after = show_distance(seen["before"]), show_distance(seen["after"])
        way = "fell" if change.difference < 0 else "rose"
        told = f"{way} from {before} to {after}, {_noise(change)}"
        sentences.append(
            f"The Fréchet distance of samples to real images ({feature_name(summary, 'frechet')};"
            f" lower is better) {told if change.difference else f'did not change: {after}'}."
        )
    if other.outcome != "absent":
        agree = "agree" if other.outcome == change.outcome else "do not say the same"
        sentences.append(
            f"Features that the reward never sees ({feature_name(summary, 'frechet_unseen')}) {agree}:"
            f" {show_distance(unseen['before'])} became {show_distance(unseen['after'])},"
            f" {_noise(other)}."
        )
    if too_few_samples(summary):
        sentences.append(
            "This was a trial: with no more samples than features, these distances mean nothing."
        )
    return change, other, sentences


def _sharpening_sentences(
    summary: Mapping[str, Any],
) -> tuple[Comparison, Comparison, list[str]]:
    """Against the base at the temperature of equal entropy: is the gain more than sharpening?

    In the features of the reward, in those that it never sees, and in words.
    """
    after, matched = first_row(summary, "vapi"), first_row(summary, "matched")
    if after is None or matched is None:
        return Comparison("absent"), Comparison("absent"), []
    change, other = (
        compare(after.get(name), matched.get(name)) for name in ("frechet", "frechet_unseen")
    )
    if change.outcome == "absent":
        return change, other, []
    temperature = number(matched.get("temperature"))
    at = "" if temperature is None else f" (temperature {temperature:.3g})"
    noise = _noise(change)
    meaning = {
        "better": f"so the post-trained model is better than mere sharpening makes the base, by {noise}",
        "same": f"a difference {noise}: another temperature of the base does as well, and can explain"
        " what changed",
        "worse": f"which is better than the post-trained model by {noise}: simply another temperature"
        " of the base does more",
        "unknown": f"{noise}: this run cannot say whether the change is more than sharpening",
    }
    reached = show_distance(matched.get("frechet"))
    sentences = [
        f"The base sampled at the same entropy{at} reaches {reached}, {meaning[change.outcome]}."
    ]
    sides = {"better": "better by ", "worse": "worse by ", "same": "not to be told apart, "}
    if other.outcome in sides:
        reached = show_distance(matched.get("frechet_unseen"))
        sentences.append(
            f"In the features that the reward never sees it reaches {reached}: the post-trained model"
            f" is {sides[other.outcome]}{_noise(other)}."
        )
    if equal := _equal_temperature(summary):
        sentences.append(equal)
    entropies = number(after.get("entropy")), number(matched.get("entropy"))
    if entropies[0] is not None and entropies[1] is not None:
        gap = entropies[1] - entropies[0]
        if abs(gap) > 0.03:
            sentences.append(
                f"(The match is not exact: that control's entropy is {show(abs(gap), 2)} nats"
                f" {'higher' if gap > 0 else 'lower'}.)"
            )
    return change, other, sentences


def _equal_temperature(summary: Mapping[str, Any]) -> str:
    """How far the base would have to be sharpened for the distance of the post-trained model in features
    that the reward never sees: on straight lines between the table's temperatures of the base."""
    kinds = ("base", "temperature", "matched")
    rows = [row for kind in kinds for row in rows_of(summary, kind)]
    found = [(number(r.get("temperature")), _mean(r.get("frechet_unseen"))) for r in rows]
    points = sorted(((t, d) for t, d in found if t is not None and d is not None), reverse=True)
    target = _mean((first_row(summary, "vapi") or {}).get("frechet_unseen"))
    if target is None or len(points) < 2:
        return ""
    for (here, far), (there, near) in itertools.pairwise(points):
        if min(far, near) <= target <= max(far, near) and far != near:
            temperature = here + (there - here) * (far - target) / (far - near)
            return (
                "In those features post-training did as much as a temperature of"
                f" {temperature:.2f} does to the base."
            )
    best = min(points, key=lambda point: point[1])
    if target < best[1]:
        return (
            "In those features no temperature of the base in the table does as much:"
            f" the best, {best[0]:.2f}, reaches {show(best[1])}."
        )
    return ""


def _mean(estimate: Mapping[str, Any] | None) -> float | None:
    return number((estimate or {}).get("mean"))


def _control_sentences(summary: Mapping[str, Any]) -> list[str]:
    """The post-trained model against trained controls (cross-entropy only, shuffled advantages)."""
    after = (first_row(summary, "vapi") or {}).get("frechet")
    words = {
        "better": "the post-trained model is better",
        "worse": "the post-trained model is worse",
        "same": "not to be told apart from the post-trained model",
        "unknown": "one seed only",
    }
    said = []
    for row in rows_of(summary, "control"):
        outcome = compare(after, row.get("frechet")).outcome
        if outcome != "absent":
            name = row.get("name", "a control")
            said.append(f"“{name}” {show_distance(row.get('frechet'))} ({words[outcome]})")
    return [f"Trained controls: {', '.join(said)}."] if said else []


def verdict(summary: Mapping[str, Any], history: Sequence[Mapping[str, Any]] = ()) -> Verdict:
    """What a run came to: a comparison where the summary has a table, else its main numbers.

    Args:
      summary: what summary.json holds; every clause appears only where its numbers exist.
      history: rows of metrics.jsonl.
    """
    return _comparison(summary) if summary.get("table") else _plain(summary, history)


def _comparison(summary: Mapping[str, Any]) -> Verdict:
    """Base, post-trained model and controls, by their rows of the table."""
    way, reward = _reward_sentence(summary)
    change, other, distance = _distance_sentences(summary)
    matched, matched_unseen, sharpening = _sharpening_sentences(summary)
    sentences = [reward, *_scene_sentences(summary), *distance]
    sentences += [*sharpening, *_control_sentences(summary)]
    if change.outcome not in ("absent", "unknown"):
        sentences.append(
            "Noise means the 95\u00a0% interval over sampling seeds of this one training run; a repeated"
            " training may differ by more."
        )
    headline = _headline(way, change, other, matched, matched_unseen)
    return Verdict(*headline, tuple(s for s in sentences if s))


def _reward_headline(way: str) -> tuple[str, str]:
    tone = {"rose": "plain", "fell": "bad", "stayed": "mixed"}[way]
    return tone, f"The reward {way}; samples were not compared"


def _headline(
    way: str | None,
    change: Comparison,
    other: Comparison,
    matched: Comparison,
    matched_unseen: Comparison,
) -> tuple[str, str]:
    """(tone, headline). 'Good' asks for a gain over the base AND over the entropy-matched control, the
    latter in features that the reward never sees, too, where there are any."""
    if change.outcome == "absent":
        return _reward_headline(way) if way else ("plain", "The run is complete")
    if change.outcome == "unknown":
        way_text = "Lower" if change.difference < 0 else "Higher"
        return "mixed", f"{way_text} Fréchet distance, from one seed: not conclusive"
    reward = "" if way in (None, "rose") else f", and the reward {way}"
    if change.outcome == "worse":
        tail = ", although the reward rose" if way == "rose" else reward
        return "bad", f"Samples are worse than those of the base{tail}"
    if change.outcome == "same":
        tail = ", although the reward rose" if way == "rose" else reward
        return "mixed", f"No change of the samples beyond noise{tail}"
    if matched.outcome == "worse":
        return "mixed", "Better than the base, but another temperature of it does better still"
    if matched.outcome == "same":
        return "mixed", "Better than the base, but no better than another temperature of it"
    if other.outcome == "worse":
        return "mixed", "Better in the features of the reward, worse in features it never sees"
    if matched.outcome == "better" and matched_unseen.outcome in ("same", "worse"):
        return "mixed", f"More than sharpening in the features of the reward, not in others{reward}"
    if matched.outcome == "better":
        if reward:
            return "mixed", f"Better than the base, by more than sharpening{reward}"
        return "good", "Better than the base, and by more than sharpening"
    return "mixed", f"Better than the base; not compared at equal entropy{reward}"


def _plain(summary: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> Verdict:
    """Where the main numbers began and ended."""
    way, reward = _reward_sentence(summary)
    sentences = [reward] if reward else []
    for key, name in (("ce", "Held-out cross-entropy"), ("entropy", "Entropy")):
        block = summary.get(key) or {}
        first, last = number(block.get("first")), number(block.get("last"))
        if first is not None and last is not None:
            sentences.append(f"{name} went from {show(first)} to {show(last)} nats per token.")
    headline = _reward_headline(way) if way else ("plain", "The run is complete")
    losses = [v for row in history if (v := number(row.get("loss"))) is not None]
    if len(losses) >= 10:
        tenth = max(1, len(losses) // 10)
        first, last = sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
        sentences.append(
            f"The training loss went from {show(first)} (mean of the first tenth of the run) to"
            f" {show(last)} (mean of the last)."
        )
        if not way:
            fell = last < first
            headline = ("plain", "The loss fell") if fell else ("bad", "The loss did not fall")
    return Verdict(*headline, tuple(sentences))
