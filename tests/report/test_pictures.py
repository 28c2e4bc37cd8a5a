"""Pictures of many images: every image in its place, under and beside its words."""

import numpy as np
import pytest

from vapi_jax.report.pictures import overview, side_by_side

TILE = 98  # 96 pixels, and a rim of 1


def flat(value, count, side=32):
    return np.full((count, side, side, 3), value, np.uint8)


def test_an_overview_has_a_strip_for_each_row():
    picture = overview({"a": flat(10, 3), "b": flat(20, 3)})
    # A label of 110 and three images with a rim of 1 each.
    assert picture.shape == (2 * TILE, 110 + 3 * TILE, 3)
    assert (picture[1:97, 111:207] == 10).all() and (picture[99:195, 111:207] == 20).all()
    assert (picture[40:60, :110] < 128).any()


def test_heads_stand_over_equal_parts_with_gaps_between():
    rows = {"cat": np.concatenate([flat(v, 2) for v in (10, 20, 30)])}
    picture = overview(rows, heads=("real", "base", "tuned"))
    group = 2 * TILE
    assert picture.shape == (24 + TILE, 110 + 3 * group + 2 * 12, 3)
    for index, value in enumerate((10, 20, 30)):
        left = 110 + index * (group + 12)
        assert (picture[25:121, left + 1 : left + 97] == value).all()
        head = picture[:24, left : left + group]
        assert (head < 128).any()
        if index:
            assert (picture[24:, left - 12 : left] == 255).all()


def test_a_long_name_widens_the_label_and_is_not_cut():
    narrow, wide = (overview({name: flat(0, 1)}) for name in ("cat", "a very long name of a class"))
    assert wide.shape[1] > narrow.shape[1]
    assert (wide[:, :8] == 255).all() and (wide[:, 10:40] < 200).any()


def test_many_large_images_make_a_picture_of_about_4096_pixels():
    rows = {str(row): flat(9, 24, side=384) for row in range(3)}
    picture = overview(rows, heads=("x", "y", "z"))
    assert 4000 < picture.shape[1] < 4096 + 110 + 24 * 2 + 2 * 12 + 1


def test_rows_and_heads_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="rows differ"):
        overview({"a": flat(0, 2), "b": flat(0, 3)})
    with pytest.raises(ValueError, match="5 images in a row do not divide among 3 heads"):
        overview({"a": flat(0, 5)}, heads=("x", "y", "z"))


def test_classes_are_rows_and_sets_are_columns():
    values = {"real": (1, 2, 3, 4), "base": (11, 12, 13, 14)}
    columns = {h: np.concatenate([flat(v, 1) for v in vs]) for h, vs in values.items()}
    picture = side_by_side(columns, ["cat", "cat", "dog", "dog"])
    for line in range(2):
        for index, head in enumerate(values):
            for k in range(2):
                y, x = 25 + line * TILE, 111 + index * (2 * TILE + 12) + k * TILE
                assert (picture[y : y + 96, x : x + 96] == values[head][2 * line + k]).all()


def test_two_classes_of_one_name_have_a_row_each():
    picture = side_by_side({"real": flat(7, 3)}, ["crane", "cat", "crane"])
    assert picture.shape[0] == 24 + 3 * TILE
