"""A study's page: Markdown with its tables and verdicts, and a figure of the differences."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vapi_jax.common.files import write_atomically
from vapi_jax.report.verdict import show
from vapi_jax.study.spec import BASE, Results, Study
from vapi_jax.study.table import (
    Comparison,
    Row,
    comparisons,
    headline,
    higher_is_better,
    rows_of,
    says,
    the,
    verdicts,
)

_COLOURS = {"better": "#1b7837", "worse": "#b2182b"}
_LAST = ("held_out/ce", "held_out/reward")


def markdown(study: Study, results: Results, found: Sequence[Comparison], command: str) -> str:
    """The page.

    Args:
      study: what was asked.
      results: what there is.
      found: of `table.comparisons`.
      command: that makes it.
    """
    metric, rows = headline(study, found), rows_of(study, results)
    names = [metric, "entropy", *dict.fromkeys(name for row in rows for name in row.means)]
    names = [*dict.fromkeys(n for n in names if n not in _LAST)]
    names += [name for name in _LAST if any(name in row.means for row in rows)]
    lines = [f"# {study.name}", "", study.question, "", f"    {command}", ""]
    lines += [f"Recipe `{study.recipe}`. {_amount(study, rows)}", ""]
    lines += ["| | T | trainings | " + " | ".join(names) + " |", "|" + "---|" * (len(names) + 3)]
    for row in rows:
        cells = [_value(row, name) for name in names]
        t = "–" if row.temperature is None else f"{row.temperature:.3g}"
        cells = [_label(study, row), t, str(row.trainings or "–"), *cells]
        lines.append(f"| {' | '.join(cells)} |")
    better = "higher" if higher_is_better(metric) else "lower"
    lines += ["", f"Verdicts are of {metric}; {better} is better.", ""]
    lines += [f"- {sentence}" for sentence in _sentences(study, results, found, metric)]
    return "\n".join([*lines, *_published(study, rows)]) + "\n"


def _sentences(
    study: Study, results: Results, found: Sequence[Comparison], metric: str
) -> list[str]:
    """Verdicts, what waits for a detector, and what broke down."""
    broken = [f"Broke down: {sentence}" for sentence in results.failed]
    return [*verdicts(found, metric, study.seeds), *_waiting(study, results), *broken]


def _waiting(study: Study, results: Results) -> list[str]:
    """Of images for prompts: how many sets have no scores yet."""
    if study.files is None or not study.files.prompts:
        return []
    drawn = [sets for one in results.base for sets in one["draws"].values()]
    for one in (one for trainings in results.arms.values() for one in trainings):
        drawn += [draw[which] for draw in one["draws"].values() for which in ("sets", "matched")]
    sets = [one for found in drawn for one in found]
    gone = sum("geneval/overall" not in one for one in sets)
    return [f"{gone} of {len(sets)} sets of images wait for a detector."] if gone else []


def _label(study: Study, row: Row) -> str:
    alone = row.draw in ("", row.name) or len(study.draws) == 1
    return row.name if alone else f"{row.name}, {row.draw}"


def _amount(study: Study, rows: Sequence[Row]) -> str:
    numbers = sorted({row.trainings for row in rows if row.trainings}) or [0]
    trainings = " to ".join(str(number) for number in {numbers[0]: 0, numbers[-1]: 0})
    return (
        f"{trainings} of {study.seeds} training seeds an arm so far, {study.sampling_seeds} set(s) of "
        f"{study.samples:,} samples each. ± is the standard deviation over seeds. Differences are paired by "
        "seed, which shares uniforms, too, with 95 % intervals of Student's t over seeds."
    )


def _value(row: Row, name: str) -> str:
    if name not in row.means:
        return "–"
    sd = row.sds[name]
    return show(row.means[name]) + ("" if sd is None else f" ± {show(sd, 2)}")


def _published(study: Study, rows: Sequence[Row]) -> list[str]:
    """Published figures, and ours of the same metrics beside them."""
    asked = {BASE: study.published, **{arm.name: arm.published for arm in study.arms}}
    ours = {(row.name, row.draw): row for row in rows}
    lines = []
    for name, figures in asked.items():
        for draw, values in figures.items():
            row = ours.get((name, draw)) or ours.get((name, name))
            for metric, value in values.items():
                own = "–" if row is None else _value(row, metric)
                lines.append(f"| {name} | {draw} | {metric} | {value:g} | {own} |")
    head = ["", "| published | draw | metric | there | here |", "|---|---|---|---|---|"]
    return [*head, *lines] if lines else []


def figure(found: Sequence[Comparison], metric: str) -> Any:
    """Differences with their intervals, an arm a line, what they are held against beside each other."""
    from matplotlib.figure import Figure

    against = [*dict.fromkeys(one.against for one in found)]
    lines = [*dict.fromkeys((one.arm, one.draw) for one in reversed(found))]
    size = (4.0 * len(against), 1.2 + 0.32 * len(lines))
    drawn = Figure(figsize=size, layout="constrained")
    axes = drawn.subplots(1, len(against), sharey=True, squeeze=False)[0]
    for other, axis in zip(against, axes, strict=True):
        for one in (one for one in found if one.against == other):
            difference = one.differences[metric]
            axis.errorbar(
                difference.mean,
                lines.index((one.arm, one.draw)),
                xerr=difference.margin or 0.0,
                fmt="o",
                color=_COLOURS.get(says(one, metric), "#555555"),
                capsize=3,
            )
        axis.axvline(0.0, color="#999999", linewidth=1.0)
        axis.set_yticks(range(len(lines)), [f"{arm}, {draw}" for arm, draw in lines])
        axis.set_title(f"less {the(other)}", fontsize=10)
        axis.set_xlabel(metric, fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    return drawn


def front(study: Study, rows: Sequence[Row]) -> Any:
    """Fidelity against diversity over the study's draws: a line for the base, and for every trained arm."""
    from matplotlib.figure import Figure

    pairs = [("is", "fid"), ("adm/precision", "adm/recall"), ("precision", "recall")]
    pairs = [pair for pair in pairs if all(name in row.means for row in rows[:1] for name in pair)]
    drawn = Figure(figsize=(5.0 * len(pairs), 4.0), layout="constrained")
    axes = drawn.subplots(1, len(pairs), squeeze=False)[0]
    for axis, (x, y) in zip(axes, pairs, strict=True):
        for name in (BASE, *(arm.name for arm in study.trained)):
            found = [r for r in rows if r.name == name and r.draw in study.draws]
            places = [(row.means[x], row.means[y]) for row in found]
            if places:
                axis.plot(*zip(*places, strict=True), marker="o", label=name)
            for row, place in zip(found, places, strict=True):
                axis.annotate(row.draw, place, fontsize=7)
        axis.set_xlabel(x)
        axis.set_ylabel(y)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    return drawn


def write(study: Study, results: Results, folder: Path, command: str) -> tuple[Path, list[str]]:
    """study.md and its pictures in a folder; the page's path, and what it says."""
    path, found = folder / "study.md", comparisons(study, results)
    text, metric = markdown(study, results, found, command), headline(study, found)
    if found:
        figure(found, metric).savefig(folder / "differences.png", dpi=150)
        text += "\n![differences](differences.png)\n"
    if len(study.draws) > 2:
        front(study, rows_of(study, results)).savefig(folder / "front.png", dpi=150)
        text += "\n![fidelity against diversity](front.png)\n"
    write_atomically(path, text)
    return path, _sentences(study, results, found, metric)
