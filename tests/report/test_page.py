"""The report page is whole, self-contained, escaped, and says what the numbers say."""

import base64
import dataclasses
import io
import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from tests.helpers.toy_features import blobs
from vapi_jax.evaluation.embeddings import planes_of
from vapi_jax.report import svg, verdict
from vapi_jax.report.page import write_report

VOID = {"meta", "img", "br", "input", "link"}
SVG_VOID = {"path", "circle", "polygon"}


class Page(HTMLParser):
    """Checks that tags are balanced; collects headings, images, text and links to elsewhere."""

    def __init__(self, path):
        super().__init__()
        self.open, self.images, self.text, self.headings, self.outside = [], [], "", [], []
        self.tags = set()
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "srcset", "action", "data"):
                if value.startswith("data:image/png;base64,"):
                    self.images.append(value.split(",")[1])
                else:
                    self.outside.append(value)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        assert tag in SVG_VOID, f"<{tag}/> is not closed in HTML"

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "style":
            return
        self.text += data + " "
        if self.open and self.open[-1] in ("h1", "h2"):
            self.headings.append(data)

    def pixels(self):
        return [np.asarray(Image.open(io.BytesIO(base64.b64decode(i)))) for i in self.images]

    def svgs(self):
        return [
            ElementTree.fromstring(s) for s in re.findall(r"<svg.*?</svg>", self.source, re.DOTALL)
        ]


def d(mean, sd=1.5, n=3):
    return {"mean": mean, "sd": sd, "n": n}


def table_row(name, kind, temperature, entropy, seen, unseen):
    return {
        "name": name,
        "kind": kind,
        "temperature": temperature,
        "reward": None,
        "ce": 4.1,
        "entropy": entropy,
        "frechet": seen,
        "frechet_unseen": unseen,
    }


def make_summary(after=450.0, matched=453.0, unseen=88.0, last=-0.484):
    table = [
        table_row("base, T=1", "base", 1.0, 3.73, d(471.6), d(93.1)),
        table_row("base, T=0.95", "temperature", 0.95, 3.48, d(458.3), d(90.2)),
        table_row("base, T=0.916", "matched", 0.916, 3.33, d(matched), d(88.8)),
        table_row("VA-π", "vapi", 1.0, 3.34, d(after), d(unseen)),
        table_row("CE only", "control", 1.0, 3.71, d(472.3), d(93.3)),
        table_row("floor", "floor", None, None, d(257.2), d(40.3)),
    ]
    return {
        "task": "vapi",
        "name": "c2i_demo",
        "steps": 40,
        "config": {"vapi": {"group_size": 8}},
        "versions": {"jax": "0.10.2"},
        "devices": {"kind": "cpu", "count": 8, "mesh": {"data": 2, "fsdp": 4}},
        "seconds": {"total": 312.0, "train": 131.0},
        "parameters": {"policy": 2123456},
        "reward": {"first": -0.505, "last": last},
        "ce": {"first": 4.118, "last": 4.171},
        "entropy": {"first": 3.73, "last": 3.34},
        "frechet": {"feature": "VGG features", "before": d(471.6), "after": d(after)},
        "frechet_unseen": {"feature": "Alex features", "before": d(93.1), "after": d(unseen)},
        "table": table,
        "sample_classes": ["cat", "cat", "rocket"],
    }


def make_history(count=40):
    rng = np.random.default_rng(0)
    rows = []
    for step in range(1, count + 1):
        row = {"step": step, "time": 0.0, "reward": -0.5 + step / 2000 + rng.normal() / 200}
        row |= {"ce": 4.1, "entropy": 3.7 - step / 100, "grad_norm": 2.0, "reward_std": 0.1}
        row |= {"advantages_nonzero": 0.99, "clip_fraction": 0.0}
        if step % 10 == 0:
            row["val/reward"] = -0.5 + step / 2000
        rows.append(row)
    rows[1]["grad_norm"] = None
    rows[1]["non_finite"] = ["grad_norm"]
    return rows


def make_images(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)


def test_full_page(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    images = {
        "samples_before": make_images(3, 1),
        "samples_after": make_images(3, 2),
        "real": make_images(2, 3),
        "reconstructions": make_images(2, 4),
    }
    path = write_report(tmp_path, make_summary(), make_history(), images)
    assert path == tmp_path / "report.html"
    page = Page(path)
    assert page.headings[0] == "VA-π post-training"
    for heading in (
        "Before and after",
        "Results",
        "Learning curves",
        "Reconstructions",
        "Settings",
    ):
        assert heading in page.headings
    # Self-contained: no script, nothing from elsewhere, neither in HTML nor in CSS.
    assert not page.outside and "script" not in page.tags
    assert "url(" not in page.source and "@import" not in page.source
    # Every pixel arrives, pairs side by side.
    pixels = page.pixels()
    want = [images[k][i] for i in range(3) for k in ("samples_before", "samples_after")]
    want += [images[k][i] for i in range(2) for k in ("real", "reconstructions")]
    assert len(pixels) == len(want)
    assert all(np.array_equal(a, b) for a, b in zip(pixels, want, strict=True))
    # One card for both cats, one for the rocket.
    assert page.source.count("<figcaption>cat</figcaption>") == 1
    # The entropy-matched row is marked, numbers are there.
    assert re.search(r'<tr class="matched">.*?same entropy', page.source, re.DOTALL)
    assert "458.3\u00a0±\u00a01.5" in page.text and "metrics.jsonl" in page.text
    assert "summary.json" not in page.text
    assert "2 123 456" in page.text and "5 min 12 s" in page.text
    # Five curves, two sweeps, further metrics folded away; each SVG is XML and has a drawing.
    assert {"Reward", "Policy entropy", "Gradient norm", "reward_std"} <= {
        figure.strip() for figure in re.findall(r"<figcaption>([^<]*)", page.source)
    }
    charts = [s for s in page.svgs() if s.get("role") == "img"]
    assert len(charts) == 9
    assert not re.search(r"\b(nan|inf|None)\b", page.source.split("</style>")[1])


def test_all_text_is_escaped(tmp_path):
    evil = '<script>alert("x")</script>&'
    summary = make_summary()
    summary |= {"name": evil, "config": {evil: evil}, "versions": {evil: evil}}
    summary["devices"] = {evil: evil}
    summary["frechet"]["feature"] = summary["frechet_unseen"]["feature"] = evil
    summary["sample_classes"] = [evil, evil]
    summary["seconds"][evil] = 1.0
    for row in summary["table"]:
        row["name"] = evil
    history = [row | {evil: 1.0} for row in make_history()]
    images = {
        "samples_before": make_images(2),
        "samples_after": make_images(2),
        evil: make_images(1),
    }
    page = Page(write_report(tmp_path, summary, history, images))
    assert "script" not in page.tags and evil in page.text


def test_sections_appear_only_with_their_data(tmp_path):
    page = Page(write_report(tmp_path / "empty", {}, [], {}))
    assert page.headings == ["Training run", "The run is complete", "Settings"]
    history = [{"step": s, "loss": 2 - s / 100, "val/loss": 2.1} for s in range(1, 101)]
    summary = {"task": "tokenizer", "name": "demo_tokenizer"}
    images = {"real": make_images(2), "reconstructions": make_images(2)}
    page = Page(write_report(tmp_path, summary, history, images))
    assert page.headings == [
        "Tokenizer training",
        "The loss fell",
        "Learning curves",
        "Reconstructions",
        "Settings",
    ]
    assert "held-out" in page.text
    rising = [row | {"loss": -row["loss"] * -1 + row["step"]} for row in history]
    assert "The loss did not fall" in Page(write_report(tmp_path, summary, rising, {})).headings
    page = Page(write_report(tmp_path, {"task": "base"}, [], {"samples": make_images(3)}))
    assert "Samples" in page.headings and len(page.images) == 3


def test_non_finite_and_missing_numbers_become_dashes(tmp_path):
    summary = make_summary()
    summary["reward"] = {"first": math.nan, "last": math.inf}
    summary["table"][1]["frechet"] = None
    summary["table"][2]["entropy"] = math.nan
    summary["table"][3]["frechet"] = {"mean": math.nan, "sd": None, "n": 0}
    page = Page(write_report(tmp_path, summary, make_history(3), {}))
    assert not re.search(r"\b(nan|inf|None)\b", page.text)


def test_images_of_another_kind_are_refused(tmp_path):
    with pytest.raises(ValueError, match="uint8"):
        write_report(tmp_path, {}, [], {"real": np.zeros((1, 8, 8, 3), np.float32)})


@pytest.mark.parametrize(
    ("changes", "tone", "headline", "sentence"),
    [
        ({}, "mixed", "no better than lowering its temperature", "sharpening alone can explain"),
        ({"after": 440.0, "unseen": 86.0}, "good", "by more than sharpening", "better than mere"),
        ({"after": 462.0}, "mixed", "no better than lowering|lower temperature", "does more"),
        (
            {"after": 480.0, "unseen": 97.0},
            "bad",
            "worse.*although the reward rose",
            "rose from 471",
        ),
        ({"after": 472.0}, "mixed", "No change.*although the reward rose", "inside the noise"),
        ({"after": 440.0, "unseen": 99.0}, "mixed", "worse in features it never", "do not say the"),
        ({"after": 440.0, "last": -0.52}, "mixed", "and the reward fell", "fell from −0.5050"),
        ({"after": 480.0, "last": -0.505}, "bad", "and the reward stayed", "stayed at −0.5050"),
    ],
)
def test_verdict(changes, tone, headline, sentence):
    said = verdict.vapi_verdict(make_summary(**changes))
    assert said.tone == tone
    assert re.search(headline, said.headline), said.headline
    assert sentence in " ".join(said.sentences).replace("\u00a0", " "), said.sentences


def test_verdict_with_one_seed_claims_nothing():
    summary = make_summary(after=440.0)
    for row in summary["table"]:
        row["frechet"]["n"] = 1
    for block in ("frechet", "frechet_unseen"):
        summary[block]["before"]["n"] = summary[block]["after"]["n"] = 1
    said = verdict.vapi_verdict(summary)
    assert said.tone == "mixed" and "not conclusive" in said.headline
    text = " ".join(said.sentences)
    assert "no estimate of the noise" in text and "±" not in text


def test_verdict_without_samples():
    summary = {"reward": {"first": -0.5, "last": -0.4}}
    said = verdict.vapi_verdict(summary)
    assert said.headline == "Reward rose; samples were not evaluated" and len(said.sentences) == 1


def test_verdict_names_an_inexact_match():
    summary = make_summary()
    summary["table"][2]["entropy"] = 3.44
    text = " ".join(verdict.vapi_verdict(summary).sentences)
    assert "that control's entropy is 0.10 nats higher" in text


def test_compare_is_welchs_test():
    # n = 3 and 3, sd 2 and 2: four degrees of freedom, t = 2.78, standard error sqrt(8 / 3).
    got = verdict.compare(d(10.0, 2.0), d(15.0, 2.0))
    assert got.outcome == "better" and got.difference == -5.0
    assert got.margin == pytest.approx(2.78 * math.sqrt(8 / 3))
    assert verdict.compare(d(10.0, 2.0), d(14.0, 2.0)).outcome == "same"
    assert verdict.compare(d(15.0, 2.0), d(10.0, 2.0)).outcome == "worse"
    # All the noise on one side: its two degrees of freedom, t = 4.30.
    assert verdict.compare(d(10.0, 3.0), d(15.0, 0.0)).margin == pytest.approx(4.3 * math.sqrt(3))
    assert verdict.compare(d(10.0, None), d(15.0)).outcome == "unknown"
    assert verdict.compare(d(10.0), None).outcome == "absent"
    assert verdict.compare(d(10.0, 0.0), d(10.0, 0.0)).outcome == "same"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.50512, "0.5051"),
        (-471.63, "−471.6"),
        (0, "0"),
        (1e-6, "1.000e−06"),
        (12345.6, "12346"),
        (None, "–"),
        (math.nan, "–"),
        ("x", "–"),
    ],
)
def test_show(value, text):
    assert verdict.show(value) == text


def test_ticks_are_round_and_inside():
    assert svg.nice_ticks(-0.513, -0.472, 5) == pytest.approx([-0.51, -0.5, -0.49, -0.48])
    assert svg.tick_texts([-0.51, -0.5, -0.49]) == ["−0.51", "−0.50", "−0.49"]
    assert svg.nice_ticks(0, 100, 5) == pytest.approx([0, 20, 40, 60, 80, 100])
    assert svg.tick_texts([0, 20, 40]) == ["0", "20", "40"]
    assert svg.nice_ticks(1, 1) == [1]


def test_smooth_keeps_lines_and_reduces_noise():
    line = np.linspace(3, 9, 50)
    assert np.allclose(svg.smooth(line.tolist(), 11), line)
    noise = np.random.default_rng(0).standard_normal(400)
    smoothed = np.asarray(svg.smooth(noise.tolist(), 41))
    assert smoothed.std() < 0.3 and abs(smoothed[-1]) < 1.0
    assert svg.smooth([5.0], 5) == [5.0]


def test_chart_places_points_on_its_own_scale():
    """The drawn position of a point agrees with the ticks and grid lines beside it."""
    series = svg.Series("a", [0, 60, 100], [0.0, 10.0, 20.0], "marked", errors=[1.0, 1.0, 1.0])
    page = svg.chart([series], title="t", x_label="x", y_label="y", x_pad=0.1)
    drawing = ElementTree.fromstring(re.search(r"<svg viewBox.*?</svg>", page, re.DOTALL)[0])
    ticks = [t for t in drawing.iter("text") if t.get("class") == "tick"]
    across = {t.text: float(t.get("x")) for t in ticks if t.get("text-anchor") == "middle"}
    # The baseline of a y tick's text lies 4 below the middle of its digits.
    up = {t.text: float(t.get("y")) - 4 for t in ticks if t.get("text-anchor") == "end"}
    circles = [(float(c.get("cx")), float(c.get("cy"))) for c in drawing.iter("circle")]
    assert [x for x, _ in circles] == pytest.approx(
        [across[t] for t in ("0", "60", "100")], abs=0.2
    )
    assert [y for _, y in circles] == pytest.approx([up[t] for t in ("0", "10", "20")], abs=0.2)
    bars = [p.get("d") for p in drawing.iter("path") if p.get("class") == "error"]
    half = (up["0"] - up["10"]) / 10
    assert float(re.match(r"M\S+ (\S+)V", bars[0])[1]) == pytest.approx(up["0"] + half, abs=0.2)
    # Higher values are higher up: smaller y.
    assert circles[0][1] > circles[1][1] > circles[2][1]


def test_chart_of_a_constant_and_of_a_long_run():
    flat = svg.chart([svg.Series("a", [1, 2], [3.0, 3.0])], title="t", x_label="x", y_label="y")
    assert "nan" not in flat
    count = 50_000
    long = svg.Series("a", range(count), [float(i) for i in range(count)])
    page = svg.chart([long], title="t", x_label="x", y_label="y")
    assert len(page) < 30_000
    with pytest.raises(ValueError, match="no points"):
        svg.chart([svg.Series("a", [], [])], title="t", x_label="x", y_label="y")


# --- real crops beside samples, samples in training, embeddings -----------------------------------


def test_real_crops_stand_beside_the_samples_of_their_class(tmp_path):
    images = {
        "samples_before": make_images(3, 1),
        "samples_after": make_images(3, 2),
        "real_of_classes": make_images(3, 3),
    }
    page = Page(write_report(tmp_path, make_summary(), [], images))
    order = ("real_of_classes", "samples_before", "samples_after")
    want = [images[k][i] for i in range(3) for k in order]
    assert all(np.array_equal(a, b) for a, b in zip(page.pixels(), want, strict=True))
    heads = "<span>real</span><span>before</span><span>after</span>"
    assert page.source.count(heads) == 2  # one card for both cats
    assert "Beside them real crops" in page.text


def sampled_history():
    rows = make_history(20)
    for step, kernel in ((1, 8.0), (11, 6.0), (20, 3.0)):
        rows[step - 1] |= {"sampled/kernel_distance": kernel, "sampled/kernel_distance_error": 0.5}
        rows[step - 1] |= {"sampled/entropy": 3.5}
    return rows


def test_samples_in_training_have_curves_of_their_own(tmp_path):
    block = {"samples": 256, "feature": "a <net>"}
    summary = {"task": "vapi", "sampled": block}
    page = Page(write_report(tmp_path, summary, sampled_history(), {}))
    assert "256 of each, features a <net>." in page.text
    section = page.source.split("<h2>Samples in training</h2>")[1].split("</section>")[0]
    charts = [ElementTree.fromstring(s) for s in re.findall(r"<svg.*?</svg>", section)]
    assert [c.get("aria-label") for c in charts] == [
        "Kernel distance of samples to real crops",
        "Entropy of samples",
    ]
    for chart, bars in zip(charts, (3, 0), strict=True):
        heights = [float(c.get("cy")) for c in chart.iter("circle")]
        assert len(heights) == 3
        assert len([p for p in chart.iter("path") if p.get("class") == "error"]) == bars
    distances = [float(c.get("cy")) for c in charts[0].iter("circle")]
    assert distances == sorted(distances)  # falling: further down the drawing
    # Nowhere else, and an error is no curve.
    assert page.source.count("<figcaption>Entropy of samples") == 1
    assert "sampled/" not in page.text


def test_an_error_that_is_not_known_leaves_the_bars_out(tmp_path):
    rows = sampled_history()
    rows[0]["sampled/kernel_distance_error"] = None
    page = Page(write_report(tmp_path, {"task": "vapi"}, rows, {}))
    assert "Kernel distance of samples" in page.source and 'class="error"' not in page.source


def test_planes_are_drawn_with_legend_axes_and_caption(tmp_path):
    drawn = planes_of(blobs(), "pixels", "a feature <&>")
    page = Page(write_report(tmp_path, {}, [], {}, drawn))
    assert "Fidelity" in page.headings and "illustrate" in page.text
    for plane in drawn:
        (figure,) = re.findall(
            rf'<figure class="chart plane"><figcaption>{plane.title[:5]}.*?</figure>',
            page.source,
            re.DOTALL,
        )
        assert "a feature &lt;&amp;&gt;" in figure
        legend = re.findall(r"</svg>([^<]*)</li>", figure)
        assert legend == ["real", "base", "after"]
        drawing = ElementTree.fromstring(re.search(r"<svg.*?</svg>", figure, re.DOTALL)[0])
        labels = [t.text for t in drawing.iter("text") if t.get("class") == "label"]
        assert labels == [plane.x_label, plane.y_label]
        assert [t for t in drawing.iter("text") if t.get("class") == "tick"]
        # Every point once, inside the drawing.
        _, _, width, height = map(float, drawing.get("viewBox").split())
        circles = [(float(c.get("cx")), float(c.get("cy"))) for c in drawing.iter("circle")]
        assert len(circles) == 60
        assert all(0 < x < width and 0 < y < height for x, y in circles)
    assert "distances between clusters" in page.text


@pytest.mark.parametrize("limits", [(0, 10, 0, 10), (0, 10, 0, 8), (0, 100, 0, 1), (0, 1, 0, 100)])
def test_a_plane_has_one_scale_on_both_axes_and_shows_all_of_itself(limits):
    plane = dataclasses.replace(planes_of(blobs(8), "pixels", "f")[0], limits=limits)
    frame = svg.plane_frame(plane)
    across, up = frame.px(1.0) - frame.px(0.0), frame.py(0.0) - frame.py(1.0)
    assert across == pytest.approx(up, rel=0.06)
    x0, x1, y0, y1 = limits
    assert frame.x0 <= x0 and frame.x1 >= x1 and frame.y0 <= y0 and frame.y1 >= y1
    assert 290 <= frame.height <= 460
