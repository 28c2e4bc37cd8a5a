"""Fréchet distance and the features it is taken in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from tests.helpers.compare import assert_close
from vapi_jax.evaluation import features as F
from vapi_jax.evaluation.frechet import (
    FrechetResult,
    frechet,
    frechet_distance,
    gaussian_statistics,
)
from vapi_jax.models.lpips import backbone_features, load_lpips_params


def gaussians(dim=6):
    rng = np.random.default_rng(0)
    roots = rng.normal(size=(2, dim, dim))
    means = rng.normal(size=(2, dim))
    return [(m, r @ r.T) for m, r in zip(means, roots, strict=True)]


def test_closed_form_of_commuting_covariances():
    a, b = np.array([4.0, 9.0, 0.25]), np.array([1.0, 16.0, 0.0])
    rotation = scipy.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0]
    mu = np.array([1.0, -2.0, 0.5])
    got = frechet_distance(mu, rotation * a @ rotation.T, np.zeros(3), rotation * b @ rotation.T)
    assert got == pytest.approx(mu @ mu + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum(), rel=1e-12)


def test_against_matrix_root_symmetry_and_zero():
    (mu1, cov1), (mu2, cov2) = gaussians()
    root = scipy.linalg.sqrtm(cov1 @ cov2).real
    expected = ((mu1 - mu2) ** 2).sum() + np.trace(cov1 + cov2 - 2 * root)
    assert frechet_distance(mu1, cov1, mu2, cov2) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(mu2, cov2, mu1, cov1) == pytest.approx(expected, rel=1e-12)
    assert 0 <= frechet_distance(mu1, cov1, mu1, cov1) < 1e-9
    with pytest.raises(ValueError, match="two means"):
        frechet_distance(mu1, cov1, mu2[:-1], cov2)


def test_same_mean_and_another_scale():
    # C and s^2 C commute: the distance is (s - 1)^2 tr C.
    (mu, cov), _ = gaussians()
    for scale in (0.0, 0.3, 1.0, 5.0):
        got = frechet_distance(mu, cov, mu, scale**2 * cov)
        assert got == pytest.approx((scale - 1) ** 2 * np.trace(cov), rel=1e-12, abs=1e-9)


def test_two_lines_in_the_plane():
    # Rank one each, at an angle of 60 degrees: tr = 4 + 9, cross term 2 * |cos| * 2 * 3 = 6.
    u, v = np.array([1.0, 0.0]), np.array([0.5, np.sqrt(0.75)])
    got = frechet(np.zeros(2), 4 * np.outer(u, u), np.zeros(2), 9 * np.outer(v, v))
    assert got.distance == pytest.approx(13 - 6, rel=1e-12)
    assert got.singular


def test_a_shift_a_rotation_and_the_order_of_samples_change_nothing():
    rng = np.random.default_rng(5)
    a, b = rng.normal(size=(30, 4)), 2 * rng.normal(size=(40, 4)) + 1

    def distance(a, b):
        return frechet_distance(*gaussian_statistics(a), *gaussian_statistics(b))

    whole = distance(a, b)
    rotation = scipy.linalg.qr(rng.normal(size=(4, 4)))[0]
    assert distance(a @ rotation + 7, b @ rotation + 7) == pytest.approx(whole, rel=1e-12)
    assert distance(rng.permutation(a), rng.permutation(b)) == pytest.approx(whole, rel=1e-12)
    assert distance(3 * a, 3 * b) == pytest.approx(9 * whole, rel=1e-12)


def test_singular_covariances_are_reported_and_nothing_is_added_to_them():
    rng = np.random.default_rng(6)
    enough, few = rng.normal(size=(50, 8)), 3 * rng.normal(size=(8, 8))
    full = gaussian_statistics(enough)
    flat = gaussian_statistics(few, allow_singular=True)
    assert frechet(*full, *full).singular is False
    for pair in ((full, flat), (flat, full), (flat, flat)):
        found = frechet(*pair[0], *pair[1])
        assert isinstance(found, FrechetResult) and found.singular
        assert -1e-12 < found.clipped <= 0
        assert found.distance == frechet_distance(*pair[0], *pair[1])
    # The textbook formula, which finds no root without help, comes near with 1e-6 on the diagonals.
    helped = [flat[1] + 1e-6 * np.eye(8), full[1] + 1e-6 * np.eye(8)]
    root = scipy.linalg.sqrtm(helped[0] @ helped[1]).real
    textbook = ((flat[0] - full[0]) ** 2).sum() + np.trace(flat[1] + full[1] - 2 * root)
    assert frechet(*flat, *full).distance == pytest.approx(textbook, rel=1e-3)


def test_values_that_are_not_finite_are_refused():
    (mu, cov), _ = gaussians()
    with pytest.raises(ValueError, match="NaN"):
        frechet(mu, cov, mu, np.where(np.eye(6) > 0, np.nan, cov))


def test_statistics_equal_numpy_and_refuse_bad_samples():
    sample = np.random.default_rng(2).normal(loc=100, size=(20, 4)).astype(np.float32)
    mean, cov = gaussian_statistics(sample)
    assert mean.dtype == cov.dtype == np.float64
    assert_close(mean, sample.astype(np.float64).mean(0), 1e-12)
    assert_close(cov, np.cov(sample.astype(np.float64), rowvar=False, ddof=1), 1e-12)
    with pytest.raises(ValueError, match="at least 5"):
        gaussian_statistics(sample[:4])
    assert gaussian_statistics(sample[:4], allow_singular=True)[1].shape == (4, 4)
    with pytest.raises(ValueError, match="at least 2"):
        gaussian_statistics(sample[:1], allow_singular=True)
    with pytest.raises(ValueError, match="NaN"):
        gaussian_statistics(np.where(sample > 101, np.nan, sample))


def test_singular_covariances():
    (mu, cov), _ = gaussians()
    values, vectors = np.linalg.eigh(cov)
    values[:3] = 0
    flat = vectors * values @ vectors.T
    assert frechet_distance(mu, flat, mu, flat) < 1e-5
    expected = np.trace(flat)
    assert frechet_distance(mu, flat, mu, np.zeros_like(cov)) == pytest.approx(expected)


def test_features_are_what_their_names_say():
    images = jnp.asarray(np.random.default_rng(4).uniform(-1, 1, (1, 32, 32, 3)), jnp.float32)
    vgg, alex = load_lpips_params("vgg"), load_lpips_params("alex")
    maps = jax.jit(lambda p, x: backbone_features(p, x, "vgg"))(vgg, images)[3]
    assert maps.shape == (1, 4, 4, 512)
    got = jax.jit(F.vgg_relu4_3)(vgg, images)
    assert_close(got, maps.mean(axis=(1, 2)), 3e-6)
    enlarged = jax.image.resize(images, (1, 64, 64, 3), "bilinear")
    maps = jax.jit(lambda p, x: backbone_features(p, x, "alex"))(alex, enlarged)[4]
    assert maps.shape == (1, 3, 3, 256)
    got = jax.jit(F.alex_conv5)(alex, images)
    assert_close(got, maps.mean(axis=(1, 2)), 3e-6)
