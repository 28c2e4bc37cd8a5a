"""Pictures: sizes, places and colours of what is drawn; the drawing and the page agree."""

import numpy as np
import pytest
from PIL import Image

from tests.helpers.toy_features import blobs
from vapi_jax.evaluation.embeddings import Cloud, Plane, density_plane
from vapi_jax.report import svg
from vapi_jax.report.pictures import PALETTE, ascii_text, draw_plane, overview, side_by_side

WHITE = (255, 255, 255)


def flat(value, count, side=4):
    return np.full((count, side, side, 3), value, np.uint8)


def rgb(color):
    return np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])


def near(picture, color, tolerance=12):
    """The pixels of about a colour, as a mask."""
    return (np.abs(picture.astype(int) - rgb(color)) <= tolerance).all(axis=-1)


def one_cloud(points, **changes):
    look = {"color": 0, "shape": "circle", "css": "solid", "regions": ()} | changes
    cloud = Cloud("a set", np.asarray(points, np.float64), **look)
    return Plane("n", "A title", "x", "y", "A note.", (cloud,), (0.0, 10.0, 0.0, 10.0), 6.0)


def test_texts_are_put_into_the_letters_of_the_font():
    assert ascii_text("Fréchet −1 “VA-π”") == 'Frechet -1 "VA-pi"'
    assert ascii_text("金魚") == "??"


def test_an_overview_has_a_strip_for_each_row():
    picture = overview({"a": flat(10, 3), "b": flat(20, 3)}, scale=2)
    # Rows of 1 + 8 + 1 pixels; a label of 110 and three images of 8 with 4 lines of padding.
    assert picture.shape == (2 * 10, 110 + 3 * 9 + 1, 3)
    assert (picture[1:9, 111:119] == 10).all() and (picture[11:19, 111:119] == 20).all()


def test_heads_stand_over_equal_parts_with_gaps_between():
    rows = {"cat": np.concatenate([flat(v, 2) for v in (10, 20, 30)])}
    picture = overview(rows, scale=3, heads=("real", "base", "tuned"))
    group = 2 * 13 + 1
    assert picture.shape == (24 + 14, 110 + 3 * group + 2 * 12, 3)
    for index, value in enumerate((10, 20, 30)):
        left = 110 + index * (group + 12)
        assert (picture[25:37, left + 1 : left + 13] == value).all()
        head = picture[:24, left : left + group]
        assert (head < 128).any()
        if index:
            assert (picture[24:, left - 12 : left] == 255).all()


def test_a_long_name_widens_the_label_and_is_not_cut():
    narrow, wide = (overview({name: flat(0, 1)}) for name in ("cat", "a very long name of a class"))
    assert wide.shape[1] > narrow.shape[1]
    assert (wide[:, :8] == 255).all() and (wide[:, 10:40] < 200).any()


def test_rows_and_heads_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="rows differ"):
        overview({"a": flat(0, 2), "b": flat(0, 3)})
    with pytest.raises(ValueError, match="5 images in a row do not divide among 3 heads"):
        overview({"a": flat(0, 5)}, heads=("x", "y", "z"))


def test_classes_are_rows_and_sets_are_columns():
    values = {"real": (1, 2, 3, 4), "base": (11, 12, 13, 14)}
    columns = {h: np.concatenate([flat(v, 1) for v in vs]) for h, vs in values.items()}
    picture = side_by_side(columns, ["cat", "cat", "dog", "dog"])
    group, row = 2 * 13 + 1, 14
    for line in range(2):
        for index, head in enumerate(values):
            for k in range(2):
                y, x = 24 + line * row + 1, 110 + index * (group + 12) + 1 + 13 * k
                assert (picture[y : y + 12, x : x + 12] == values[head][2 * line + k]).all()


def test_two_classes_of_one_name_have_a_row_each():
    picture = side_by_side({"real": flat(7, 3)}, ["crane", "cat", "crane"])
    assert picture.shape[0] == 24 + 3 * 14


def test_a_point_is_drawn_where_the_frame_places_it():
    plane = one_cloud([[2.0, 8.0]])
    picture = draw_plane(plane)
    frame = svg.plane_frame(plane)
    assert picture.dtype == np.uint8 and picture.shape[1] == 2 * frame.width
    blue = near(np.asarray(picture), PALETTE[0], 70)
    inside = blue[: 2 * (34 + frame.height)]
    rows, columns = np.nonzero(inside)
    assert columns.mean() == pytest.approx(2 * frame.px(2.0), abs=1.0)
    assert rows.mean() == pytest.approx(2 * (34 + frame.py(8.0)), abs=1.0)
    assert inside.sum() == pytest.approx(np.pi * (2 * plane.radius) ** 2, rel=0.12)


def test_a_hole_in_a_filled_region_stays_white():
    def square(half):
        return np.array([(-1, -1), (1, -1), (1, 1), (-1, 1), (-1, -1)]) * half + 5.0

    plane = one_cloud([[1.0, 1.0]], color=4, css="filled", regions=((square(4.0), square(2.0)),))
    picture, frame = draw_plane(plane), svg.plane_frame(plane)

    def at(x, y):
        return picture[round(2 * (34 + frame.py(y))), round(2 * frame.px(x))]

    # Away from grid lines, which lie at even numbers.
    assert tuple(at(5.1, 5.1)) == WHITE and tuple(at(9.7, 5.1)) == WHITE
    shaded = at(7.9, 5.1)
    assert (shaded < 255).all() and (shaded > rgb(PALETTE[4])).all()


def test_a_dashed_outline_has_gaps_and_a_solid_one_has_none():
    line = np.array([(1, 1), (9, 1), (9, 9), (1, 9), (1, 1)], float)
    share = {}
    for css in ("dashed", "solid"):
        plane = one_cloud([[5.0, 5.0]], css=css, regions=((line,),))
        picture, frame = draw_plane(plane), svg.plane_frame(plane)
        row = round(2 * (34 + frame.py(9.0)))
        left, right = (round(2 * frame.px(x)) for x in (1.2, 8.8))
        share[css] = (picture[row, left:right, 0] < 200).mean()
    assert share["solid"] == 1.0
    assert 0.5 < share["dashed"] < 0.85  # 7 on, 4 off, and round ends


def test_the_legend_names_every_set_in_its_colour():
    plane = density_plane(blobs(), "n", "feature")
    picture = draw_plane(plane)
    legend = picture[2 * (34 + svg.plane_frame(plane).height) :][:56]
    starts = []
    for cloud in plane.clouds:
        columns = np.nonzero(near(legend, PALETTE[cloud.color]).any(axis=0))[0]
        assert len(columns) > 10
        starts.append(columns.min())
    assert starts == sorted(starts)


def test_pictures_are_deterministic_and_survive_a_file(tmp_path):
    plane = density_plane(blobs(), "n", "feature")
    first = draw_plane(plane)
    np.testing.assert_array_equal(first, draw_plane(plane))
    Image.fromarray(first).save(tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").size == first.shape[1::-1]


def test_colours_are_those_of_the_page():
    from importlib import resources

    css = resources.files("vapi_jax").joinpath("assets/report.css").read_text(encoding="utf-8")
    light = css.split("prefers-color-scheme")[0]
    for index, color in enumerate(PALETTE):
        assert f"--c{index}: {color};" in light
