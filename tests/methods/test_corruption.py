"""The corruption kernel: Eq. 28-29 and the reference's variant, compiled and as it stands."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from vapi_jax.methods.corruption import VARIANTS, corrupt

CODES = 7
TOKENS = jax.random.randint(jax.random.key(0), (40_000,), 0, CODES)


def draw_tokens(seed, codes):
    return jax.random.randint(jax.random.key(seed), (3, 4), 0, codes)


class CorruptionTest(chex.TestCase):
    def corrupt(self, seed, tokens, rate, codes=CODES, kind="paper"):
        run = self.variant(corrupt, static_argnums=(3, 4))
        return run(jax.random.key(seed), tokens, rate, codes, kind)

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.product(kind=VARIANTS, rate=(0.0, 0.3, 1.0))
    def test_share_of_changed_tokens(self, kind, rate):
        """ξ, and ξ (1 - 1/K) where the true token may be drawn again."""
        noisy = self.corrupt(1, TOKENS, rate, CODES, kind)
        expected = rate * (1.0 if kind == "paper" else 1 - 1 / CODES)
        changed = int((noisy != TOKENS).sum())
        assert stats.binomtest(changed, TOKENS.size, expected).pvalue > 1e-4

    @chex.variants(with_jit=True, without_jit=True)
    def test_replacements_are_uniform_without_the_true_token(self):
        """Chi-square of K_ξ(. | x*) against Eq. 29, for every true token."""
        noisy, true = np.asarray(self.corrupt(2, TOKENS, 1.0)), np.asarray(TOKENS)
        for token in range(CODES):
            counts = np.bincount(noisy[true == token], minlength=CODES)
            assert counts[token] == 0
            assert stats.chisquare(np.delete(counts, token)).pvalue > 1e-4

    @chex.variants(with_jit=True, without_jit=True)
    @settings(max_examples=25)
    @given(
        st.integers(0, 2**31),
        st.sampled_from([2, 3, 16384]),
        st.sampled_from(VARIANTS),
        st.floats(0, 1, width=32),
        st.floats(0, 1, width=32),
    )
    def test_tokens_stay_tokens_and_more_noise_keeps_the_noise_that_was_there(
        self, seed, codes, kind, rate, other
    ):
        tokens = draw_tokens(seed, codes)
        low = self.corrupt(seed, tokens, min(rate, other), codes, kind)
        high = self.corrupt(seed, tokens, max(rate, other), codes, kind)
        chex.assert_shape([low, high], tokens.shape)
        chex.assert_type([low, high], tokens.dtype)
        assert int(low.min()) >= 0 and int(low.max()) < codes
        changed = low != tokens
        chex.assert_trees_all_equal(high[changed], low[changed])

    @chex.variants(with_jit=True, without_jit=True)
    @settings(max_examples=25)
    @given(st.integers(0, 2**31), st.sampled_from([2, 5, 16384]))
    def test_no_noise_is_the_identity_and_all_noise_leaves_no_true_token(self, seed, codes):
        tokens = draw_tokens(seed, codes)
        for kind in VARIANTS:
            chex.assert_trees_all_equal(self.corrupt(seed, tokens, 0.0, codes, kind), tokens)
        assert (self.corrupt(seed, tokens, 1.0, codes) != tokens).all()

    @chex.variants(with_jit=True, without_jit=True)
    def test_the_key_decides_all(self):
        first, again, other = (self.corrupt(seed, TOKENS, 0.5) for seed in (3, 3, 4))
        chex.assert_trees_all_equal(first, again)
        # Other places and other tokens: two draws of a rate of 1/2 agree in 1/4 + 1/4 · 1/6.
        share = float((first == other).mean())
        assert abs(share - (1 / 4 + 1 / 24)) < 0.02


def test_refuses_what_cannot_be():
    with pytest.raises(ValueError, match="'gaussian'.*paper.*full"):
        corrupt(jax.random.key(0), TOKENS, 0.5, CODES, "gaussian")
    with pytest.raises(ValueError, match="vocab_size=1"):
        corrupt(jax.random.key(0), jnp.zeros(3, jnp.int32), 0.5, 1)
