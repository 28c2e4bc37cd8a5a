"""Pixels as people look at them: rounding, the size of tiles, grids."""

import numpy as np
import pytest

from vapi_jax.common.images import image_grid, tiles, to_uint8


def test_to_uint8_truncates():
    x = np.array([-2, -1, -0.999, 0, 0.001, 0.9999, 1, 3])
    assert to_uint8(x).tolist() == [0, 0, 0, 128, 128, 255, 255, 255]
    # Truncation, not rounding: 127.5 x + 128 = 130.9 -> 130.
    assert to_uint8(np.float32(2.9 / 127.5)) == 130
    with pytest.raises(ValueError, match="NaN"):
        to_uint8(np.array([np.nan]))


@pytest.mark.parametrize(
    ("side", "shown"), [(16, 96), (24, 96), (32, 96), (64, 128), (96, 96), (128, 128), (384, 384)]
)
def test_small_images_are_enlarged_to_about_96_pixels_and_others_are_not(side, shown):
    image = np.random.default_rng(0).integers(0, 256, (1, side, side, 3), dtype=np.uint8)
    (tile,) = tiles(image, 1, 1)
    assert tile.shape == (shown, shown, 3)
    assert np.array_equal(tile[:: shown // side, :: shown // side], image[0])


@pytest.mark.parametrize(
    ("shape", "columns"),
    [((24, 384, 384), 8), ((48, 384, 384), 8), ((200, 32, 32), 2), ((16, 256, 64), 16)],
)
def test_no_grid_is_longer_than_4096_pixels_but_for_its_padding(shape, columns):
    grid = image_grid(np.full((*shape, 3), 7, np.uint8), columns=columns, pad=2)
    rows = -(-shape[0] // columns)
    assert max(grid.shape) <= 4096 + 2 * (max(rows, columns) + 1)
    assert (grid == 7).mean() > 0.8  # tiles fill it
    height, width = (grid.shape[0] - 2) / rows - 2, (grid.shape[1] - 2) / columns - 2
    assert width / height == pytest.approx(shape[2] / shape[1], rel=0.02)


def test_image_grid_places_every_pixel():
    images = np.random.default_rng(0).integers(0, 200, (3, 24, 48, 3), dtype=np.uint8)
    grid = image_grid(images, columns=2, pad=1, background=200)
    assert grid.shape == (2 * (48 + 1) + 1, 2 * (96 + 1) + 1, 3)
    assert np.array_equal(grid[1:49:2, 1:97:2], images[0])
    assert np.array_equal(grid[2:49:2, 99:194:2], images[1])
    assert np.array_equal(grid[50:98:2, 1:97:2], images[2])
    assert (grid[0] == 200).all() and (grid[50:, 98:] == 200).all()
    with pytest.raises(ValueError, match="float32"):
        image_grid(images.astype(np.float32))
