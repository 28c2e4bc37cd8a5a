"""The resizes of the published evaluations, against torch, a scalar loop and numbers worked out by hand.

`python -m tests.models.test_resize` writes tests/golden/resize.npz from the loop and torch.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from PIL import Image

from tests.helpers.compare import assert_close
from tests.helpers.paths import GOLDEN
from vapi_jax.models.resize import (
    bicubic_pillow,
    bicubic_torch,
    bilinear_tf1_legacy,
    published_384_to_256,
)

NUMBERS = GOLDEN / "resize.npz"
# (H, W) -> (height, width): larger, smaller, both at once, odd, a single row or column, unchanged.
SIZES = [
    ((8, 6), (31, 17)),
    ((13, 10), (5, 4)),
    ((9, 20), (18, 7)),
    ((1, 5), (3, 2)),
    ((6, 1), (4, 3)),
    ((7, 4), (7, 4)),
]


def pixels(*shape, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    if dtype == np.uint8:
        return rng.integers(0, 256, shape, dtype=np.uint8)
    return rng.uniform(-1, 1, shape).astype(dtype)


def tf1_loop(images, height, width):
    """TensorFlow 1's kernel, one output value after the other, in float32."""
    images = images.astype(np.float32)
    n, old_height, old_width, channels = images.shape
    out = np.empty((n, height, width, channels), np.float32)

    def neighbours(i, old, new):
        position = np.float32(i) * (np.float32(old) / np.float32(new))
        lower = int(position)
        return lower, min(lower + 1, old - 1), position - np.float32(lower)

    for y in range(height):
        top, bottom, down = neighbours(y, old_height, height)
        for x in range(width):
            left, right, across = neighbours(x, old_width, width)
            for b in range(n):
                for c in range(channels):
                    upper = images[b, top, left, c] + across * (
                        images[b, top, right, c] - images[b, top, left, c]
                    )
                    under = images[b, bottom, left, c] + across * (
                        images[b, bottom, right, c] - images[b, bottom, left, c]
                    )
                    out[b, y, x, c] = upper + down * (under - upper)
    return out


def by_torch(images, height, width, **options):
    """`interpolate` of torch on NHWC."""
    options = {"mode": "bicubic", "align_corners": False, "antialias": False, **options}
    nchw = torch.from_numpy(np.ascontiguousarray(np.moveaxis(images, -1, 1)))
    out = torch.nn.functional.interpolate(nchw, size=(height, width), **options)
    return np.moveaxis(out.numpy(), 1, -1)


def write_golden():
    arrays = {}
    for i, (old, new) in enumerate(SIZES):
        images = pixels(1, *old, 2, seed=i, dtype=np.uint8)
        arrays[f"{i}/images"] = images
        arrays[f"{i}/bilinear_tf1_legacy"] = tf1_loop(images, *new)
        arrays[f"{i}/bicubic_torch"] = by_torch(images.astype(np.float32), *new)
    np.savez_compressed(NUMBERS, **arrays)


# --- numbers on file and by hand ------------------------------------------------------------------


@pytest.mark.parametrize("function", [bilinear_tf1_legacy, bicubic_torch])
def test_the_committed_numbers_come_out(function):
    with np.load(NUMBERS, allow_pickle=False) as golden:
        assert len(golden.files) == 3 * len(SIZES)
        for i, (_, new) in enumerate(SIZES):
            got = function(golden[f"{i}/images"].astype(np.float32), *new)
            assert_close(got, golden[f"{i}/{function.__name__}"], 4e-6)


def test_two_pixels_become_four_on_the_grid_of_corners():
    row = np.array([0, 8], np.float32).reshape(1, 1, 2, 1)
    # Positions 0, 1/2, 1 and 3/2; beyond the last pixel it is repeated. Half-pixel centres would
    # give 0 2 6 8, aligned corners 0 8/3 16/3 8.
    np.testing.assert_array_equal(bilinear_tf1_legacy(row, 1, 4).ravel(), [0, 4, 8, 8])
    np.testing.assert_array_equal(
        bilinear_tf1_legacy(np.swapaxes(row, 1, 2), 4, 1).ravel(), [0, 4, 8, 8]
    )
    # No antialias: of six pixels every third is taken and the rest is not looked at.
    six = np.arange(6, dtype=np.float32).reshape(1, 1, 6, 1) ** 2
    np.testing.assert_array_equal(bilinear_tf1_legacy(six, 1, 2).ravel(), [0, 9])


def test_an_impulse_shows_the_cubic_with_coefficient_minus_three_quarters():
    impulse = np.zeros((1, 1, 7, 1), np.float32)
    impulse[0, 0, 3, 0] = 256
    # Twice as wide: distances of a quarter and three quarters from the pixel centres. With
    # a = -0.75 the kernel is 225/256 at 1/4, 67/256 at 3/4, -27/256 at 5/4 and -9/256 at 7/4.
    wanted = [0, 0, 0, -9, -27, 67, 225, 225, 67, -27, -9, 0, 0, 0]
    np.testing.assert_array_equal(bicubic_torch(impulse, 1, 14).ravel(), wanted)
    np.testing.assert_array_equal(bicubic_torch(np.swapaxes(impulse, 1, 2), 14, 1).ravel(), wanted)
    # Three times narrower lands on pixel centres 1, 4: without antialias the impulse is not seen.
    np.testing.assert_array_equal(bicubic_torch(impulse[:, :, :6], 1, 2).ravel(), [0, 0])


# --- oracles --------------------------------------------------------------------------------------


@pytest.mark.parametrize("old, new", [*SIZES, ((8, 8), (37, 37))])
def test_legacy_bilinear_equals_a_scalar_loop(old, new):
    images = pixels(2, *old, 3, dtype=np.uint8)
    got = bilinear_tf1_legacy(images, *new)
    assert got.dtype == jnp.float32 and got.shape == (2, *new, 3)
    assert_close(got, tf1_loop(images, *new), 1e-6)


@pytest.mark.parametrize("old, new", [*SIZES, ((48, 48), (32, 32)), ((32, 24), (299, 299))])
def test_bicubic_equals_torch(old, new):
    images = pixels(2, *old, 3)
    got = bicubic_torch(images, *new)
    assert got.dtype == jnp.float32 and got.shape == (2, *new, 3)
    assert_close(got, by_torch(images, *new), 6e-6)


@settings(max_examples=15)
@given(*[st.integers(1, 40)] * 4)
def test_bicubic_equals_torch_at_any_size(old_height, old_width, height, width):
    images = pixels(1, old_height, old_width, 1)
    got = bicubic_torch(images, height, width)
    assert_close(got, by_torch(images, height, width), 6e-6)


def test_the_neighbouring_choices_would_be_noticed():
    """What these tests keep apart differs by far more than their tolerances."""
    images = pixels(1, 48, 48, 3)
    bicubic = np.asarray(bicubic_torch(images, 32, 32))
    for other in (
        by_torch(images, 32, 32, antialias=True),
        by_torch(images, 32, 32, align_corners=True),
        jax.image.resize(images, (1, 32, 32, 3), "cubic", antialias=False),  # a = -0.5
    ):
        assert np.abs(bicubic - other).max() > 0.05
    bilinear = np.asarray(bilinear_tf1_legacy(images, 32, 32))
    for corners in (True, False):
        other = by_torch(images, 32, 32, mode="bilinear", align_corners=corners)
        assert np.abs(bilinear - other).max() > 0.05


# --- invariances ----------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [bilinear_tf1_legacy, bicubic_torch])
def test_equal_size_is_the_identity_and_constants_stay(function):
    images = pixels(2, 9, 6, 3)
    np.testing.assert_array_equal(function(images, 9, 6), images)
    constant = np.full((1, 9, 6, 3), 0.7, np.float32)
    for size in ((4, 13), (20, 3)):
        assert_close(function(constant, *size), np.float32(0.7), 6e-6)
    np.testing.assert_array_equal(bilinear_tf1_legacy(constant, 20, 3), np.float32(0.7))


def test_axes_are_treated_alike_and_only_the_centred_grid_commutes_with_mirrors():
    images = pixels(1, 12, 12, 2)
    for function in (bilinear_tf1_legacy, bicubic_torch):
        turned = function(np.swapaxes(images, 1, 2), 7, 19)
        assert_close(turned, np.swapaxes(function(images, 19, 7), 1, 2), 6e-6)
    mirrored = images[:, ::-1, ::-1]
    centred = bicubic_torch(images, 8, 20)[:, ::-1, ::-1]
    assert_close(bicubic_torch(mirrored, 8, 20), centred, 6e-6)
    legacy = bilinear_tf1_legacy(images, 8, 20)[:, ::-1, ::-1]
    assert np.abs(bilinear_tf1_legacy(mirrored, 8, 20) - legacy).max() > 0.1


def test_a_broken_pixel_spoils_its_own_taps_only():
    images = pixels(1, 12, 12, 1)
    images[0, 5, 5] = np.nan
    for function, reach in ((bilinear_tf1_legacy, 4), (bicubic_torch, 8)):
        spoiled = np.isnan(function(images, 24, 24)[0, :, :, 0])
        assert 0 < spoiled.any(0).sum() <= reach and 0 < spoiled.any(1).sum() <= reach


@pytest.mark.parametrize("function", [bilinear_tf1_legacy, bicubic_torch])
def test_the_result_is_the_same_on_one_device_and_on_eight(function):
    images = pixels(16, 12, 9, 3)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    split = jax.device_put(images, NamedSharding(mesh, PartitionSpec("data")))
    got = function(split, 17, 5)
    assert len(got.sharding.device_set) == 8
    np.testing.assert_array_equal(got, function(images, 17, 5))


# --- 384 to 256 -----------------------------------------------------------------------------------


def published_by_torch(images):
    resized = torch.from_numpy(np.array(by_torch(images, 256, 256)))
    return torch.clamp(127.5 * resized + 128.0, 0, 255).to(torch.uint8).numpy()


def test_384_to_256_equals_torch_wherever_rounding_cannot_decide():
    images = 1.2 * pixels(2, 384, 384, 3)
    got = published_384_to_256(images)
    assert isinstance(got, np.ndarray) and got.dtype == np.uint8 and got.shape == (2, 256, 256, 3)
    wanted = published_by_torch(images)
    exact = 127.5 * by_torch(images.astype(np.float64), 256, 256) + 128
    undecided = np.abs(exact - np.round(exact)) < 1e-4
    assert undecided.mean() < 1e-3
    np.testing.assert_array_equal(got[~undecided], wanted[~undecided])
    assert np.abs(got.astype(int) - wanted).max() <= 1
    assert {0, 255} <= set(np.unique(got))


def test_384_to_256_equals_torch_bit_for_bit_on_images_without_rounding():
    # At 2/3 of the size all coefficients are multiples of 1/256: sums of -1, 0 and 1 are exact.
    images = np.random.default_rng(1).integers(-1, 2, (2, 384, 384, 3)).astype(np.float32)
    np.testing.assert_array_equal(published_384_to_256(images), published_by_torch(images))


@pytest.mark.parametrize(
    "value, byte",
    [
        (-3, 0),
        (-1, 0),
        (-0.995, 1),
        (-0.5, 64),
        (0, 128),
        (0.5, 191),
        (0.99, 254),
        (1, 255),
        (9, 255),
    ],
)
def test_bytes_are_truncated_and_not_rounded(value, byte):
    # 127.5 x + 128: -0.995 gives 1.14, -0.5 gives 64.25, 0.5 gives 191.75, 0.99 gives 254.2.
    images = np.full((1, 384, 384, 3), value, np.float32)
    np.testing.assert_array_equal(np.unique(published_384_to_256(images)), [byte])


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [bilinear_tf1_legacy, bicubic_torch])
@pytest.mark.parametrize(
    "shape, size", [((4, 4, 3), (2, 2)), ((1, 0, 4, 3), (2, 2)), ((1, 4, 4, 3), (0, 2))]
)
def test_shapes_without_pixels_are_refused(function, shape, size):
    with pytest.raises(ValueError, match=f"{function.__name__}"):
        function(np.zeros(shape, np.float32), *size)


def test_bytes_and_other_sizes_are_refused_where_they_would_mean_something_else():
    with pytest.raises(ValueError, match="uint8"):
        bicubic_torch(pixels(1, 4, 4, 3, dtype=np.uint8), 2, 2)
    with pytest.raises(ValueError, match=r"\[N, 384, 384, 3\].*\(1, 256, 256, 3\)"):
        published_384_to_256(pixels(1, 256, 256, 3))
    images = pixels(1, 384, 384, 3)
    images[0, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        published_384_to_256(images)


@pytest.mark.parametrize(("old", "new"), [*SIZES, ((37, 61), (23, 16)), ((5, 9), (64, 3))])
def test_bicubic_as_pillow_has_it(old, new):
    images = pixels(2, *old, 3, dtype=np.uint8)
    images[0] = np.where(images[0] > 127, 255, 0)  # overshoots
    found = jax.jit(lambda x: bicubic_pillow(x, *new))(images)
    want = [np.asarray(Image.fromarray(x).resize(new[::-1], Image.BICUBIC)) for x in images]
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, want)


if __name__ == "__main__":
    write_golden()
