"""The corruption kernel: Eq. 28-29 and the reference's variant."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vapi_jax.methods.corruption import corrupt

TOKENS = jax.random.randint(jax.random.key(0), (40_000,), 0, 7)


@pytest.mark.parametrize(("variant", "changed"), [("paper", 1.0), ("full", 6 / 7)])
@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_share_of_changed_tokens(variant, changed, rate):
    noisy = corrupt(jax.random.key(1), TOKENS, rate, 7, variant)
    share = float((noisy != TOKENS).mean())
    expected = rate * changed
    sigma = np.sqrt(expected * (1 - expected) / TOKENS.size)
    assert abs(share - expected) <= 5 * sigma


def test_replacements_are_uniform_without_the_true_token():
    """Chi-square of K_ξ(. | x*) against Eq. 29, for every true token."""
    noisy = np.asarray(corrupt(jax.random.key(2), TOKENS, 1.0, 7, "paper"))
    true = np.asarray(TOKENS)
    for token in range(7):
        counts = np.bincount(noisy[true == token], minlength=7)
        assert counts[token] == 0
        others = np.delete(counts, token)
        expected = others.sum() / 6
        chi2 = ((others - expected) ** 2 / expected).sum()
        assert chi2 < 25.7  # 99.99 % quantile, 5 degrees of freedom


def test_more_noise_keeps_the_noise_that_was_there():
    low = corrupt(jax.random.key(3), TOKENS, 0.2, 7)
    high = corrupt(jax.random.key(3), TOKENS, 0.6, 7)
    changed = low != TOKENS
    assert changed.any()
    np.testing.assert_array_equal(high[changed], low[changed])


def test_shape_dtype_and_range():
    tokens = jnp.arange(12, dtype=jnp.int32).reshape(3, 4) % 5
    noisy = corrupt(jax.random.key(4), tokens, 1.0, 5)
    assert noisy.shape == tokens.shape
    assert noisy.dtype == jnp.int32
    assert int(noisy.min()) >= 0
    assert int(noisy.max()) < 5


def test_refuses_what_cannot_be():
    with pytest.raises(ValueError, match="choose one of"):
        corrupt(jax.random.key(0), TOKENS, 0.5, 7, "gaussian")
    with pytest.raises(ValueError, match="no other token"):
        corrupt(jax.random.key(0), jnp.zeros(3, jnp.int32), 0.5, 1)
