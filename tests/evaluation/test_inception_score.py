"""Inception Score against its definition."""

import numpy as np
import pytest
import scipy.special
import scipy.stats

from vapi_jax.evaluation.inception_score import SPLIT_SIZE, inception_score, shuffled_order


def definition(logits, split):
    """exp of the mean KL divergence from a split's marginal, through scipy's own entropies."""
    p = scipy.special.softmax(logits.astype(np.float64), axis=1)
    parts = [p[i : i + split] for i in range(0, len(p), split)]
    kl = [[scipy.stats.entropy(row, part.mean(axis=0)) for row in part] for part in parts]
    return [np.exp(np.mean(each)) for each in kl]


def test_score_is_the_mean_over_splits_in_the_order_given():
    logits = np.random.default_rng(0).normal(scale=3, size=(23, 7)).astype(np.float32)
    scores = definition(logits, 10)
    found = inception_score(logits, split_size=10)
    assert len(scores) == found.splits == 3  # the last split takes the three that are left
    assert found.score == pytest.approx(np.mean(scores), rel=1e-12)
    assert found.standard_deviation == pytest.approx(np.std(scores), rel=1e-9)
    assert inception_score(logits).splits == 1 and SPLIT_SIZE == 5000


def test_literal_values():
    # Two classes, certain and balanced: 2. All alike: 1. p = (3/4, 1/4) and its mirror image:
    # the KL is ln 2 - H(1/4), the score 2 / exp(0.5623) = 1.1397535...
    assert inception_score(np.array([[1e4, 0.0], [0.0, 1e4]])).score == 2.0
    assert inception_score(np.full((4, 9), -7.0)).score == pytest.approx(1.0, abs=1e-13)
    three = np.log(3.0)
    score = inception_score(np.array([[three, 0.0], [0.0, three]])).score
    assert score == pytest.approx(1.1397535284773888, rel=1e-13)


def test_probabilities_that_underflow_do_not_spoil_the_score():
    # Class 2 is at exp(-2000) in every sample: 0 in float64, and log 0 would be NaN.
    logits = np.array([[0.0, 1000.0, -1000.0], [1000.0, 0.0, -1000.0]])
    assert inception_score(logits).score == pytest.approx(2.0, rel=1e-13)


def test_a_shift_of_logits_changes_nothing_and_order_matters_only_between_splits():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(12, 5))
    shifted = logits + rng.normal(scale=100, size=(12, 1))
    assert inception_score(shifted).score == pytest.approx(inception_score(logits).score, rel=1e-12)
    swapped = logits[[2, 0, 1, 3, 5, 4, 6, 7, 8, 9, 10, 11]]
    both = [inception_score(x, split_size=6).score for x in (logits, swapped)]
    assert both[0] == pytest.approx(both[1], rel=1e-12)


def test_samples_sorted_by_class_score_too_low_until_they_are_shuffled():
    labels = np.repeat(np.arange(10), 20)
    logits = 50.0 * np.eye(10)[labels]
    assert inception_score(logits, split_size=20).score == pytest.approx(1.0)
    mixed = logits[shuffled_order(200, seed=0)]
    assert inception_score(mixed, split_size=20).score > 5


def test_the_order_of_a_seed_is_pinned():
    assert shuffled_order(8, 0).tolist() == [2, 4, 3, 6, 5, 0, 1, 7]
    assert sorted(shuffled_order(100, 3)) == list(range(100))


@pytest.mark.parametrize(
    ("logits", "split", "message"),
    [
        (np.zeros((3,)), 5, r"shape \[N, C\]"),
        (np.zeros((0, 3)), 5, r"N, C > 0"),
        (np.array([[0.0, np.nan]]), 5, "NaN"),
        (np.zeros((3, 2)), 0, "split_size"),
    ],
)
def test_bad_input_is_named(logits, split, message):
    with pytest.raises(ValueError, match=message):
        inception_score(logits, split)
