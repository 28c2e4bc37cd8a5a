"""A run as one self-contained HTML page: verdict, numbers, curves, images, table, settings.

No scripts and no outside files: images are PNG data URIs, charts inline SVG. A section appears when its
data exist, so all methods share this page; what a method calls itself and which curves matter to it the
summary says. templates/ has the words and the layout, and escapes all text.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure
from PIL import Image

from vapi_jax.common.files import write_atomically
from vapi_jax.common.images import enlargement
from vapi_jax.common.progress import format_duration
from vapi_jax.evaluation.held_out import HELD_OUT
from vapi_jax.evaluation.in_training import SAMPLED
from vapi_jax.report import figures
from vapi_jax.report import verdict as words
from vapi_jax.report.verdict import number, show, show_distance

FILES = {
    "metrics.jsonl": "every metric of every step, one JSON object per line",
    "summary.json": "the numbers of this page, for programs",
    "parameters.txt": "every trained array: shape, size, layout on the devices",
    "tensorboard": "the same curves: tensorboard --logdir",
    "checkpoints": "state to resume from, with digests",
    "samples": "generated images",
    "overview.png": "real crops and samples of both policies, class by class",
}
SAMPLED_CURVES = {
    "kernel_distance": ("Kernel distance of samples to real crops", "MMD² ± standard error"),
    "frechet": ("Fréchet distance of samples to real crops", "Fréchet distance"),
    "entropy": ("Entropy of samples", "nats per token"),
}
MAX_IMAGES = 48
MAIN_CURVES = 5  # in view where a method names none

_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def write_report(
    workdir: str | Path,
    summary: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    images: Mapping[str, np.ndarray],
    planes: Sequence[Figure] = (),
) -> Path:
    """Writes `workdir/report.html`.

    Args:
      workdir: folder of the run; files of the run found there are listed on the page.
      summary: what summary.json holds; absent parts are left out of the page. Of its "method",
        {"name", "title", "curves": [[metric, title, axis label], ...]}, the title heads the page and
        the curves are in view, the first of them large; others are folded away.
      history: rows of metrics.jsonl in order of "step". A key such as "held_out/ce" is drawn as the
        held-out curve of "ce".
      images: name -> uint8 [N, H, W, 3]. "samples_before" and "samples_after" are shown as pairs (names
        from summary["sample_classes"]), "real" and "reconstructions" likewise, others as plain grids.
        "real_of_classes" joins the samples where it has as many.
      planes: embeddings, drawn by `vapi_jax.report.figures.plane`.

    Returns:
      The path of the page.

    Raises:
      ValueError: images of another dtype or shape.
    """
    workdir = Path(workdir)
    method = summary.get("method") or {}
    title = str(method.get("title") or "training run")
    name, steps = str(summary.get("name", "")), number(summary.get("steps"))
    subtitle = [name, "" if steps is None else f"{steps:.0f} steps"]
    samples, pictures = _galleries(images, summary)
    sweeps = (figures.sweep(summary, features) for features in ("frechet", "frechet_unseen"))
    text = _TEMPLATES.get_template("report.html").render(
        title=title[:1].upper() + title[1:],
        name=name,
        subtitle=" · ".join(part for part in subtitle if part),
        verdict=words.verdict(summary, history),
        tiles=list(_tiles(summary)),
        samples=samples,
        table=_table(summary),
        scores=_scores(summary),
        sweeps=[figures.inline_svg(figure) for figure in sweeps if figure],
        planes=[figures.inline_svg(figure) for figure in planes],
        curves=_curves(history, method.get("curves") or ()),
        sampled=_sampled(history),
        sampled_note=_sampled_note(summary),
        pictures=pictures,
        **_settings(summary, workdir),
    )
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / "report.html"
    write_atomically(path, text.lstrip())
    return path


# --- numbers --------------------------------------------------------------------------------------


def _tiles(summary: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """The key numbers, each as (name, value, where it started)."""
    for key, name in (
        ("reward", "Reward, held-out"),
        ("ce", "Cross-entropy, held-out"),
        ("free_running_entropy", "Sampling entropy, free-running"),
    ):
        block = summary.get(key) or {}
        if number(block.get("last")) is not None:
            unit = "" if key == "reward" else " nats per token"
            yield name, show(block["last"]), f"from {show(block.get('first'))}{unit}"
    for features in ("frechet", "frechet_unseen"):
        found = words.distances(summary, features)
        if number((found["after"] or {}).get("mean")) is not None:
            name = f"Fréchet, {words.feature_name(summary, features)}"
            floor = f"; floor {show_distance(found['floor'])}" if found["floor"] else ""
            before = show_distance(found["before"])
            yield name, show_distance(found["after"]), f"from {before}{floor}"
    scenes = {k: v.get("overall") for k, v in (summary.get("scenes") or {}).items()}
    if scenes.get("vapi"):
        before, ceiling = (words.show_score(scenes.get(kind)) for kind in ("base", "floor"))
        value = words.show_score(scenes["vapi"])
        yield "Scene score, overall", value, f"from {before}; ceiling {ceiling}"
    seconds = summary.get("seconds") or {}
    if number(seconds.get("total")) is not None:
        train = number(seconds.get("train"))
        detail = f"of which training {format_duration(train)}" if train is not None else ""
        yield "Time", format_duration(seconds["total"]), detail


def _table(summary: Mapping[str, Any]) -> dict[str, Any]:
    rows = summary.get("table") or []
    both = [f for f in ("frechet", "frechet_unseen") if any(row.get(f) for row in rows)]
    names = [f"Fréchet, {words.feature_name(summary, features)}" for features in both]
    if any(row.get("kernel_unseen") for row in rows):
        both.append("kernel_unseen")
        names.append(f"Kernel, {words.feature_name(summary, 'frechet_unseen')}")
    shown = []
    for row in rows:
        temperature = number(row.get("temperature"))
        cells = ["–" if temperature is None else f"{temperature:.3g}"]
        cells += [show(row.get(key)) for key in ("reward", "ce", "entropy")]
        cells += [show_distance(row.get(features)) for features in both]
        cells.append(show((row.get("frechet") or {}).get("n"), 1))
        kind = str(row.get("kind", ""))
        shown.append({"kind": kind, "name": row.get("name", kind), "cells": cells})
    return {"heads": ["", "T", "Reward", "CE", "Entropy", *names, "seeds"], "rows": shown}


def _scores(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The six scene scores of every row, and last what changed."""
    rows = [row for row in summary.get("table") or [] if row.get("scenes")]
    tasks = list(rows[0]["scenes"]) if rows else []

    def shown(kind: str, name: str, scores: Mapping[str, Any]) -> dict[str, Any]:
        cells = [words.show_score(scores.get(task)) for task in tasks]
        return {"kind": kind, "name": name, "cells": cells}

    found = [shown(str(row.get("kind", "")), row["name"], row["scenes"]) for row in rows]
    changes = (summary.get("scenes") or {}).get("changes") or {}
    names = {"base": "change from the base", "matched": "from the base at equal entropy"}
    found += [shown("change", name, changes[k]) for k, name in names.items() if k in changes]
    return {"heads": ["", *(task.replace("_", " ") for task in tasks)], "rows": found}


# --- curves ---------------------------------------------------------------------------------------


def _curves(
    history: Sequence[Mapping[str, Any]], chosen: Sequence[Sequence[str]]
) -> dict[str, list[str]]:
    """Every metric against the step: a method's main ones in view, the others folded away."""
    known = {metric: (title, label) for metric, title, label in chosen}
    there = {key for row in history for key, value in row.items() if number(value) is not None}
    names = {key.removeprefix(HELD_OUT) for key in there} - {"step", "time"}
    names = {name for name in names if not name.startswith(SAMPLED)}
    main = [metric for metric in known if metric in there | names] or sorted(names)[:MAIN_CURVES]

    def draw(metric: str, size: tuple[float, float]) -> str:
        return figures.inline_svg(
            figures.curve(history, metric, *known.get(metric, (metric, "")), size)
        )

    sizes = [figures.LARGE, *[figures.SMALL] * len(main)]
    return {
        "main": [draw(metric, size) for metric, size in zip(main, sizes, strict=False)],
        "more": [draw(metric, figures.SMALL) for metric in sorted(names - set(main))],
    }


def _sampled(history: Sequence[Mapping[str, Any]]) -> list[str]:
    """What free-running samples were like while the run trained."""
    return [
        figures.inline_svg(figures.curve(history, SAMPLED + key, title, y_label))
        for key, (title, y_label) in SAMPLED_CURVES.items()
        if figures.points(history, SAMPLED + key)[0]
    ]


def _sampled_note(summary: Mapping[str, Any]) -> str:
    block = summary.get("sampled") or {}
    count, feature = number(block.get("samples")), block.get("feature")
    note = "Free-running samples of the same labels and seed every time, against real crops"
    note += f": {count:.0f} of each" if count is not None else ""
    note += f", features {feature}" if feature else ""
    return (
        f"{note}. Lower distances are better; one within its error of 0 cannot be told from real."
        " They compare only with one another."
    )


# --- images ---------------------------------------------------------------------------------------


def _galleries(
    images: Mapping[str, np.ndarray], summary: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Galleries of samples, and those of other images."""
    left = {name: np.asarray(value) for name, value in images.items() if len(value)}
    for name, value in left.items():
        if value.dtype != np.uint8 or value.ndim != 4 or value.shape[-1] != 3:
            raise ValueError(
                f"images {name!r}: want uint8 [N, H, W, 3], got {value.dtype} {value.shape}"
            )
    names = [str(name) for name in summary.get("sample_classes") or []]
    samples, others = [], []
    if "samples_before" in left and "samples_after" in left:
        columns = {"before": left.pop("samples_before"), "after": left.pop("samples_after")}
        note = (
            "Free-running samples at temperature 1; each pair has the same class or caption"
            " and the same seed."
        )
        if len(left.get("real_of_classes", ())) == len(columns["before"]):
            columns = {"real": left.pop("real_of_classes"), **columns}
            note += " Beside them real crops of the class."
        samples.append(_beside("Before and after", note, columns, names, MAX_IMAGES))
    if "real" in left and "reconstructions" in left:
        columns = {"real": left.pop("real"), "reconstructed": left.pop("reconstructions")}
        note = "What the tokenizer keeps of real images: no generator on top of it can look better."
        others.append(_beside("Reconstructions", note, columns, [], MAX_IMAGES // 2))
    for name, value in left.items():
        title = name.replace("_", " ").capitalize()
        of_samples = name.startswith("samples") or name == "real_of_classes"
        labels = names if of_samples and len(names) == len(value) else []
        shown = _beside(title, "", {"": value}, labels, MAX_IMAGES)
        (samples if of_samples else others).append(shown)
    return samples, others


def _beside(
    title: str, note: str, columns: Mapping[str, np.ndarray], names: Sequence[str], most: int
) -> dict[str, Any]:
    """A gallery: images beside one another, head -> images; those of one name (in a row) in one card."""
    heads = [head for head in columns if head]
    cards: list[dict[str, Any]] = []
    for index, images in enumerate(zip(*(c[:most] for c in columns.values()), strict=False)):
        name = names[index] if index < len(names) else ""
        if not (heads and name and cards and cards[-1]["name"] == name):
            cards.append({"name": name, "images": []})
        for head, image in zip(columns, images, strict=True):
            alt = f"{name} {head}".strip() or f"{title} {index + 1}"
            cards[-1]["images"].append(_image(image, alt))
    return {"title": title, "note": note, "heads": heads, "cards": cards}


def _image(image: np.ndarray, alt: str) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", optimize=True)
    uri = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    # Whole multiples of the pixel grid, or nearest-neighbour scaling makes pixels of unequal size.
    width = image.shape[1] * enlargement(max(image.shape[:2]))
    return {"uri": uri, "alt": alt, "width": width}


# --- settings -------------------------------------------------------------------------------------


def _flatten(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    if isinstance(value, Mapping):
        pairs = [_flatten(v, f"{prefix}.{k}" if prefix else str(k)) for k, v in value.items()]
        return [pair for inner in pairs for pair in inner]
    return [(prefix, f"{value:g}" if isinstance(value, float) else str(value))]


def _settings(summary: Mapping[str, Any], workdir: Path) -> dict[str, Any]:
    parameters = {
        k: f"{v:,}".replace(",", " ") if isinstance(v, int) else v
        for k, v in (summary.get("parameters") or {}).items()
    }
    machine = {"devices": summary.get("devices") or {}, "parameters": parameters}
    machine["precision"] = summary.get("precision") or {}
    seconds = {
        k: s for k, v in (summary.get("seconds") or {}).items() if (s := number(v)) is not None
    }
    longest = max(seconds.values(), default=0.0) or 1.0
    return {
        "machine": _flatten(machine | {"steps": summary.get("steps", "–")}),
        "versions": _flatten(summary.get("versions") or {}),
        "seconds": [
            (k, format_duration(s), f"{100 * s / longest:.1f}") for k, s in seconds.items()
        ],
        "config": _flatten(summary.get("config") or {}),
        "workdir": str(workdir),
        "files": [(name, text) for name, text in FILES.items() if (workdir / name).exists()],
    }
