import math

import numpy as np
import pytest
from scipy import stats

from vapi_jax.study.statistics import detectable, holm, paired


def test_paired_differences_are_those_of_scipy():
    a, b = [3.1, 2.7, 3.5, 2.2], [2.9, 2.1, 3.6, 1.4]
    got = paired(a, b)
    want = stats.ttest_rel(a, b)
    low, high = want.confidence_interval(0.95)
    assert got.mean == pytest.approx(0.375)
    assert got.p == pytest.approx(want.pvalue, rel=1e-12)
    assert (got.mean - got.margin, got.mean + got.margin) == pytest.approx((low, high), rel=1e-12)
    assert got.n == 4


def test_one_pair_says_a_difference_and_no_more():
    got = paired([2.0], [1.5])
    assert (got.mean, got.sd, got.margin, got.p) == (0.5, None, None, None)


@pytest.mark.parametrize(
    ("a", "b", "mean"),
    [([2.0, 3.0], [1.0, 2.0], 1.0), ([0.3, 0.4, 0.5, 0.6], [0.2, 0.3, 0.4, 0.5], 0.1)],
)
def test_differences_that_are_equal_but_for_rounding_have_no_p_value(a, b, mean):
    got = paired(a, b)
    assert (got.sd, got.margin, got.p) == (0.0, 0.0, None)
    assert got.mean == pytest.approx(mean)


@pytest.mark.parametrize("pair", [([1.0], []), ([], [])])
def test_what_makes_no_pairs_is_refused(pair):
    with pytest.raises(ValueError, match="pairs"):
        paired(*pair)


def test_holm_by_hand():
    # 0.01 * 4, 0.02 * 3, 0.03 * 2 (not below the one before), 0.9 * 1
    got = holm({"a": 0.03, "b": 0.01, "c": 0.9, "d": 0.02})
    assert got == pytest.approx({"a": 0.06, "b": 0.04, "c": 0.9, "d": 0.06})
    assert list(got) == ["a", "b", "c", "d"]
    assert holm({}) == {}
    assert holm({"a": 0.7, "b": 0.8}) == {"a": 1.0, "b": 1.0}


def test_holm_keeps_the_rate_of_false_alarms_of_a_family():
    rng = np.random.default_rng(0)
    alarms = [min(holm(dict(enumerate(rng.uniform(size=6)))).values()) < 0.05 for _ in range(4000)]
    assert 0.035 < np.mean(alarms) < 0.065


@pytest.mark.parametrize(("n", "level"), [(4, 0.05), (12, 0.05), (4, 0.01), (3, 0.05)])
def test_a_detectable_difference_is_found_in_four_of_five_trials(n, level):
    rng = np.random.default_rng(n)
    effect = detectable(2.0, n, level)
    trials = rng.normal(effect, 2.0, size=(4000, n))
    found = np.mean([paired(trial, np.zeros(n)).p < level for trial in trials])
    assert found == pytest.approx(0.8, abs=0.025)
    assert detectable(2.0, 1) == math.inf
