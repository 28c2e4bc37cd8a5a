"""What the tests' own comparisons let pass and what they do not."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.compare import assert_close, assert_close_in_norm


def test_errors_are_shares_of_the_largest_value_or_of_a_scale():
    want = np.array([100.0, 1e-3])
    assert_close(want + 1e-4, want, 1.1e-6)
    assert_close({"a": jnp.asarray([100.0, 1e-3]), "b": 2.0}, {"a": want, "b": 2.0}, 1e-6)
    assert_close(1e-4, 0.0, 1.1e-6, scale=100.0)
    assert_close([0.0, np.inf, np.nan], [1e-9, np.inf, np.nan], 1.1e-6, scale=1e-3)
    assert_close_in_norm(want + 1e-4, want, 1.5e-6)


@pytest.mark.parametrize(
    ("got", "want", "message"),
    [
        ([100.0, 1e-3 + 1e-4], [100.0, 1e-3], "off by 0.0001"),
        ([100.0], [np.nan], "not equal"),
        ([np.inf, 1.0], [100.0, 1.0], "off by inf"),
        ([np.nan, 1.0], [100.0, 1.0], "off by nan"),
        ([1.0, 1.0], [1.0], r"\(2,\).*\(1,\)"),
        ({"a": 1.0, "b": {"c": 2.0}}, {"a": 1.0, "b": {"c": 2.1}}, "b/c is off"),
        (1e-9, 0.0, "off by 1e-09"),
    ],
)
def test_what_is_further_off_is_named(got, want, message):
    with pytest.raises(AssertionError, match=message):
        assert_close(got, want, 1e-7)


def test_zeros_and_missing_leaves_say_nothing_and_do_not_pass():
    with pytest.raises(AssertionError, match="a is zero"):
        assert_close_in_norm({"a": np.zeros(3)}, {"a": np.zeros(3)}, 1.0)
    with pytest.raises(AssertionError, match="off by nan"):
        assert_close_in_norm([np.nan], [1.0], 1.0)
    with pytest.raises(ValueError, match="key"):
        assert_close({"a": 1.0}, {"a": 1.0, "b": 1.0}, 1.0)
