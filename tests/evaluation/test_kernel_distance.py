"""The kernel distance against loops over its definition."""

import itertools

import numpy as np
import pytest

from vapi_jax.evaluation import kernel_distance as K
from vapi_jax.evaluation.kernel_distance import kernel_distance, unbiased_mmd2


def loops(x, y):
    """MMD^2 from three double loops over pairs, each kernel value from a loop over coordinates."""

    def kernel(a, b):
        dot = 0.0
        for u, v in zip(a, b, strict=True):
            dot += float(u) * float(v)
        return (dot / len(a) + 1) ** 3

    within = [np.mean([kernel(a, b) for a, b in itertools.permutations(s, 2)]) for s in (x, y)]
    return sum(within) - 2 * np.mean([kernel(a, b) for a in x for b in y])


def sets(m, n, dim=5, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(m, dim)), 1.2 * rng.normal(size=(n, dim)) + 0.3


@pytest.mark.parametrize("m, n", [(7, 7), (4, 9), (2, 3)])
def test_whole_sets_equal_the_loops(m, n):
    x, y = sets(m, n)
    found = kernel_distance(x, y)
    assert found.distance == pytest.approx(loops(x, y), rel=1e-12)
    assert (found.method, found.subsets, found.subset_size) == ("jackknife", 1, 0)


def test_literal_value():
    # k = (xy + 1)^3 on a line. x = 0, 1: k = 1. y = 1, 2: k = 27. Cross: 1, 1, 8, 27, mean 9.25.
    x, y = np.array([[0.0], [1.0]]), np.array([[1.0], [2.0]])
    assert kernel_distance(x, y).distance == pytest.approx(1 + 27 - 2 * 9.25, rel=1e-13)


@pytest.mark.parametrize("m, n", [(6, 6), (3, 8)])
def test_jackknife_error_equals_leaving_points_out_one_by_one(m, n):
    x, y = sets(m, n, seed=1)
    variance = 0.0
    for estimates in (
        [loops(np.delete(x, i, 0), y) for i in range(m)],
        [loops(x, np.delete(y, j, 0)) for j in range(n)],
    ):
        count = len(estimates)
        variance += (count - 1) / count * np.square(estimates - np.mean(estimates)).sum()
    assert unbiased_mmd2(x, y)[1] == pytest.approx(np.sqrt(variance), rel=1e-9)


def test_jackknife_error_is_the_spread_of_repeated_estimates():
    found = np.array([unbiased_mmd2(*sets(40, 40, seed=seed)) for seed in range(200)])
    assert np.sqrt(np.mean(found[:, 1] ** 2)) == pytest.approx(found[:, 0].std(), rel=0.25)


def test_the_estimate_is_unbiased_for_small_sets():
    rng = np.random.default_rng(3)
    found = [unbiased_mmd2(*rng.normal(size=(2, 5, 4)))[0] for _ in range(3000)]
    error = np.std(found) / np.sqrt(len(found))
    assert abs(np.mean(found)) < 4 * error
    # Some estimates are below zero, and none is clipped.
    assert min(found) < -error


def test_subsets_equal_the_definition_on_the_draws_of_the_seed():
    x, y = sets(30, 26)
    found = kernel_distance(x, y, subsets=4, subset_size=6, seed=9)
    rng = np.random.default_rng(9)
    values = []
    for _ in range(4):
        chosen = [side[rng.choice(len(side), 6, replace=False)] for side in (x, y)]
        values.append(loops(*chosen))
    assert found.distance == pytest.approx(np.mean(values), rel=1e-12)
    variance = np.var(values, ddof=1) * (6 / (26 - 6) + 1 / 4)
    assert found.standard_error == pytest.approx(np.sqrt(variance), rel=1e-9)
    assert (found.method, found.subsets, found.subset_size) == ("subsets", 4, 6)
    assert kernel_distance(x, y, subsets=4, subset_size=6, seed=9) == found
    assert kernel_distance(x, y, subsets=4, subset_size=6, seed=10) != found


@pytest.mark.parametrize("size", [40, 60, 76])
def test_the_error_of_subsets_is_that_of_other_images_however_much_subsets_overlap(size):
    """Against what 400 fresh pairs of sets scatter; the spread over the root falls to nothing."""
    rng = np.random.default_rng(1)

    def fresh():
        return rng.normal(size=(80, 4)), 1.2 * rng.normal(size=(80, 4)) + 0.8

    scatter = np.std([unbiased_mmd2(*fresh())[0] for _ in range(400)])
    found = [kernel_distance(*fresh(), subsets=60, subset_size=size) for _ in range(40)]
    errors = [one.standard_error for one in found]
    assert np.median(errors) == pytest.approx(scatter, rel=0.25)


def test_a_set_as_small_as_a_subset_is_taken_whole():
    x, y = sets(6, 26)
    found = kernel_distance(x, y, subset_size=6)
    assert found.method == "jackknife" and found.distance == pytest.approx(loops(x, y), rel=1e-12)


def test_blocks_of_rows_and_order_change_nothing(monkeypatch):
    x, y = sets(23, 19)
    whole = unbiased_mmd2(x, y)
    monkeypatch.setattr(K, "_BLOCK_ROWS", 5)
    assert unbiased_mmd2(x, y) == pytest.approx(whole, rel=1e-12)
    rng = np.random.default_rng(0)
    mixed = unbiased_mmd2(rng.permutation(x), rng.permutation(y))
    assert mixed == pytest.approx(whole, rel=1e-12)
    assert unbiased_mmd2(y, x) == pytest.approx(whole, rel=1e-12)


def test_float32_features_are_summed_in_float64():
    x, y = (side.astype(np.float32) + 100 for side in sets(12, 12))
    expected = loops(x, y)
    assert kernel_distance(x, y).distance == pytest.approx(expected, rel=1e-7)


def test_progress_counts_subsets():
    seen = []
    kernel_distance(*sets(9, 9), subsets=3, subset_size=4, progress=seen.append)
    assert seen == [1, 2, 3]


@pytest.mark.parametrize(
    ("x", "y", "options", "message"),
    [
        (np.zeros((5, 2)), np.zeros((5, 3)), {}, "two sets"),
        (np.zeros((5, 0)), np.zeros((5, 0)), {}, "two sets"),
        (np.zeros((1, 2)), np.zeros((5, 2)), {}, "1 and 5"),
        (np.zeros((5, 2)), np.zeros((5, 2)), {"subset_size": 1}, "subset_size 1"),
        (np.zeros((5, 2)), np.zeros((5, 2)), {"subsets": 1}, "subsets 1"),
        (np.full((5, 2), np.nan), np.zeros((5, 2)), {}, "NaN"),
    ],
)
def test_bad_input_is_named(x, y, options, message):
    with pytest.raises(ValueError, match=message):
        kernel_distance(x, y, **options)
