"""Planes of embeddings: known geometry, oracles for components and densities, degenerate sets."""

import numpy as np
import pytest
from scipy.stats import gaussian_kde

from tests.helpers.compare import assert_close
from tests.helpers.toy_features import blobs
from vapi_jax.evaluation import embeddings
from vapi_jax.evaluation.embeddings import (
    SHARES,
    density_plane,
    planes_of,
    principal_plane,
    regions,
    tsne_plane,
)

BOX = (-6.0, 6.0, -6.0, 6.0)


def area(line):
    x, y = line.T
    return 0.5 * abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1)))


def test_the_plane_is_that_of_the_largest_variances():
    rng = np.random.default_rng(1)
    scales = np.array([0.1, 5.0, 0.1, 2.0])
    real = rng.normal(size=(4000, 4)) * scales
    shifted = real + np.array([9.0, 0.0, 9.0, 0.0])
    points, share = principal_plane({"real": real, "other": shifted}, "real")
    assert abs(np.corrcoef(points["real"][:, 0], real[:, 1])[0, 1]) > 0.999
    assert abs(np.corrcoef(points["real"][:, 1], real[:, 3])[0, 1]) > 0.999
    variances = real.var(axis=0)
    assert share == pytest.approx((variances[1] + variances[3]) / variances.sum(), rel=1e-3)
    # A shift across the plane shows nowhere in it: this is what the note warns of.
    assert np.abs(points["other"] - points["real"]).max() < 1.0


def test_the_components_are_those_of_the_singular_value_decomposition():
    sets = blobs()
    points, _ = principal_plane(sets, "real")
    mean = sets["real"].astype(np.float64).mean(axis=0)
    axes = np.linalg.svd(sets["real"] - mean, full_matrices=False)[2][:2]
    for name, rows in sets.items():
        want = (rows - mean) @ axes.T
        assert_close(np.abs(points[name]), np.abs(want), 1e-9)


def test_a_region_of_a_normal_distribution_has_the_area_of_its_ellipse():
    """P(|x| < r) = 1 - exp(-r^2 / 2) in the plane, and Scott's bandwidth widens by h = n^(-1/6)."""
    points = np.random.default_rng(2).normal(size=(8000, 2))
    found = regions(points, BOX)
    assert len(found) == len(SHARES)
    widened = 1.0 + 8000 ** (-1 / 3)
    for share, lines in zip(SHARES, found, strict=True):
        largest = max(lines, key=area)
        want = np.pi * -2.0 * np.log(1.0 - share) * widened
        assert area(largest) == pytest.approx(want, rel=0.08)
        assert np.array_equal(largest[0], largest[-1])


def test_an_outline_lies_on_one_height_of_scipys_estimate():
    points = np.random.default_rng(3).normal(size=(500, 2)) * [2.0, 0.5] + [1.0, -1.0]
    estimate = gaussian_kde(points.T)
    heights = estimate(points.T)
    for share, lines in zip(SHARES, regions(points, BOX), strict=True):
        on_line = estimate(np.concatenate(lines).T)
        level = np.quantile(heights, 1.0 - share)
        np.testing.assert_allclose(on_line, level, rtol=0.05)
        assert np.mean(heights >= level) == pytest.approx(share, abs=0.01)


def test_two_clouds_of_one_set_have_two_outlines_and_a_ring_has_a_hole():
    rng = np.random.default_rng(4)
    two = np.concatenate([rng.normal(size=(300, 2)) * 0.4 + 3.0 * s for s in (-1, 1)])
    assert len(regions(two, BOX)[1]) == 2
    angle = np.linspace(0, 2 * np.pi, 2000, endpoint=False)
    ring = 4.0 * np.stack([np.cos(angle), np.sin(angle)], 1) + 0.1 * rng.normal(size=(2000, 2))
    outer, inner = sorted(regions(ring, BOX)[0], key=area, reverse=True)
    assert area(inner) > 5.0 and np.hypot(*inner.T).max() < np.hypot(*outer.T).min()


def test_a_region_that_the_limits_cut_is_closed_there():
    points = np.random.default_rng(5).normal(size=(200, 2))
    lines = regions(points, (0.0, 3.0, -3.0, 3.0))[0]
    assert all(np.array_equal(line[0], line[-1]) for line in lines)
    assert min(line[:, 0].min() for line in lines) > -0.06


@pytest.mark.parametrize(
    "points",
    [np.zeros((50, 2)), np.linspace(0, 1, 50)[:, None] * [1.0, 2.0], np.eye(3, 2)],
    ids=["one place", "a line", "three points"],
)
def test_points_without_extent_have_no_density(points):
    assert regions(points, BOX) == ()


def test_blobs_keep_their_order_and_their_places():
    density, tsne = planes_of(blobs(), "pixels", "some feature")
    assert (density.name, tsne.name) == ("density_pixels", "tsne_pixels")
    for plane in (density, tsne):
        assert "some feature" in plane.title
        assert [cloud.label for cloud in plane.clouds] == ["real", "base", "after"]
        every = np.concatenate([cloud.points for cloud in plane.clouds])
        x0, x1, y0, y1 = plane.limits
        assert x0 < every[:, 0].min() and every[:, 0].max() < x1
        assert y0 < every[:, 1].min() and every[:, 1].max() < y1
    assert all(len(cloud.regions) == 2 for cloud in density.clouds)
    # In t-SNE's layout every point is nearest to the middle of its own blob.
    middles = np.stack([cloud.points.mean(axis=0) for cloud in tsne.clouds])
    for index, cloud in enumerate(tsne.clouds):
        distances = np.linalg.norm(cloud.points[:, None] - middles, axis=-1)
        assert (distances.argmin(axis=1) == index).all()
    assert "distances between clusters" in tsne.note


def test_the_same_features_give_the_same_picture():
    for make in (density_plane, tsne_plane):
        first, again = (make(blobs(30), "a", "b") for _ in range(2))
        assert first.limits == again.limits
        for one, other in zip(first.clouds, again.clouds, strict=True):
            np.testing.assert_array_equal(one.points, other.points)


def test_tsne_takes_the_first_points_of_each_set(monkeypatch):
    monkeypatch.setattr(embeddings, "TSNE_POINTS", 12)
    given = []
    monkeypatch.setattr(embeddings, "_tsne", lambda rows: given.append(rows) or rows[:, :2])
    sets = blobs(40)
    tsne_plane(sets, "a", "b")
    np.testing.assert_array_equal(given[0], np.concatenate([s[:12] for s in sets.values()]))


@pytest.mark.parametrize(
    "sets",
    [
        {name: np.ones((20, 6)) for name in ("real", "base", "after")},
        {"real": np.ones((20, 6)), "base": np.ones((20, 6)), "after": 2.0 * np.ones((20, 6))},
        {"real": np.eye(2, 6), "base": np.eye(2, 6)},
        {"real": np.eye(3, 2)},
        {"real": 1e-20 * np.eye(8, 4), "base": 1e-20 * np.eye(8, 4)},
    ],
    ids=["all the same", "two places", "two points a set", "one set of three", "tiny numbers"],
)
@pytest.mark.filterwarnings("error")
def test_sets_of_hardly_any_points_become_finite_pictures(sets):
    for plane in planes_of(sets, "a", "b"):
        x0, x1, y0, y1 = plane.limits
        assert np.isfinite(plane.limits).all() and x0 < x1 and y0 < y1
        assert all(np.isfinite(cloud.points).all() for cloud in plane.clouds)
        assert "nan" not in plane.note


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ({}, "1 to 3 sets"),
        ({name: np.eye(4) for name in "abcd"}, "1 to 3 sets"),
        ({"a": np.eye(4), "b": np.eye(5)}, "of one width"),
        ({"a": np.eye(4)[:1]}, "of one width are needed"),
        ({"a": np.ones(4)}, "of one width are needed"),
        ({"a": np.eye(4), "b": np.full((4, 4), np.nan)}, "'b'.*NaN"),
    ],
)
def test_sets_that_cannot_be_drawn_are_named(sets, message):
    for make in (density_plane, tsne_plane):
        with pytest.raises(ValueError, match=message):
            make(sets, "a", "b")
