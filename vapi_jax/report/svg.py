"""Small charts as inline SVG, styled by the page's CSS (colours follow light and dark).

Drawn by hand so that a report needs no plotting library at run time. Colours are CSS variables --c0 ...;
text takes `currentColor`. The legend is HTML, so it wraps on a narrow screen.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import numpy as np

if TYPE_CHECKING:
    from vapi_jax.evaluation.embeddings import Cloud, Plane

MAX_POINTS = 600


@dataclass(frozen=True)
class Series:
    """One set of points of a chart.

    Attributes:
      label: legend text; empty for no legend entry.
      x, y: finite numbers, the same count.
      style: "line", "raw" (faint dots under a line), "marked" (line with a marker at each point) or
        "point" (markers only).
      color: index of the CSS colour variable.
      errors: half lengths of vertical error bars.
      notes: a short text above each point.
      shape: "circle", "diamond", "square", "triangle" or "ring".
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    style: str = "line"
    color: int = 0
    errors: Sequence[float] | None = None
    notes: Sequence[str] | None = None
    shape: str = "circle"


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round values (1, 2 or 5 times a power of ten apart) inside [low, high]."""
    if not high > low:
        return [low]
    raw = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def tick_texts(ticks: Sequence[float]) -> list[str]:
    """Texts of ticks with just the decimals that tell them apart."""
    if len(ticks) < 2:
        return [f"{t:.3g}".replace("-", "−") for t in ticks]
    step = ticks[1] - ticks[0]
    largest = max(abs(t) for t in ticks)
    if largest >= 1e6 or step < 1e-5:
        return [f"{t:.2g}".replace("-", "−") for t in ticks]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return [f"{t + 0.0:.{decimals}f}".replace("-", "−") for t in ticks]


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Local straight-line fits over a centred window, twice.

    A moving average would lag at the ends of a rising curve, and one whose window shrinks there would
    end in the last value's noise. A straight line passes unchanged.
    """
    y = np.asarray(values, np.float64)
    x = np.arange(len(y), dtype=np.float64)
    low = np.maximum(np.arange(len(y)) - window // 2, 0)
    high = np.minimum(np.arange(len(y)) + window // 2 + 1, len(y))

    def over_window(terms: np.ndarray) -> np.ndarray:
        sums = np.concatenate([[0.0], np.cumsum(terms)])
        return (sums[high] - sums[low]) / (high - low)

    for _ in range(2):
        mean_x, mean_y = over_window(x), over_window(y)
        variance = over_window(x * x) - mean_x**2
        covariance = over_window(x * y) - mean_x * mean_y
        slope = np.divide(covariance, variance, out=np.zeros_like(y), where=variance > 1e-9)
        y = mean_y + slope * (x - mean_x)
    return y.tolist()


def _thin(series: Series) -> Series:
    """At most about MAX_POINTS points: a long run needs no megabytes of path."""
    stride = math.ceil(len(series.x) / MAX_POINTS)
    if stride <= 1 or series.errors is not None or series.notes is not None:
        return series
    keep = list(range(0, len(series.x), stride))
    if keep[-1] != len(series.x) - 1:
        keep.append(len(series.x) - 1)
    return Series(
        series.label,
        [series.x[i] for i in keep],
        [series.y[i] for i in keep],
        series.style,
        series.color,
        shape=series.shape,
    )


def _marker(shape: str, x: float, y: float, r: float, color: int) -> str:
    fill = f'style="fill:var(--c{color})"'
    if shape == "ring":
        stroke = f'style="stroke:var(--c{color})"'
        return f'<circle class="ring" cx="{x:.1f}" cy="{y:.1f}" r="{r + 3.5:.1f}" {stroke}/>'
    if shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r:.1f}" {fill}/>'
    points = {
        "diamond": [(0, -1.35), (1.35, 0), (0, 1.35), (-1.35, 0)],
        "square": [(-0.95, -0.95), (0.95, -0.95), (0.95, 0.95), (-0.95, 0.95)],
        "triangle": [(0, -1.2), (1.15, 0.85), (-1.15, 0.85)],
    }[shape]
    text = " ".join(f"{x + dx * r:.1f},{y + dy * r:.1f}" for dx, dy in points)
    return f'<polygon points="{text}" {fill}/>'


def _legend(series: Sequence[Series]) -> str:
    items = []
    for one in series:
        if not one.label:
            continue
        line = f'<path d="M0 7H22" style="stroke:var(--c{one.color})"/>'
        marker = _marker(one.shape, 11, 7, 2.2 if one.style == "raw" else 4, one.color)
        content = {"line": line, "raw": f'<g class="raw">{marker}</g>', "marked": line + marker}
        key = content.get(one.style, marker)
        items.append(
            f'<li><svg viewBox="0 0 22 14" width="22" height="14" aria-hidden="true">{key}</svg>'
            f"{html.escape(one.label)}</li>"
        )
    return _legend_list(items)


def _legend_list(items: Sequence[str]) -> str:
    return f'<ul class="legend">{"".join(items)}</ul>' if items else ""


def _limits(low: float, high: float, pad: float) -> tuple[float, float]:
    if high - low < 1e-9 * max(abs(low), abs(high), 1e-9):
        margin = 0.05 * abs(low) or 1.0
        return low - margin, high + margin
    return low - pad * (high - low), high + pad * (high - low)


@dataclass(frozen=True)
class Frame:
    """Where numbers lie in a drawing: its size, the limits of both axes, and their ticks.

    Attributes:
      width, height: of the drawing, in its own units.
      x0, x1, y0, y1: limits of the axes; x0 < x1 and y0 < y1.
    """

    width: int
    height: int
    x0: float
    x1: float
    y0: float
    y1: float

    right: ClassVar[float] = 14.0
    top: ClassVar[float] = 10.0
    bottom: ClassVar[float] = 46.0

    @property
    def small(self) -> bool:
        return self.width < 400

    @cached_property
    def x_ticks(self) -> list[float]:
        return nice_ticks(self.x0, self.x1, 4 if self.small else 6)

    @cached_property
    def y_ticks(self) -> list[float]:
        return nice_ticks(self.y0, self.y1, 4 if self.small else 5)

    @cached_property
    def left(self) -> float:
        longest = max(len(text) for text in tick_texts(self.y_ticks))
        # Wide charts shrink most on a phone, where the page enlarges their text: leave room for it.
        return (34 + 7.5 * longest) if self.small else (42 + 9 * longest)

    def px(self, x: float) -> float:
        inside = self.width - self.left - self.right
        return self.left + (x - self.x0) / (self.x1 - self.x0) * inside

    def py(self, y: float) -> float:
        inside = self.height - self.top - self.bottom
        return self.height - self.bottom - (y - self.y0) / (self.y1 - self.y0) * inside


def _axes(frame: Frame, title: str, x_label: str, y_label: str) -> list[str]:
    """The opening of a drawing: grid lines, ticks, axis and labels."""
    width, height, left = frame.width, frame.height, frame.left
    end, axis = width - frame.right, height - frame.bottom
    out = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(title)}">']
    for tick, text in zip(frame.y_ticks, tick_texts(frame.y_ticks), strict=True):
        y = frame.py(tick)
        out.append(f'<path class="grid" d="M{left:.1f} {y:.1f}H{end:.1f}"/>')
        out.append(
            f'<text class="tick" x="{left - 7:.1f}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'
        )
    for tick, text in zip(frame.x_ticks, tick_texts(frame.x_ticks), strict=True):
        x = frame.px(tick)
        out.append(f'<path class="axis" d="M{x:.1f} {axis:.1f}v5"/>')
        out.append(
            f'<text class="tick" x="{x:.1f}" y="{axis + 19:.1f}" text-anchor="middle">{text}</text>'
        )
    out.append(f'<path class="axis" d="M{left:.1f} {axis:.1f}H{end:.1f}"/>')
    middle_x, middle_y = (left + end) / 2, (frame.top + axis) / 2
    out.append(
        f'<text class="label" x="{middle_x:.1f}" y="{height - 7}" text-anchor="middle">'
        f"{html.escape(x_label)}</text>"
        f'<text class="label" text-anchor="middle" '
        f'transform="translate({14 if frame.small else 17} {middle_y:.1f}) rotate(-90)">'
        f"{html.escape(y_label)}</text>"
    )
    return out


def chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    width: int = 480,
    height: int = 320,
    x_pad: float = 0.02,
    css: str = "",
    legend: bool = True,
) -> str:
    """An HTML figure: title, SVG with axes, ticks and grid lines, legend.

    Args:
      series: drawn in order; empty ones are left out.
      title, x_label, y_label: text, escaped here; units belong to the labels.
      width, height: the SVG's own units; on the page it takes the width of its place.
      x_pad: free space left and right of the data, as a share of its range.
      css: extra class of the figure.
      legend: False where a neighbour's legend explains this chart, too.

    Raises:
      ValueError: no series has a point.
    """
    series = [_thin(one) for one in series if len(one.x)]
    if not series:
        raise ValueError(f"chart {title!r} has no points")
    xs = [x for one in series for x in one.x]
    spreads = [one.errors or [0.0] * len(one.y) for one in series]
    lows = [
        y - e
        for one, es in zip(series, spreads, strict=True)
        for y, e in zip(one.y, es, strict=True)
    ]
    highs = [
        y + e
        for one, es in zip(series, spreads, strict=True)
        for y, e in zip(one.y, es, strict=True)
    ]
    has_notes = any(one.notes for one in series)
    x0, x1 = _limits(min(xs), max(xs), x_pad)
    y0, y1 = _limits(min(lows), max(highs), 0.06)
    if has_notes:
        y1 += 0.08 * (y1 - y0)
    frame = Frame(width, height, x0, x1, y0, y1)
    px, py = frame.px, frame.py
    out = _axes(frame, title, x_label, y_label)
    for one, errors in zip(series, spreads, strict=True):
        points = [(px(x), py(y)) for x, y in zip(one.x, one.y, strict=True)]
        if one.style in ("line", "marked"):
            path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
            out.append(f'<path class="line" d="{path}" style="stroke:var(--c{one.color})"/>')
        if one.errors:
            for (x, _), y, e in zip(points, one.y, errors, strict=True):
                bar = f"M{x:.1f} {py(y - e):.1f}V{py(y + e):.1f}"
                caps = "".join(f"M{x - 3:.1f} {py(v):.1f}h6" for v in (y - e, y + e))
                out.append(
                    f'<path class="error" d="{bar}{caps}" style="stroke:var(--c{one.color})"/>'
                )
        if one.style != "line":
            radius = {"raw": 1.9, "marked": 3.4}.get(one.style, 5.0)
            marks = "".join(_marker(one.shape, x, y, radius, one.color) for x, y in points)
            out.append(f'<g class="{"raw" if one.style == "raw" else "marks"}">{marks}</g>')
    everything = [(px(x), py(y)) for one in series for x, y in zip(one.x, one.y, strict=True)]
    for one, errors in zip(series, spreads, strict=True):
        for x, y, e, note in zip(one.x, one.y, errors, one.notes or [], strict=False):
            above, below = py(y + e) - 8, py(y - e) + 16
            # Above the point, unless other markers sit there.
            near = [q for p, q in everything if abs(p - px(x)) < 24 and q != py(y)]
            place = min((above, below), key=lambda v: sum(abs(q - v + 4) < 14 for q in near))
            out.append(
                f'<text class="note" x="{px(x):.1f}" y="{place:.1f}" text-anchor="middle">'
                f"{html.escape(note)}</text>"
            )
    out.append("</svg>")
    return (
        f'<figure class="chart {css}"><figcaption>{html.escape(title)}</figcaption>'
        f"{''.join(out)}{_legend(series) if legend else ''}</figure>"
    )


_PLANE_WIDTH, _PLANE_UP = 520, (240.0, 400.0)


def plane_frame(plane: Plane) -> Frame:
    """A frame that shows all of a plane, both axes at one scale (but for the ticks' texts)."""
    x0, x1, y0, y1 = plane.limits
    rough = Frame(_PLANE_WIDTH, _PLANE_WIDTH, x0, x1, y0, y1)
    across, beside = _PLANE_WIDTH - rough.left - rough.right, rough.top + rough.bottom
    lowest, highest = _PLANE_UP
    up = min(max((y1 - y0) / (x1 - x0) * across, lowest), highest)
    unit = max((x1 - x0) / across, (y1 - y0) / up)
    x_more, y_more = (unit * across - (x1 - x0)) / 2, (unit * up - (y1 - y0)) / 2
    limits = (x0 - x_more, x1 + x_more, y0 - y_more, y1 + y_more)
    return Frame(_PLANE_WIDTH, round(up + beside), *limits)


def plane(drawn: Plane) -> str:
    """An HTML figure of sets of points in a plane, with the regions that hold most of each set."""
    frame = plane_frame(drawn)
    out = _axes(frame, drawn.title, drawn.x_label, drawn.y_label)

    def path(lines: Sequence[np.ndarray]) -> str:
        parts = (
            "L".join(f"{frame.px(x):.1f} {frame.py(y):.1f}" for x, y in line) for line in lines
        )
        return "".join(f"M{part}Z" for part in parts)

    for cloud in drawn.clouds:
        for lines in cloud.regions:
            out.append(
                f'<path class="region c{cloud.color} {cloud.css}" fill-rule="evenodd" '
                f'd="{path(lines)}"/>'
            )
    marks = (
        _marker(cloud.shape, frame.px(x), frame.py(y), drawn.radius, cloud.color)
        for cloud, (x, y) in drawn.marks()
    )
    faint = any(cloud.regions for cloud in drawn.clouds)
    out.append(f'<g class="{"faint" if faint else "cloud"}">{"".join(marks)}</g></svg>')
    return (
        f'<figure class="chart plane"><figcaption>{html.escape(drawn.title)}</figcaption>'
        f"{''.join(out)}{_legend_list([_cloud_key(cloud) for cloud in drawn.clouds])}"
        f'<p class="note">{html.escape(drawn.note)}</p></figure>'
    )


def _cloud_key(cloud: Cloud) -> str:
    region = (
        f'<path class="region c{cloud.color} {cloud.css}" d="M1 1H21V13H1Z"/>'
        if cloud.regions
        else ""
    )
    return (
        '<li><svg viewBox="0 0 22 14" width="22" height="14" aria-hidden="true">'
        f"{region}{_marker(cloud.shape, 11, 7, 4, cloud.color)}</svg>{html.escape(cloud.label)}</li>"
    )
