"""A study's page: Markdown with its tables and verdicts, and a figure of the differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vapi_jax.common.files import write_atomically
from vapi_jax.report.verdict import show
from vapi_jax.study.spec import Study
from vapi_jax.study.table import AGAINST, Comparison, Row, headline, says, verdicts

_COLOURS = {"better": "#1b7837", "worse": "#b2182b"}


def markdown(
    study: Study,
    base: Mapping[str, Any],
    rows: Sequence[Row],
    found: Sequence[Comparison],
    command: str,
) -> str:
    """The page.

    Args:
      study: what was asked.
      base: its result.
      rows, found: of `table.rows_of` and `table.comparisons`.
      command: that makes it.
    """
    metric = headline(base, study)
    names = [name for name in rows[0].means if name not in ("entropy",)]
    names = ["entropy", metric, *(name for name in names if name != metric)]
    names += [
        name for name in ("held_out/ce", "held_out/reward") if any(name in r.means for r in rows)
    ]
    lines = [f"# {study.name}", "", study.question, "", f"    {command}", ""]
    lines += [f"Recipe `{study.recipe}`, {_amount(study, rows)}", ""]
    lines += ["| | T | trainings | " + " | ".join(names) + " |", "|" + "---|" * (len(names) + 3)]
    for row in rows:
        label = (
            row.name
            if row.draw in ("", row.name) or len(study.draws) == 1
            else f"{row.name}, {row.draw}"
        )
        cells = [_value(row, name) for name in names]
        t = "–" if row.temperature is None else f"{row.temperature:.3g}"
        lines.append(f"| {label} | {t} | {row.trainings or '–'} | " + " | ".join(cells) + " |")
    lines += ["", f"Verdicts are of {metric}; lower is better.", ""]
    lines += [f"- {sentence}" for sentence in verdicts(found, metric)]
    published = [(arm.name, arm.published) for arm in study.arms if arm.published]
    if published:
        lines += ["", "Published:", ""]
        lines += [
            f"- {name}: " + ", ".join(f"{k} {v:g}" for k, v in values.items())
            for name, values in published
        ]
    return "\n".join(lines) + "\n"


def _amount(study: Study, rows: Sequence[Row]) -> str:
    trainings = max((row.trainings for row in rows), default=0)
    return (
        f"{trainings} of {study.seeds} training seeds an arm so far, {study.sampling_seeds} sets of "
        f"{study.samples:,} samples each. ± is the standard deviation over trainings, of the base over sets. "
        "Differences are paired by seed, with 95 % intervals of Student's t over trainings."
    )


def _value(row: Row, name: str) -> str:
    if name not in row.means:
        return "–"
    sd = row.sds[name]
    return show(row.means[name]) + ("" if sd is None else f" ± {show(sd, 2)}")


def figure(found: Sequence[Comparison], metric: str) -> Any:
    """Differences with their intervals, an arm a line, base and matched base beside each other."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(8.0, 1.2 + 0.32 * len(found)), layout="constrained")
    axes = drawn.subplots(1, len(AGAINST), sharey=True)
    for against, axis in zip(AGAINST, axes, strict=True):
        chosen = [one for one in found if one.against == against]
        for place, one in enumerate(reversed(chosen)):
            difference = one.differences[metric]
            colour = _COLOURS.get(says(one, metric), "#555555")
            axis.errorbar(
                difference.mean,
                place,
                xerr=difference.margin or 0.0,
                fmt="o",
                color=colour,
                capsize=3,
            )
        axis.axvline(0.0, color="#999999", linewidth=1.0)
        axis.set_yticks(range(len(chosen)), [f"{one.arm}, {one.draw}" for one in reversed(chosen)])
        axis.set_title(f"less the {against}", fontsize=10)
        axis.set_xlabel(metric, fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    return drawn


def write(
    study: Study,
    base: Mapping[str, Any],
    rows: Sequence[Row],
    found: Sequence[Comparison],
    folder: Path,
    command: str,
) -> Path:
    """study.md and differences.png in a folder; the page's path."""
    path = folder / "study.md"
    text = markdown(study, base, rows, found, command)
    write_atomically(path, text + "\n![differences](differences.png)\n")
    figure(found, headline(base, study)).savefig(folder / "differences.png", dpi=150)
    return path
