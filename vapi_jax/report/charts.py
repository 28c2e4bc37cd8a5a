"""The charts of a run's report: learning curves, samples in training, entropy sweeps, embeddings."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from vapi_jax.evaluation.embeddings import Plane
from vapi_jax.evaluation.in_training import SAMPLED
from vapi_jax.report import svg
from vapi_jax.report import verdict as words
from vapi_jax.report.svg import Series, chart, smooth
from vapi_jax.report.verdict import number

# Metric name -> (title, axis label); the first of those present gets the large place, the next four the
# small ones, everything else goes under "More curves".
CURVES = {
    "vapi": {
        "reward": ("Reward", "reward, −(MSE + LPIPS)"),
        # On a scale of its own: held-out images are harder, and their curve is without sampling noise.
        "held_out/reward": ("Reward, held-out", "reward, −(MSE + LPIPS)"),
        "ce": ("Cross-entropy", "nats per token"),
        "entropy": ("Policy entropy", "nats per token"),
        "grad_norm": ("Gradient norm", "L2 norm, unclipped"),
    },
    "tokenizer": {
        "loss": ("Loss", "loss"),
        "mse": ("Reconstruction error", "MSE, images in [−1, 1]"),
        "lpips": ("Perceptual error", "LPIPS"),
        "codebook_usage": ("Codebook usage", "share of codes"),
        "grad_norm": ("Gradient norm", "L2 norm, unclipped"),
    },
    "base": {
        "ce": ("Cross-entropy", "nats per token"),
        "entropy": ("Entropy", "nats per token"),
        "grad_norm": ("Gradient norm", "L2 norm, unclipped"),
        "learning_rate": ("Learning rate", "learning rate"),
    },
}
# Of free-running samples in training, which have a section of their own: the same form.
SAMPLED_CURVES = {
    "sampled/kernel_distance": (
        "Kernel distance of samples to real crops",
        "MMD² ± standard error",
    ),
    "sampled/frechet": ("Fréchet distance of samples to real crops", "Fréchet distance"),
    "sampled/entropy": ("Entropy of samples", "nats per token"),
}
HELD_OUT = re.compile(r"(?:val|valid|validation|eval|held_?out)[/_](.+)")


def _points(history: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    pairs = [(number(row.get("step")), number(row.get(key))) for row in history]
    kept = [(x, y) for x, y in pairs if x is not None and y is not None]
    return [x for x, _ in kept], [y for _, y in kept]


def _curve(history: Sequence[Mapping[str, Any]], key: str) -> list[Series]:
    """Raw points under a smoothed line, and held-out values where the history has them."""
    series = []
    x, y = _points(history, key)
    if HELD_OUT.fullmatch(key):
        series.append(Series("held-out", x, y, "marked", 1, shape="square"))
    elif len(x) >= 15:
        window = max(5, len(x) // 7) | 1
        series.append(Series("single steps", x, y, "raw", 0))
        series.append(Series("smoothed", x, smooth(y, window), "line", 0))
    elif x:
        series.append(Series("training", x, y, "marked" if len(x) > 1 else "point", 0))
    for other in sorted({k for row in history for k in row}):
        match = HELD_OUT.fullmatch(other)
        if match and match[1] == key:
            series.append(Series("held-out", *_points(history, other), "marked", 1, shape="square"))
    return [one for one in series if one.x]


def curves(history: Sequence[Mapping[str, Any]], task: str) -> str:
    """Every metric against the step: a task's main ones in view, the others folded away."""
    known = CURVES.get(task, {})
    names = {k for row in history for k, v in row.items() if number(v) is not None}
    names = {m[1] if (m := HELD_OUT.fullmatch(k)) else k for k in names} - {"step", "time"}
    names = {name for name in names if not name.startswith(SAMPLED)}
    names |= {k for row in history for k in row if k in known}
    main = [k for k in known if k in names] or sorted(names)[:5]
    explained: set[str] = set()

    def draw(key: str, large: bool) -> str:
        series = _curve(history, key)
        title, y_label = known.get(key, (key, key))
        labels = {one.label for one in series}
        new = not labels <= explained
        explained.update(labels)
        size = (
            {"width": 520, "height": 386, "css": "large"}
            if large
            else {"width": 280, "height": 196}
        )
        return chart(series, title=title, x_label="step", y_label=y_label, legend=new, **size)

    figures = [draw(key, i == 0) for i, key in enumerate(main)]
    more = [draw(key, False) for key in sorted(names - set(main))]
    body = f'<div class="curves">{"".join(figures)}</div>' if figures else ""
    if more:
        body += (
            f"<details><summary>More curves ({len(more)})</summary>"
            f'<div class="curves more">{"".join(more)}</div></details>'
        )
    return body


def sweep(summary: Mapping[str, Any], features: str) -> str:
    """Fréchet distance against sampling entropy: the base's temperatures as a line, the rest as points."""
    rows = []
    for row in summary.get("table") or []:
        mean = number((row.get(features) or {}).get("mean"))
        if number(row.get("entropy")) is not None and mean is not None:
            rows.append(row)
    base = [row for row in rows if row.get("kind") in ("base", "temperature", "matched")]
    base.sort(key=lambda row: row["entropy"])
    if not base or len(rows) < 2:
        return ""

    def series(label: str, chosen: Sequence[Mapping[str, Any]], style: str, **rest: Any) -> Series:
        return Series(
            label,
            [row["entropy"] for row in chosen],
            [row[features]["mean"] for row in chosen],
            style,
            errors=[number(row[features].get("sd")) or 0.0 for row in chosen],
            **rest,
        )

    temperatures = [number(row.get("temperature")) for row in base]
    notes = ["" if t is None else f"T={t:.3g}" for t in temperatures]
    drawn = [series("base, by temperature", base, "marked", color=1, notes=notes)]
    matched = [row for row in base if row.get("kind") == "matched"]
    drawn.append(series("base at equal entropy", matched, "point", color=1, shape="ring"))
    for i, row in enumerate(r for r in rows if r.get("kind") == "control"):
        name, shape = str(row.get("name", "control")), ("triangle", "square")[i % 2]
        drawn.append(series(name, [row], "point", color=2 + i % 2, shape=shape))
    after = [row for row in rows if row.get("kind") == "vapi"]
    drawn.append(series("post-trained", after, "point", color=0, shape="diamond"))
    name = words.feature_name(summary, features)
    return chart(
        drawn,
        title=f"Fréchet distance against entropy, {name}",
        x_label="sampling entropy (nats per token)",
        y_label="Fréchet distance (lower is better)",
        width=520,
        height=360,
        x_pad=0.07,
    )


def sampled(history: Sequence[Mapping[str, Any]]) -> str:
    """What free-running samples were like while the run trained."""
    figures = []
    for key, (title, y_label) in SAMPLED_CURVES.items():
        x, y = _points(history, key)
        errors = _points(
            [row for row in history if number(row.get(key)) is not None], f"{key}_error"
        )
        known = errors[1] if errors[0] == x else None
        if x:
            series = Series("", x, y, "marked", 0, errors=known)
            figures.append(
                chart([series], title=title, x_label="step", y_label=y_label, width=520, height=300)
            )
    return f'<div class="sweeps">{"".join(figures)}</div>' if figures else ""


def planes(drawn: Sequence[Plane]) -> str:
    """Embeddings in the plane."""
    figures = "".join(svg.plane(plane) for plane in drawn)
    return f'<div class="sweeps">{figures}</div>' if figures else ""
