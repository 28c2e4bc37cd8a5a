"""The charts of a run: each is one function that makes one matplotlib figure, saved as SVG or as pixels.

matplotlib is used without pyplot, and with its own defaults whatever the user's settings are. A unit of
length is a point: a page scales the drawing to its place.
"""

from __future__ import annotations

import io
import itertools
import re
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from jaxtyping import UInt8
from matplotlib import rc_context, style
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, PathPatch
from matplotlib.path import Path
from matplotlib.ticker import MaxNLocator
from PIL import Image
from scipy.signal import savgol_filter

from vapi_jax.evaluation.embeddings import Plane
from vapi_jax.evaluation.held_out import HELD_OUT
from vapi_jax.evaluation.in_training import SAMPLED
from vapi_jax.report import verdict as words
from vapi_jax.report.verdict import number

PALETTE = ("#2563c9", "#d9822b", "#2e8b6a", "#a2529c", "#6b7680")
LARGE, SMALL = (400.0, 322.0), (240.0, 190.0)
"""Width and height, in points: two small figures over each other are as high as a large one."""

_INK, _MUTED, _LINE = "#1c2024", "#5d6770", "#e3e4e1"
_MAX_DOTS = 300  # of single steps: a long run needs no megabytes of markers
_SMOOTHED_FROM = 15  # points of a curve
_TURNS = 12  # in which the sets of a plane are drawn
_LOOKS = ((4, "s", "filled"), (1, "^", "dashed"), (0, "o", "solid"))
"""Colour, marker and outline by the place of a set: no two of them look alike without colours."""

_STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": _MUTED,
    "axes.formatter.limits": (-5, 6),
    "axes.formatter.useoffset": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelcolor": _MUTED,
    "axes.labelsize": 11,
    "axes.linewidth": 0.8,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "errorbar.capsize": 3,
    "figure.titlesize": 12,
    "figure.titleweight": "bold",
    "font.size": 10.5,
    "grid.color": _LINE,
    "legend.fontsize": 10.5,
    "legend.frameon": False,
    "legend.labelcolor": _MUTED,
    "lines.linewidth": 1.8,
    "lines.markeredgewidth": 0,
    "lines.markersize": 6,
    "svg.fonttype": "none",
    "text.parse_math": False,  # a dollar sign in the name of a class is a dollar sign
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "ytick.major.size": 0,
}


@contextmanager
def _styled() -> Iterator[None]:
    """matplotlib's defaults and ours, for as long as a figure is made or saved."""
    with style.context(["default", _STYLE]), warnings.catch_warnings():
        # A letter that the font lacks is drawn as a box.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


@contextmanager
def chart(
    title: str, x_label: str, y_label: str, size: tuple[float, float] = LARGE
) -> Iterator[tuple[Figure, Axes]]:
    """A figure and its axes to draw into, in the style of all others.

    Args:
      title, x_label, y_label: text; units belong to the labels.
      size: width and height in points.
    """
    with _styled():
        figure = Figure((size[0] / 72, size[1] / 72), layout="constrained")
        axes = figure.add_subplot(xlabel=x_label, ylabel=y_label)
        figure.suptitle(title, x=0.02, ha="left", color=_INK, wrap=True)
        ticks: dict[str, Any] = {"nbins": 5 if size[0] > 300 else 4, "steps": [1, 2, 2.5, 5, 10]}
        axes.xaxis.set_major_locator(MaxNLocator(**ticks, integer=x_label == "step"))
        axes.yaxis.set_major_locator(MaxNLocator(**ticks))
        yield figure, axes
        # Once for all: another layout at each saving would move things by a hair.
        figure.draw_without_rendering()
        figure.set_layout_engine("none")


def svg(figure: Figure) -> str:
    """The figure as an SVG document, the same bytes each time; its title is the document's, too."""
    title, text = figure.get_suptitle(), io.StringIO()
    metadata = {"Title": title, **dict.fromkeys(("Creator", "Date", "Format", "Type"))}
    # Names inside the document are digests: of other documents they are others.
    with _styled(), rc_context({"svg.hashsalt": title}):
        figure.savefig(text, format="svg", metadata=metadata)
    return text.getvalue()


def inline_svg(figure: Figure) -> str:
    """The figure as an element to stand in an HTML page, among others."""
    text = svg(figure)
    text = text[text.index("<svg") :].replace("<svg", '<svg role="img"', 1)
    # Names of groups are those of the next figure, too, and a style would be all the page's.
    text = re.sub(r'<g id="[\w.]+"', "<g", text)
    return re.sub(r"<(style|metadata)\b.*?</\1>", "", text, flags=re.DOTALL)


def pixels(figure: Figure, scale: float = 2.5) -> UInt8[np.ndarray, "h w 3"]:
    """The figure as pixels on white, `scale` of them for a point."""
    png = io.BytesIO()
    with _styled():
        figure.savefig(png, format="png", dpi=72 * scale)
    return np.asarray(Image.open(png).convert("RGB"))


# --- learning curves ------------------------------------------------------------------------------


def points(
    history: Sequence[Mapping[str, Any]], metric: str
) -> tuple[list[float], list[float], list[float] | None]:
    """Steps, values and errors ("METRIC_error"; None unless all are known) of the rows with the metric."""
    rows = [
        row
        for row in history
        if number(row.get("step")) is not None and number(row.get(metric)) is not None
    ]
    errors = [e for row in rows if (e := number(row.get(f"{metric}_error"))) is not None]
    known = errors if rows and len(errors) == len(rows) else None
    return [row["step"] for row in rows], [row[metric] for row in rows], known


def smooth(values: Sequence[float]) -> list[float]:
    """Local straight-line fits over a seventh of the curve, twice; a straight line passes unchanged.

    A moving average would lag at the ends of a rising curve.
    """
    window = max(5, len(values) // 7) | 1
    for _ in range(2):
        values = savgol_filter(values, window, polyorder=1)
    return np.asarray(values).tolist()


def curve(
    history: Sequence[Mapping[str, Any]],
    metric: str,
    title: str,
    y_label: str,
    size: tuple[float, float] = LARGE,
) -> Figure:
    """A metric against the step: single steps faint under a smoothed line, and held-out values."""
    with chart(title, "step", y_label, size) as (figure, axes):
        steps, values, errors = points(history, metric)
        held_out = points(history, HELD_OUT + metric)
        if metric.startswith(HELD_OUT):
            held_out, steps = (steps, values, errors), []
        if len(steps) >= _SMOOTHED_FROM and not metric.startswith(SAMPLED):
            dots: dict[str, Any] = {
                "linestyle": "none",
                "marker": "o",
                "markersize": 3,
                "alpha": 0.36,
            }
            dots["markevery"] = -(-len(steps) // _MAX_DOTS)
            axes.plot(steps, values, color=PALETTE[0], label="single steps", **dots)
            axes.plot(steps, smooth(values), color=PALETTE[0], label="smoothed")
        elif steps:
            _marked(axes, steps, values, errors, color=PALETTE[0], marker="o", label="training")
        if held_out[0]:
            _marked(axes, *held_out, color=PALETTE[1], marker="s", label="held-out")
        if size == LARGE and len(axes.get_legend_handles_labels()[0]) > 1:
            axes.legend()
    return figure


def lines(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    title: str,
    x_label: str,
    y_label: str,
) -> Figure:
    """Lines with a marker at each point, label -> (x, y), of numbers that begin at 0."""
    with chart(title, x_label, y_label) as (figure, axes):
        for (label, (x, y)), color, marker in zip(series.items(), PALETTE, "os^Dv", strict=False):
            _marked(axes, x, y, None, color=color, marker=marker, label=label)
        axes.set_ylim(bottom=0)
        axes.legend()
    return figure


def _marked(
    axes: Axes, x: Sequence[float], y: Sequence[float], errors: Sequence[float] | None, **look: Any
) -> ErrorbarContainer:
    """A line with markers, and bars where the errors are known."""
    return axes.errorbar(x, y, errors, capthick=1.4, **look)


# --- the table as a picture -----------------------------------------------------------------------


def sweep(summary: Mapping[str, Any], features: str) -> Figure | None:
    """Fréchet distance against sampling entropy: the base's temperatures as a line, the rest as points.

    None unless the summary's table has a row of the base and another with both numbers.
    """
    rows = [
        row
        for row in summary.get("table") or []
        if number(row.get("entropy")) is not None
        and number((row.get(features) or {}).get("mean")) is not None
    ]

    def of_kind(*kinds: str) -> list[Mapping[str, Any]]:
        return sorted((row for row in rows if row.get("kind") in kinds), key=lambda r: r["entropy"])

    base = of_kind("base", "temperature", "matched")
    if not base or len(rows) < 2:
        return None
    ring = {"marker": "o", "markersize": 15, "markerfacecolor": "none", "markeredgewidth": 1.6}
    marks = itertools.cycle(((PALETTE[2], "^"), (PALETTE[3], "s")))
    groups: list[tuple[str, list[Mapping[str, Any]], dict[str, Any]]] = [
        ("base, by temperature", base, {"color": PALETTE[1], "marker": "o", "linestyle": "-"}),
        ("base at equal entropy", of_kind("matched"), {"color": PALETTE[1], **ring}),
        *(
            (str(row.get("name", "control")), [row], {"color": color, "marker": marker})
            for row, (color, marker) in zip(of_kind("control"), marks, strict=False)
        ),
        ("post-trained", of_kind("vapi"), {"color": PALETTE[0], "marker": "D"}),
    ]
    title = f"Fréchet distance against entropy, {words.feature_name(summary, features)}"
    labels = ("sampling entropy (nats per token)", "Fréchet distance (lower is better)")
    with chart(title, *labels) as (figure, axes):
        axes.margins(0.08, 0.12)
        drawn = []
        for label, group, look in groups:
            if group:
                x = [row["entropy"] for row in group]
                y = [row[features]["mean"] for row in group]
                errors = [number(row[features].get("sd")) or 0.0 for row in group]
                look = {"linestyle": "none", "markersize": 7} | look
                drawn.append((_marked(axes, x, y, errors, **look), label))
        for row in base:
            if (temperature := number(row.get("temperature"))) is not None:
                top = row[features]["mean"] + (number(row[features].get("sd")) or 0.0)
                look = {"ha": "center", "color": PALETTE[1], "fontsize": 9.5}
                text, at = f"T={temperature:.3g}", (row["entropy"], top)
                axes.annotate(text, at, (0, 5), textcoords="offset points", **look)
        axes.legend(*zip(*drawn, strict=True))
    return figure


# --- embeddings -----------------------------------------------------------------------------------


def plane(drawn: Plane) -> Figure:
    """Sets of points in a plane, with the regions that hold most of each; both axes at one scale."""
    width, height = LARGE[0], 1.1 * LARGE[0]
    with chart(drawn.title, drawn.x_label, drawn.y_label, (width, height)) as (figure, axes):
        x0, x1, y0, y1 = drawn.limits
        axes.set(xlim=(x0, x1), ylim=(y0, y1))
        looks: list[dict[str, Any]] = [
            {"color": PALETTE[color], "marker": marker, "linestyle": "none"}
            for color, marker, _ in _LOOKS
        ]
        solid = not any(cloud.regions for cloud in drawn.clouds)
        for turn in range(_TURNS):  # the sets take turns, so that none hides another
            for place in range(len(drawn.clouds)):
                index = (turn + place) % len(drawn.clouds)
                some = drawn.clouds[index].points[turn::_TURNS]
                size = 4 if solid else 2.5
                axes.plot(*some.T, markersize=size, alpha=0.75 if solid else 0.45, **looks[index])
        handles: list[Any] = []
        for cloud, look, (_, _, outline) in zip(drawn.clouds, looks, _LOOKS, strict=False):
            shown: dict[str, Any] = {
                "edgecolor": look["color"],
                "facecolor": to_rgba(look["color"], 0.25 if outline == "filled" else 0),
                "linestyle": "--" if outline == "dashed" else "-",
                "linewidth": 1.6,
            }
            for lines in cloud.regions:
                # Outlines of holes run the other way round, so these stay empty.
                path = Path.make_compound_path(*(Path(line, closed=True) for line in lines))
                axes.add_patch(PathPatch(path, zorder=1.5, **shown))
            mark = Line2D([], [], **look)
            handles.append((Patch(**shown), mark) if cloud.regions else mark)
        labels = [cloud.label for cloud in drawn.clouds]
        axes.legend(handles, labels, ncols=len(handles), loc="lower left", bbox_to_anchor=(0, 1))
        figure.supxlabel(textwrap.fill(drawn.note, 78), x=0.02, ha="left", fontsize=9, color=_MUTED)
        figure.draw_without_rendering()
        room = axes.get_window_extent()  # that the words leave, to be filled at one scale
        unit = max((x1 - x0) / room.width, (y1 - y0) / room.height) / 2
        wide, high = unit * room.width, unit * room.height
        x, y = (x0 + x1) / 2, (y0 + y1) / 2
        axes.set(xlim=(x - wide, x + wide), ylim=(y - high, y + high), aspect="equal")
    return figure
