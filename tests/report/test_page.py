"""The report page is whole, self-contained and escaped, and holds what the run has left."""

import base64
import io
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from tests.helpers.runs import make_history, make_images, make_summary
from tests.helpers.toy_features import blobs
from vapi_jax.evaluation.embeddings import planes_of
from vapi_jax.report import figures
from vapi_jax.report.page import write_report
from vapi_jax.report.verdict import show, show_distance

VOID = {"meta", "img", "br", "input", "link"}
NOT_A_NUMBER = re.compile(r"\b(nan|inf|None)\b")


class Page(HTMLParser):
    """Checks that tags are balanced and nothing is outside; collects headings, images and text."""

    def __init__(self, path):
        super().__init__()
        self.open, self.images, self.text, self.headings = [], [], "", []
        self.source = path.read_text(encoding="utf-8")
        self.ids, self.inside = [], set(re.findall(r"url\(#(\w+)\)", self.source))
        self.feed(self.source)
        self.close()
        assert not self.open, f"not closed: {self.open}"
        assert self.inside <= set(self.ids) and len(set(self.ids)) == len(self.ids)
        assert not re.search(r"url\([^#]|@import|<script", self.source, re.IGNORECASE)

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            elif name in ("src", "href", "xlink:href", "srcset", "action", "data"):
                if value.startswith("#"):
                    self.inside.add(value[1:])
                else:
                    self.images.append(value.removeprefix("data:image/png;base64,"))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        assert "svg" in self.open, f"<{tag}/> is not closed in HTML"
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data + " "
            if self.open[-1] in ("h1", "h2"):
                self.headings.append(data)

    def pixels(self):
        return [np.asarray(Image.open(io.BytesIO(base64.b64decode(i)))) for i in self.images]

    def charts(self):
        """Title of each chart, which is XML and has a drawing."""
        found = [ElementTree.fromstring(s) for s in re.findall(r"<svg.*?</svg>", self.source, re.S)]
        space = "{http://www.w3.org/2000/svg}"
        assert all(len(list(one.iter(f"{space}path"))) > 3 for one in found)
        return [one.findtext(f"{space}title") for one in found]


def test_a_whole_run(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    images = {
        "samples_before": make_images(3, 1),
        "samples_after": make_images(3, 2),
        "real": make_images(2, 3),
        "reconstructions": make_images(2, 4),
    }
    summary = make_summary()
    path = write_report(tmp_path, summary, make_history(), images)
    assert path == tmp_path / "report.html"
    page = Page(path)
    assert page.headings[0] == summary["method"]["title"] and summary["name"] in page.text
    want = ["Before and after", "Results", "Learning curves", "Reconstructions", "Settings"]
    assert page.headings[2:] == want
    # Every pixel arrives, pairs side by side.
    pixels = page.pixels()
    want = [images[k][i] for i in range(3) for k in ("samples_before", "samples_after")]
    want += [images[k][i] for i in range(2) for k in ("real", "reconstructions")]
    assert len(pixels) == len(want)
    assert all(np.array_equal(a, b) for a, b in zip(pixels, want, strict=True))
    # One card for both cats, one for the rocket.
    assert page.source.count("<figcaption>cat</figcaption>") == 1
    # Every number of the summary.
    for row in summary["table"]:
        assert row["name"] in page.text
        assert {show(row["ce"]), show(row["entropy"])} <= set(page.text.split())
        assert show_distance(row["frechet"]) in page.text
        assert show_distance(row["frechet_unseen"]) in page.text
        assert show_distance(row["kernel_unseen"]) in page.text
    for key in ("reward", "ce"):
        assert {show(n) for n in summary[key].values()} <= set(re.findall(r"−?\d\.\d+", page.text))
    for text in ("2 123 456", "5 min 12 s", "2 min 11 s", "0.10.2", "group_size", "metrics.jsonl"):
        assert text in page.text
    assert "summary.json" not in page.text  # no such file here
    assert re.search(r'<tr class="matched">(?:(?!</tr>).)*same entropy', page.source, re.DOTALL)
    # The method's curves first, the other metrics under them.
    titles = page.charts()
    assert [title.split(",")[0] for title in titles[:2]] == ["Fréchet distance against entropy"] * 2
    assert titles[2:5] == ["Reward", "Reward, held-out", "Policy entropy"]
    assert titles[5:] == ["advantages_nonzero", "ce", "clip_fraction", "grad_norm", "reward_std"]
    assert not NOT_A_NUMBER.search(page.text)


def test_all_text_is_escaped(tmp_path):
    evil = '_<script>alert("x")</script>&$x$'
    summary = make_summary()
    summary |= {"name": evil, "config": {evil: evil}, "versions": {evil: evil}}
    summary["method"] = {"name": evil, "title": evil, "curves": [[evil, evil, evil]]}
    summary["devices"], summary["sampled"] = {evil: evil}, {"feature": evil}
    summary["frechet"]["feature"], summary["frechet_unseen"]["feature"] = evil, f"other {evil}"
    summary["sample_classes"] = [evil, evil]
    summary["seconds"][evil] = 1.0
    for row in summary["table"]:
        row["name"] = row["kind"] + evil if row["kind"] == "floor" else evil
    history = [row | {evil: 1.0, "sampled/entropy": 2.0} for row in make_history(3)]
    images = {
        "samples_before": make_images(2),
        "samples_after": make_images(2),
        evil: make_images(1),
    }
    page = Page(write_report(tmp_path, summary, history, images))
    assert page.headings[0] == evil
    # In the legend of both sweeps, and as title and label of a curve.
    assert page.charts().count(evil) == 1
    assert page.text.count(evil) > 15


def test_sections_appear_only_with_their_data(tmp_path):
    page = Page(write_report(tmp_path / "empty", {}, [], {}))
    assert page.headings == ["Training run", "The run is complete", "Settings"]
    history = [{"step": s, "loss": 2 - s / 100, "held_out/loss": 2.1} for s in range(1, 101)]
    images = {"real": make_images(2), "reconstructions": make_images(2)}
    page = Page(write_report(tmp_path, {"name": "a"}, history, images))
    assert page.headings[1:] == ["The loss fell", "Learning curves", "Reconstructions", "Settings"]
    assert page.charts() == ["loss"]
    page = Page(write_report(tmp_path, {}, [], {"samples": make_images(3)}))
    assert "Samples" in page.headings and len(page.images) == 3


def test_non_finite_and_missing_numbers_become_dashes(tmp_path):
    summary = make_summary()
    summary["reward"] = {"first": math.nan, "last": math.inf}
    summary["table"][1]["frechet"] = None
    summary["table"][2]["entropy"] = math.nan
    summary["table"][3]["frechet"] = {"mean": math.nan, "sd": None, "n": 0}
    page = Page(write_report(tmp_path, summary, make_history(3), {}))
    assert not NOT_A_NUMBER.search(page.text) and "–" in page.text


def test_images_of_another_kind_are_refused(tmp_path):
    with pytest.raises(ValueError, match="uint8"):
        write_report(tmp_path, {}, [], {"real": np.zeros((1, 8, 8, 3), np.float32)})


def test_real_crops_stand_beside_the_samples_of_their_class(tmp_path):
    order = ("real_of_classes", "samples_before", "samples_after")
    images = {name: make_images(3, seed) for seed, name in enumerate(order)}
    page = Page(write_report(tmp_path, make_summary(), [], images))
    want = [images[k][i] for i in range(3) for k in order]
    assert all(np.array_equal(a, b) for a, b in zip(page.pixels(), want, strict=True))
    heads = r"<span>real</span>\s*<span>before</span>\s*<span>after</span>"
    assert len(re.findall(heads, page.source)) == 2  # one card for both cats


def test_samples_in_training_and_planes_have_their_sections(tmp_path):
    rows = [row | {"sampled/kernel_distance": 3.0} for row in make_history(2)]
    planes = [figures.plane(one) for one in planes_of(blobs(8), "a", "a <net>")]
    summary = {"sampled": {"samples": 256, "feature": "a <net>"}}
    page = Page(write_report(tmp_path, summary, rows, {}, planes))
    assert page.headings[2:] == ["Fidelity", "Learning curves", "Samples in training", "Settings"]
    assert "256 of each" in page.text and "sampled/" not in page.text
    titles = page.charts()
    assert all("a <net>" in title for title in titles[:2])
    assert titles[-1] == "Kernel distance of samples to real crops"


def test_the_same_run_has_the_same_page(tmp_path):
    once, again = (
        write_report(
            tmp_path, make_summary(), make_history(), {"real": make_images(2)}
        ).read_bytes()
        for _ in range(2)
    )
    assert once == again


def test_a_run_loads_no_plotting_until_its_report_and_never_its_global_state():
    code = """
import sys
import vapi_jax.training.run
assert not {"matplotlib", "jinja2"} & sys.modules.keys()
import vapi_jax.report.page, vapi_jax.report.pictures
assert "matplotlib" in sys.modules and "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
