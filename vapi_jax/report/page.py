"""A run as one self-contained HTML page: verdict, numbers, curves, images, table, settings.

No scripts, no outside files, no plotting library: images are PNG data URIs, curves inline SVG. A section
appears when its data exist, so post-training, tokenizer and base training share this page. All text is
escaped.
"""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vapi_jax.common.progress import format_duration
from vapi_jax.evaluation.embeddings import Plane
from vapi_jax.report import charts as charts
from vapi_jax.report import verdict as words
from vapi_jax.report.verdict import number, show, show_distance

TITLES = {
    "vapi": "VA-π post-training",
    "tokenizer": "Tokenizer training",
    "base": "Base generator training",
}
FILES = {
    "metrics.jsonl": "every metric of every step, one JSON object per line",
    "summary.json": "the numbers of this page, for programs",
    "parameters.txt": "every trained array: shape, size, layout on the devices",
    "tensorboard": "the same curves: tensorboard --logdir",
    "checkpoints": "state to resume from, with digests",
    "samples": "generated images",
    "overview.png": "real crops and samples of both policies, class by class",
}
MAX_IMAGES = 48


def _e(value: Any) -> str:
    return html.escape(str(value))


def _data_uri(image: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _img(image: np.ndarray, alt: str) -> str:
    # Whole multiples of the pixel grid, or nearest-neighbour scaling makes pixels of unequal size.
    width = image.shape[1] * max(1, round(96 / image.shape[1]))
    return f'<img src="{_data_uri(image)}" alt="{_e(alt)}" width="{width}" loading="lazy">'


def _section(title: str, body: str, note: str = "") -> str:
    intro = f'<p class="note">{note}</p>' if note else ""
    return f"<section><h2>{_e(title)}</h2>{intro}{body}</section>" if body else ""


def _tiles(summary: Mapping[str, Any]) -> str:
    """The key numbers, each with where it started."""
    tiles: list[tuple[str, str, str]] = []
    for key, name in (
        ("reward", "Reward, held-out"),
        ("ce", "Cross-entropy, held-out"),
        ("free_running_entropy", "Sampling entropy, free-running"),
    ):
        block = summary.get(key) or {}
        if number(block.get("last")) is not None:
            unit = "" if key == "reward" else " nats per token"
            tiles.append((name, show(block["last"]), f"from {show(block.get('first'))}{unit}"))
    for features in ("frechet", "frechet_unseen"):
        d = words.distances(summary, features)
        if number((d["after"] or {}).get("mean")) is not None:
            name = f"Fréchet, {words.feature_name(summary, features)}"
            floor = f"; floor {show_distance(d['floor'])}" if d["floor"] else ""
            tiles.append(
                (name, show_distance(d["after"]), f"from {show_distance(d['before'])}{floor}")
            )
    seconds = summary.get("seconds") or {}
    if number(seconds.get("total")) is not None:
        train = number(seconds.get("train"))
        detail = f"of which training {format_duration(train)}" if train is not None else ""
        tiles.append(("Time", format_duration(seconds["total"]), detail))
    items = "".join(
        f"<div class=tile><dt>{_e(n)}</dt><dd>{_e(v)}<small>{_e(d)}</small></dd></div>"
        for n, v, d in tiles
    )
    return f'<dl class="tiles">{items}</dl>' if items else ""


def _table(summary: Mapping[str, Any]) -> str:
    rows = summary.get("table") or []
    if not rows:
        return ""
    heads = ["", "T", "Reward", "CE", "Entropy"]
    both = [f for f in ("frechet", "frechet_unseen") if any(row.get(f) for row in rows)]
    heads += [f"Fréchet, {words.feature_name(summary, f)}" for f in both] + ["seeds"]
    body = []
    for row in rows:
        kind = str(row.get("kind", ""))
        chip = ' <span class="chip">same entropy</span>' if kind == "matched" else ""
        temperature = number(row.get("temperature"))
        cells = ["–" if temperature is None else f"{temperature:.3g}"]
        cells += [show(row.get(k)) for k in ("reward", "ce", "entropy")]
        cells += [show_distance(row.get(f)) for f in both]
        cells.append(show((row.get("frechet") or {}).get("n"), 1))
        tds = "".join(f"<td>{_e(cell)}</td>" for cell in cells)
        css = re.sub(r"[^a-z]", "", kind)
        body.append(
            f'<tr class="{css}"><th scope="row">{_e(row.get("name", kind))}{chip}</th>{tds}</tr>'
        )
    head = "".join(f'<th scope="col">{_e(text)}</th>' for text in heads)
    return (
        f'<div class="scroll"><table class="results"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _cards(columns: Mapping[str, np.ndarray], names: Sequence[str]) -> str:
    """Images beside one another, head -> images; those of one name (in a row) in one card."""
    cards: list[tuple[str, list[str]]] = []
    for i, images in enumerate(zip(*columns.values(), strict=False)):
        name = names[i] if i < len(names) else ""
        if not cards or cards[-1][0] != name or not name:
            cards.append((name, []))
        beside = zip(images, columns, strict=True)
        cards[-1][1].extend(_img(image, f"{name} {head}".strip()) for image, head in beside)
    titles = "".join(f"<span>{_e(head)}</span>" for head in columns)
    css = "pair" if len(columns) == 2 else "pair three"
    return (
        '<div class="cards">'
        + "".join(
            f'<figure class="card"><figcaption>{_e(name)}</figcaption>'
            f'<div class="{css} heads">{titles}</div><div class="{css}">{"".join(images)}</div></figure>'
            for name, images in cards
        )
        + "</div>"
    )


def _of_samples(name: str) -> bool:
    return name.startswith("samples") or name == "real_of_classes"


def _images(images: Mapping[str, np.ndarray], summary: Mapping[str, Any]) -> str:
    left = {name: np.asarray(value) for name, value in images.items() if len(value)}
    for name, value in left.items():
        if value.dtype != np.uint8 or value.ndim != 4 or value.shape[-1] != 3:
            raise ValueError(
                f"images {name!r}: want uint8 [N, H, W, 3], got {value.dtype} {value.shape}"
            )
    names = [str(name) for name in summary.get("sample_classes") or []]
    out = ""
    if "samples_before" in left and "samples_after" in left:
        columns = {"before": left.pop("samples_before"), "after": left.pop("samples_after")}
        note = (
            "Free-running samples at temperature 1; each pair has the same class and the same seed."
        )
        if len(left.get("real_of_classes", ())) == len(columns["before"]):
            columns = {"real": left.pop("real_of_classes"), **columns}
            note += " Beside them real crops of the class."
        columns = {head: value[:MAX_IMAGES] for head, value in columns.items()}
        out += _section("Before and after", _cards(columns, names), note)
    if "real" in left and "reconstructions" in left:
        columns = {"real": left.pop("real"), "reconstructed": left.pop("reconstructions")}
        columns = {head: value[: MAX_IMAGES // 2] for head, value in columns.items()}
        note = "What the tokenizer keeps of real images: no generator on top of it can look better."
        out += _section("Reconstructions", _cards(columns, []), note)
    for name, value in left.items():
        title = name.replace("_", " ").capitalize()
        labels = names if name.startswith("samples") and len(names) == len(value) else []
        tiles = "".join(
            f'<figure class="single">{_img(image, labels[i] if labels else f"{title} {i + 1}")}'
            + (f"<figcaption>{_e(labels[i])}</figcaption>" if labels else "")
            + "</figure>"
            for i, image in enumerate(value[:MAX_IMAGES])
        )
        out += _section(title, f'<div class="cards">{tiles}</div>')
    return out


def _flatten(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    if isinstance(value, Mapping):
        pairs = [_flatten(v, f"{prefix}.{k}" if prefix else str(k)) for k, v in value.items()]
        return [pair for inner in pairs for pair in inner]
    if isinstance(value, float):
        return [(prefix, f"{value:g}")]
    return [(prefix, str(value))]


def _pairs(title: str, value: Any) -> str:
    rows = _flatten(value) if value else []
    body = "".join(f"<tr><th scope=row>{_e(k)}</th><td>{_e(v)}</td></tr>" for k, v in rows)
    return f"<div><h3>{_e(title)}</h3><table class=pairs>{body}</table></div>" if body else ""


def _seconds(seconds: Mapping[str, Any]) -> str:
    known = {k: s for k, v in seconds.items() if (s := number(v)) is not None}
    longest = max(known.values(), default=0.0) or 1.0
    body = "".join(
        f"<tr><th scope=row>{_e(k)}</th><td>{_e(format_duration(s))}</td>"
        f'<td class=bar><i style="width:{100 * s / longest:.1f}%"></i></td></tr>'
        for k, s in known.items()
    )
    return f"<div><h3>Time</h3><table class=pairs>{body}</table></div>" if body else ""


def _settings(summary: Mapping[str, Any], workdir: Path) -> str:
    machine = {
        "devices": summary.get("devices") or {},
        "parameters": {
            k: f"{v:,}".replace(",", " ") if isinstance(v, int) else v
            for k, v in (summary.get("parameters") or {}).items()
        },
        "steps": summary.get("steps", "–"),
    }
    blocks = _pairs("Machine and model", machine) + _pairs("Versions", summary.get("versions"))
    blocks += _seconds(summary.get("seconds") or {})
    body = f'<div class="blocks">{blocks}</div>'
    config = _pairs("", summary.get("config")).replace("<h3></h3>", "")
    if config:
        body += (
            f'<details><summary>All settings</summary><div class="config">{config}</div></details>'
        )
    there = [(n, t) for n, t in FILES.items() if (workdir / n).exists()]
    if there:
        items = "".join(f"<li><code>{_e(n)}</code> {_e(t)}</li>" for n, t in there)
        body += f"<h3>Other files in <code>{_e(workdir)}</code></h3><ul class=files>{items}</ul>"
    return body


def _sampled_note(summary: Mapping[str, Any]) -> str:
    block = summary.get("sampled") or {}
    count, feature = number(block.get("samples")), block.get("feature")
    note = "Free-running samples of the same labels and seed every time, against real crops"
    note += f": {count:.0f} of each" if count is not None else ""
    note += f", features {_e(feature)}" if feature else ""
    return (
        f"{note}. Lower distances are better; one within its error of 0 cannot be told from real."
        " They compare only with one another."
    )


def render(
    workdir: Path,
    summary: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    images: Mapping[str, np.ndarray],
    planes: Sequence[Plane] = (),
) -> str:
    """The page as a string; arguments as in `write_report`."""
    task = str(summary.get("task", ""))
    said = words.vapi_verdict(summary) if task == "vapi" else words.plain_verdict(summary, history)
    title = TITLES.get(task, "Training run")
    name = str(summary.get("name", ""))
    steps = number(summary.get("steps"))
    subtitle = " · ".join(
        part for part in (name, f"{steps:.0f} steps" if steps is not None else "") if part
    )
    paragraph = f"<p>{_e(' '.join(said.sentences))}</p>" if said.sentences else ""
    sweeps = "".join(charts.sweep(summary, f) for f in ("frechet", "frechet_unseen"))
    css = resources.files("vapi_jax").joinpath("assets/report.css").read_text(encoding="utf-8")
    sections = [
        _images({k: v for k, v in images.items() if _of_samples(k)}, summary),
        _section(
            "Results",
            _table(summary) + (f'<div class="sweeps">{sweeps}</div>' if sweeps else ""),
            "Fréchet distances are mean ± standard deviation over sampling seeds, lower is better;"
            " reward and cross-entropy are on held-out images. These distances are not FID and compare"
            " only with one another. A gain that a lower temperature of the base reaches as well is"
            " mere sharpening: compare with the row of the same entropy. In the plots sharper"
            " distributions are to the left."
            if summary.get("table")
            else "",
        ),
        _section(
            "Fidelity",
            charts.planes(planes),
            "Features of real crops and of free-running samples at temperature 1, as Fig. 1 of the"
            " paper shows them. These pictures illustrate; the table's distances measure.",
        ),
        _section("Learning curves", charts.curves(history, task)),
        _section(
            "Samples in training",
            charts.sampled(history),
            _sampled_note(summary),
        ),
        _images({k: v for k, v in images.items() if not _of_samples(k)}, summary),
        _section("Settings", _settings(summary, workdir)),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{_e(f'{title}: {name}' if name else title)}</title><style>{css}</style></head><body>"
        f'<main><header><h1>{_e(title)}</h1><p class="subtitle">{_e(subtitle)}</p></header>'
        f'<section class="verdict {said.tone}"><h2>{_e(said.headline)}</h2>{paragraph}</section>'
        f"{_tiles(summary)}{''.join(sections)}</main></body></html>\n"
    )


def write_report(
    workdir: str | Path,
    summary: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    images: Mapping[str, np.ndarray],
    planes: Sequence[Plane] = (),
) -> Path:
    """Writes `workdir/report.html`.

    Args:
      workdir: folder of the run; files of the run found there are listed on the page.
      summary: what summary.json holds; absent parts are left out of the page.
      history: rows of metrics.jsonl in order of "step". A key such as "val/ce" is drawn as the held-out
        curve of "ce".
      images: name -> uint8 [N, H, W, 3]. "samples_before" and "samples_after" are shown as pairs (names
        from summary["sample_classes"]), "real" and "reconstructions" likewise, others as plain grids.
        "real_of_classes" joins the samples where it has as many.
      planes: embeddings to draw, see `vapi_jax.evaluation.embeddings`.

    Returns:
      The path of the page.

    Raises:
      ValueError: images of another dtype or shape.
    """
    workdir = Path(workdir)
    text = render(workdir, summary, history, images, planes)
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / "report.html"
    path.write_text(text, encoding="utf-8")
    return path
