"""Figures show the numbers they are given, look the same each time, and can be read everywhere."""

import dataclasses
import re
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.container import ErrorbarContainer
from matplotlib.font_manager import findfont, get_font
from matplotlib.patches import PathPatch

from tests.helpers.runs import make_history, make_summary
from tests.helpers.toy_features import blobs
from vapi_jax.evaluation.embeddings import Cloud, Plane, density_plane, planes_of, regions
from vapi_jax.report import figures


def lines(figure):
    """Label -> (x, y) of what a legend could name."""
    found = {}
    for handle, label in zip(*figure.axes[0].get_legend_handles_labels(), strict=True):
        line = handle[0] if isinstance(handle, ErrorbarContainer) else handle
        found[label] = tuple(np.asarray(part).tolist() for part in line.get_data())
    return found


def legend(figure):
    drawn = figure.axes[0].get_legend()
    return [text.get_text() for text in drawn.get_texts()] if drawn else []


def texts(figure):
    root = ElementTree.fromstring(figures.svg(figure))
    return [node.text for node in root.iter("{http://www.w3.org/2000/svg}text")]


def test_a_curve_has_the_steps_their_smoothed_line_and_the_held_out_values():
    history = make_history(40)
    figure = figures.curve(history, "reward", "A title", "a label")
    found = lines(figure)
    assert found["single steps"] == ([r["step"] for r in history], [r["reward"] for r in history])
    steps, smoothed = found["smoothed"]
    assert len(steps) == 40 and np.std(np.diff(smoothed)) < np.std(
        np.diff(found["single steps"][1])
    )
    assert found["held-out"] == ([10, 20, 30, 40], [-0.495, -0.49, -0.485, -0.48])
    assert legend(figure) == list(found)
    assert {"A title", "step", "a label"} <= set(texts(figure))
    # A step without a number is left out.
    assert 2 not in lines(figures.curve(history, "grad_norm", "", ""))["single steps"][0]
    alone = figures.curve(history, "held_out/reward", "", "", figures.SMALL)
    assert list(lines(alone)) == ["held-out"] and not legend(alone)


def test_a_short_curve_is_not_smoothed():
    history = make_history(3)
    found = lines(figures.curve(history, "entropy", "", ""))
    assert found == {"training": ([1, 2, 3], [row["entropy"] for row in history])}


def test_smooth_keeps_lines_and_reduces_noise():
    line = np.linspace(3, 9, 50)
    assert np.allclose(figures.smooth(line.tolist()), line)
    smoothed = np.asarray(figures.smooth(np.random.default_rng(0).standard_normal(400).tolist()))
    assert smoothed.std() < 0.3 and abs(smoothed[-1]) < 1.0


def test_a_long_run_and_a_constant_are_small_drawings():
    history = [{"step": s, "a": float(s), "b": 3.0} for s in range(20_000)]
    for metric in ("a", "b"):
        figure = figures.curve(history, metric, metric, "")
        assert len(lines(figure)["single steps"][0]) == 20_000
        assert len(figures.svg(figure)) < 60_000


@pytest.mark.parametrize(("last", "bars"), [(0.5, 3), (None, 0)], ids=["known", "one unknown"])
def test_samples_in_training_have_bars_where_all_errors_are_known(last, bars):
    history = [
        {"step": step, "sampled/a": value, "sampled/a_error": error}
        for step, value, error in ((1, 8.0, 0.5), (11, 6.0, 0.5), (20, 3.0, last))
    ]
    axes = figures.curve(history, "sampled/a", "", "").axes[0]
    (drawn,) = axes.containers
    assert drawn[0].get_ydata().tolist() == [8.0, 6.0, 3.0]
    segments = [s for group in drawn[2] for s in group.get_segments()]
    assert [float(np.ptp(s[:, 1])) for s in segments] == [1.0] * bars


def test_a_sweep_has_the_rows_of_the_table():
    summary = make_summary()
    figure = figures.sweep(summary, "frechet")
    drawn = [
        (np.asarray(one[0].get_xdata()).tolist(), np.asarray(one[0].get_ydata()).tolist())
        for one in figure.axes[0].containers
    ]
    assert drawn == [
        ([3.33, 3.48, 3.73], [453.0, 458.3, 471.6]),
        ([3.33], [453.0]),
        ([3.71], [472.3]),
        ([3.34], [450.0]),
    ]
    assert legend(figure)[2] == "CE only" and len(legend(figure)) == 4
    assert {"T=1", "T=0.95", "T=0.916"} <= set(texts(figure))
    assert "Alex features" in figures.sweep(summary, "frechet_unseen").get_suptitle()
    summary["table"] = [row for row in summary["table"] if row["kind"] in ("vapi", "floor")]
    assert figures.sweep(summary, "frechet") is None and figures.sweep({}, "frechet") is None


def test_a_plane_has_every_point_every_region_and_its_words():
    for plane in planes_of(blobs(50), "pixels", "a feature <&> $x$ ± π"):
        figure = figures.plane(plane)
        axes = figure.axes[0]
        drawn = np.concatenate([line.get_xydata() for line in axes.lines])
        want = np.concatenate([cloud.points for cloud in plane.clouds])
        assert np.array_equal(np.sort(drawn, axis=0), np.sort(want, axis=0))
        patches = [patch for patch in axes.patches if isinstance(patch, PathPatch)]
        assert len(patches) == sum(len(cloud.regions) for cloud in plane.clouds)
        assert legend(figure) == ["real", "base", "after"]
        words = " ".join(texts(figure))
        for text in (plane.title, plane.x_label, plane.y_label, plane.note):
            assert set(text.split()) <= set(words.split())
        # The sets take turns, so that none hides another.
        colors = [line.get_color() for line in axes.lines]
        assert len(set(colors[:3])) == 3 and colors[3] != colors[0] and len(colors) > 6


@pytest.mark.parametrize("limits", [(0, 10, 0, 10), (0, 100, 0, 1), (0, 1, 0, 100)])
def test_a_plane_has_one_scale_on_both_axes_and_shows_all_of_itself(limits):
    plane = dataclasses.replace(planes_of(blobs(8), "pixels", "f")[0], limits=limits)
    figure = figures.plane(plane)
    axes = figure.axes[0]
    origin, one = axes.transData.transform([(0, 0), (1, 1)])
    assert one[0] - origin[0] == pytest.approx(one[1] - origin[1], rel=1e-3)
    (x0, x1), (y0, y1) = axes.get_xlim(), axes.get_ylim()
    assert x0 <= limits[0] and x1 >= limits[1] and y0 <= limits[2] and y1 >= limits[3]
    # One side is full, but for what the words of other ticks take.
    full = max((limits[1] - limits[0]) / (x1 - x0), (limits[3] - limits[2]) / (y1 - y0))
    assert full > 0.95


def test_a_hole_in_a_filled_region_stays_white():
    rng, angle = np.random.default_rng(4), np.linspace(0, 2 * np.pi, 2000, endpoint=False)
    ring = 4.0 * np.stack([np.cos(angle), np.sin(angle)], 1) + 0.1 * rng.normal(size=(2000, 2))
    limits = (-6.0, 6.0, -6.0, 6.0)
    cloud = Cloud("a ring", np.array([(5.5, 5.5)]), regions(ring, limits))
    figure = figures.plane(Plane("n", "t", "x", "y", "note", (cloud,), limits))
    picture = figures.pixels(figure)

    def at(x, y):
        inches = figure.axes[0].transData.transform((x, y)) / figure.dpi
        column, row = inches * 72 * 2.5
        return picture[len(picture) - 1 - round(row), round(column)]

    assert (at(0.3, 0.3) == 255).all()
    assert (at(4.0, 0.3) < 250).all() and (at(-4.0, 0.3) < 250).all()


def test_svg_is_the_same_each_time_and_whole():
    def draw():
        return figures.curve(make_history(20), "reward", 'A <title> & "$x$"', "−1 ± π")

    text = figures.svg(draw())
    assert text == figures.svg(draw())
    with mpl.rc_context({"font.size": 30, "axes.facecolor": "red", "svg.hashsalt": "other"}):
        assert figures.svg(draw()) == text
    assert not re.search(r"dc:date|20\d\d-\d\d-\d\d|Matplotlib", text)
    ElementTree.fromstring(text)
    assert {'A <title> & "$x$"', "−1 ± π"} <= set(texts(draw()))


def test_pixels_are_the_same_each_time_and_their_font_has_our_letters():
    plane = density_plane(blobs(20), "n", "feature")
    figure = figures.plane(plane)
    first = figures.pixels(figure, scale=2)
    assert first.dtype == np.uint8 and first.shape == (880, 800, 3)
    text = figures.svg(figure)
    assert np.array_equal(first, figures.pixels(figure, scale=2))
    assert text == figures.svg(figure) == figures.svg(figures.plane(plane))
    font = get_font(findfont("DejaVu Sans"))
    assert all(font.get_char_index(ord(letter)) for letter in "−π±é²“”ξεβ")
