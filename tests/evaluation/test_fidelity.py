"""PSNR and SSIM against scikit-image."""

import jax
import numpy as np
import pytest
import skimage.data
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from tests.helpers.compare import assert_close
from vapi_jax.evaluation.fidelity import psnr, ssim
from vapi_jax.parallel.sharding import make_mesh, shard_whole


def pairs(height=20, width=31, count=3, seed=0):
    """Crops of photographs and the same with noise of several strengths."""
    rng = np.random.default_rng(seed)
    photos = [skimage.data.astronaut(), skimage.data.chelsea(), skimage.data.coffee()]
    clean = np.stack([photos[i % 3][60 : 60 + height, 90 : 90 + width] for i in range(count)])
    strength = np.array([2, 20, 80])[np.arange(count) % 3, None, None, None]
    noisy = np.clip(clean + strength * rng.normal(size=clean.shape), 0, 255).astype(np.uint8)
    return clean, noisy


@pytest.mark.parametrize("height, width", [(7, 7), (8, 7), (20, 31), (64, 64)])
def test_values_equal_scikit_image(height, width):
    a, b = pairs(height, width)
    want = [structural_similarity(x, y, channel_axis=-1) for x, y in zip(a, b, strict=True)]
    assert_close(ssim(a, b), want, 1e-12)
    want = [peak_signal_noise_ratio(x, y) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(psnr(a, b), want, rtol=1e-14)


def test_literal_values():
    black, white = np.zeros((1, 9, 9, 3), np.uint8), np.full((1, 9, 9, 3), 255, np.uint8)
    assert psnr(black, white).tolist() == [0.0]
    assert psnr(black, black + np.uint8(1)) == pytest.approx([48.1308036086791], rel=1e-14)
    # Flat images: only the luminance term is below 1, C1 / (255^2 + C1) = 1 / 10001.
    assert ssim(black, white) == pytest.approx([1 / 10001], rel=1e-12)
    assert ssim(black, white, 510) == pytest.approx([4 / 10004], rel=1e-12)


def test_twice_the_range_is_llamagens_figure():
    """Its script has pixels in [0, 1] and says data_range=2."""
    a, b = pairs(64, 64)
    floats = (x.astype(np.float32) / 255 for x in (a, b))
    want = [
        structural_similarity(x, y, data_range=2.0, channel_axis=-1)
        for x, y in zip(*floats, strict=True)
    ]
    assert_close(ssim(a, b, 510), want, 1e-5)
    assert (ssim(a, b, 510) > ssim(a, b)).all()


def test_equal_images_are_perfect():
    a, _ = pairs()
    assert np.isposinf(psnr(a, a)).all()
    assert_close(ssim(a, a), 1.0, 1e-12)


def test_an_image_whose_squared_errors_exceed_32_bits():
    a, b = np.zeros((1, 300, 300, 3), np.uint8), np.full((1, 300, 300, 3), 255, np.uint8)
    assert 300 * 300 * 3 * 255**2 > 2**31
    assert psnr(a, b).tolist() == [0.0]
    with pytest.raises(ValueError, match="pixels wide"):
        psnr(*np.zeros((2, 1, 1, 11_001, 3), np.uint8))


def test_both_are_symmetric_and_pairs_do_not_mix():
    a, b = pairs()
    assert_close(ssim(a, b), ssim(b, a), 1e-12)
    np.testing.assert_array_equal(psnr(a, b), psnr(b, a))
    assert_close(ssim(a[1:2], b[1:2]), ssim(a, b)[1:2], 1e-12)


def test_eight_devices_give_the_values_of_one():
    a, b = pairs(count=8)
    mesh = make_mesh()
    assert mesh.size == 8 == jax.device_count()
    across = [shard_whole(x, mesh) for x in (a, b)]
    np.testing.assert_array_equal(psnr(*across), psnr(a, b))


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_other_images_are_refused(metric):
    good = np.zeros((1, 8, 8, 3), np.uint8)
    for a, b in [
        (good.astype(np.float32), good),
        (good, good[:, :7]),
        (good[0], good[0]),
        (good[..., :1], good[..., :1]),
    ]:
        with pytest.raises(ValueError, match="uint8"):
            metric(a, b)
    with pytest.raises(ValueError, match="7x7"):
        ssim(good[:, :6], good[:, :6])
