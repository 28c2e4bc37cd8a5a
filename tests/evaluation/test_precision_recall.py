"""Improved precision and recall against a naive oracle in float64."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vapi_jax.evaluation import precision_recall as P
from vapi_jax.evaluation.precision_recall import PrecisionRecall, precision_recall


def oracle(real, generated, k):
    """The definition, from differences of coordinates and one loop per point."""
    real, generated = real.astype(np.float64), generated.astype(np.float64)

    def covered(rows, points):
        others = (np.delete(points, i, axis=0) for i in range(len(points)))
        radii = [
            np.sort(((p - rest) ** 2).sum(axis=1))[k - 1]
            for p, rest in zip(points, others, strict=True)
        ]
        return np.mean([np.any(((row - points) ** 2).sum(axis=1) <= radii) for row in rows])

    return PrecisionRecall(covered(generated, real), covered(real, generated))


def test_literal_example_on_a_line():
    # Real radii with k=1: 1, 1, 2, 6 for the points 0, 1, 3, 9. Generated: 4 lies within 2 of 3; 20 in
    # nobody's ball; their radii are 16 and 16, so 4 covers 0, 1, 3, 9.
    real = np.array([[0.0], [1.0], [3.0], [9.0]])
    assert precision_recall(real, np.array([[4.0], [20.0]]), k=1) == PrecisionRecall(0.5, 1.0)
    # The edge belongs to the ball: 5 is exactly 2 from 3, and 15 exactly 6 from 9.
    assert precision_recall(real, np.array([[5.0], [15.0]]), k=1).precision == 1.0
    assert precision_recall(real, np.array([[-1.001], [15.001]]), k=1).precision == 0.0


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("counts", [(60, 60), (40, 75), (75, 6)])
def test_equals_the_definition(k, counts):
    rng = np.random.default_rng(sum(counts) + k)
    real = rng.normal(size=(counts[0], 6)).astype(np.float32)
    generated = (rng.normal(size=(counts[1], 6)) + 1.0).astype(np.float32)
    found = precision_recall(real, generated, k)
    assert found == oracle(real, generated, k)
    assert 0 < found.precision < 1 or counts[1] == 6


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=24, max_size=24))
def test_duplicates_and_ties_on_a_grid_are_decided_as_by_the_definition(points):
    # Small integers: every distance is exact in float32 as well, so ties have one right answer.
    whole = np.array(points, np.float32)
    # Two points of either sign put the centre of the real set at 0, so that centring is exact too.
    real = np.concatenate([whole[:10], -whole[:10]])
    assert precision_recall(real, whole[10:], 3) == oracle(real, whole[10:], 3)


def test_copies_lie_inside_a_ball_of_radius_zero():
    rng = np.random.default_rng(2)
    points = (100 + rng.normal(size=(5, 64))).astype(np.float32)
    real = np.repeat(points, 4, axis=0)  # three neighbours at distance 0 each
    found = precision_recall(real, np.concatenate([points, points + 1]), 3)
    assert found == PrecisionRecall(0.5, 1.0)
    assert precision_recall(real, real, 3) == PrecisionRecall(1.0, 1.0)


def test_rounding_leaves_no_distance_between_copies_and_none_below_zero():
    points = np.random.default_rng(7).normal(size=(40, 333)).astype(np.float32)
    squared = np.asarray(P._squared_distances(points, points[::-1]))
    assert not np.fliplr(squared).diagonal().any()
    assert squared.min() == 0 and (squared == 0).sum() == 40


def test_a_common_offset_does_not_eat_the_digits():
    # Norms of 1e5 beside distances of about 3: without centring, |a|^2 - 2ab + |b|^2 in float32 is
    # wrong by more than the distances.
    rng = np.random.default_rng(3)
    real, generated = (
        (1e4 + scale * rng.normal(size=(50, 100))).astype(np.float32) for scale in (1.0, 0.98)
    )
    expected = oracle(real, generated, 3)
    assert 0 < expected.precision < 1 and 0 < expected.recall < 1
    assert precision_recall(real, generated, 3) == expected


def test_blocks_of_any_size_give_the_same_answer(monkeypatch):
    rng = np.random.default_rng(4)
    real, generated = rng.normal(size=(2, 33, 5)).astype(np.float32)
    whole = precision_recall(real, generated)
    assert 0 < whole.precision < 1
    for elements in (33, 10 * 33, 32 * 33):
        monkeypatch.setattr(P, "_BLOCK_ELEMENTS", elements)
        assert precision_recall(real, generated) == whole


def test_neither_order_nor_the_roles_matter():
    rng = np.random.default_rng(5)
    real, generated = rng.normal(size=(40, 4)), 0.7 * rng.normal(size=(40, 4))
    one = precision_recall(real, generated)
    mixed = precision_recall(rng.permutation(real), rng.permutation(generated))
    assert mixed == one and one.precision > one.recall
    assert precision_recall(generated, real) == PrecisionRecall(one.recall, one.precision)


def test_sets_far_apart_share_nothing():
    rng = np.random.default_rng(6)
    assert precision_recall(rng.normal(size=(9, 3)), 50 + rng.normal(size=(9, 3))) == (
        PrecisionRecall(0.0, 0.0)
    )


@pytest.mark.parametrize(
    ("real", "generated", "k", "message"),
    [
        (np.zeros((5, 2)), np.zeros((5, 3)), 3, "two sets"),
        (np.zeros((5,)), np.zeros((5,)), 3, "two sets"),
        (np.zeros((3, 2)), np.zeros((5, 2)), 3, "3 real"),
        (np.zeros((5, 2)), np.zeros((3, 2)), 3, "3 generated"),
        (np.zeros((5, 2)), np.zeros((5, 2)), 0, "k=0"),
        (np.full((5, 2), np.inf), np.zeros((5, 2)), 3, "NaN"),
    ],
)
def test_bad_input_is_named(real, generated, k, message):
    with pytest.raises(ValueError, match=message):
        precision_recall(real, generated, k)
