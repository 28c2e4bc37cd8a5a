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
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vapi_jax import verdict as words
from vapi_jax.metrics import format_duration
from vapi_jax.svg import Series, chart, smooth
from vapi_jax.verdict import number, show, show_distance

TITLES = {
    "vapi": "VA-π post-training",
    "tokenizer": "Tokenizer training",
    "base": "Base generator training",
}
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
HELD_OUT = re.compile(r"(?:val|valid|validation|eval|held_?out)[/_](.+)")
FILES = {
    "metrics.jsonl": "every metric of every step, one JSON object per line",
    "summary.json": "the numbers of this page, for programs",
    "parameters.txt": "every trained array: shape, size, layout on the devices",
    "tensorboard": "the same curves: tensorboard --logdir",
    "checkpoints": "state to resume from, with digests",
    "samples": "generated images",
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


def _curves(history: Sequence[Mapping[str, Any]], task: str) -> str:
    known = CURVES.get(task, {})
    names = {k for row in history for k, v in row.items() if number(v) is not None}
    names = {m[1] if (m := HELD_OUT.fullmatch(k)) else k for k in names} - {"step", "time"}
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


def _sweep(summary: Mapping[str, Any], features: str) -> str:
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


def _cards(pairs: Iterable[tuple[np.ndarray, np.ndarray]], names: Sequence[str], heads: str) -> str:
    """Pairs of images, those of one name (in a row) in one card with two columns."""
    cards: list[tuple[str, list[str]]] = []
    for i, (a, b) in enumerate(pairs):
        name = names[i] if i < len(names) else ""
        if not cards or cards[-1][0] != name or not name:
            cards.append((name, []))
        left, right = (f"{name} {head}".strip() for head in heads.split("|"))
        cards[-1][1].append(_img(a, left) + _img(b, right))
    titles = "".join(f"<span>{_e(head)}</span>" for head in heads.split("|"))
    return (
        '<div class="cards">'
        + "".join(
            f'<figure class="card"><figcaption>{_e(name)}</figcaption>'
            f'<div class="pair heads">{titles}</div><div class="pair">{"".join(images)}</div></figure>'
            for name, images in cards
        )
        + "</div>"
    )


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
        before, after = left.pop("samples_before"), left.pop("samples_after")
        pairs = zip(before[:MAX_IMAGES], after[:MAX_IMAGES], strict=False)
        note = (
            "Free-running samples at temperature 1; each pair has the same class and the same seed."
        )
        out += _section("Before and after", _cards(pairs, names, "before|after"), note)
    if "real" in left and "reconstructions" in left:
        real, again = left.pop("real"), left.pop("reconstructions")
        pairs = zip(real[: MAX_IMAGES // 2], again[: MAX_IMAGES // 2], strict=False)
        note = "What the tokenizer keeps of real images: no generator on top of it can look better."
        out += _section("Reconstructions", _cards(pairs, [], "real|reconstructed"), note)
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


def render(
    workdir: Path,
    summary: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    images: Mapping[str, np.ndarray],
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
    sweeps = "".join(_sweep(summary, f) for f in ("frechet", "frechet_unseen"))
    css = resources.files("vapi_jax").joinpath("assets/report.css").read_text(encoding="utf-8")
    sections = [
        _images({k: v for k, v in images.items() if k.startswith("samples")}, summary),
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
        _section("Learning curves", _curves(history, task)),
        _images({k: v for k, v in images.items() if not k.startswith("samples")}, summary),
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
) -> Path:
    """Writes `workdir/report.html`.

    Args:
      workdir: folder of the run; files of the run found there are listed on the page.
      summary: what summary.json holds; absent parts are left out of the page.
      history: rows of metrics.jsonl in order of "step". A key such as "val/ce" is drawn as the held-out
        curve of "ce".
      images: name -> uint8 [N, H, W, 3]. "samples_before" and "samples_after" are shown as pairs (names
        from summary["sample_classes"]), "real" and "reconstructions" likewise, others as plain grids.

    Returns:
      The path of the page.

    Raises:
      ValueError: images of another dtype or shape.
    """
    workdir = Path(workdir)
    text = render(workdir, summary, history, images)
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / "report.html"
    path.write_text(text, encoding="utf-8")
    return path
