"""The terms of the reconstruction reward as pure functions, compiled and as they stand."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from vapi_jax.rewards import reconstruction as terms

BOTH = {"with_jit": True, "without_jit": True}
B, G, SIDE, TOKENS, WIDTH = 2, 3, 4, 5, 6
PIXELS = (2, 3, 4)


def floats(low, high, *shape):
    return arrays(np.float32, shape, elements=st.floats(low, high, width=32))


SAMPLES = floats(-1, 1, B, G, SIDE, SIDE, 3)
TARGET = floats(-1, 1, B, 1, SIDE, SIDE, 3)


class PixelsTest(chex.TestCase):
    @chex.variants(**BOTH)
    @settings(max_examples=30)
    @given(SAMPLES, TARGET)
    def test_mse_and_l1_are_those_of_numpy(self, samples, target):
        mse, l1 = self.variant(terms.mse, static_argnums=2), self.variant(terms.l1)
        difference = np.float64(samples) - target
        for got, want in (
            (mse(samples, target), np.square(difference).mean(PIXELS)),
            (mse(samples, target, "sum"), np.square(difference).sum(PIXELS)),
            (l1(samples, target), np.abs(difference).mean(PIXELS)),
        ):
            chex.assert_shape(got, (B, G))
            chex.assert_type(got, jnp.float32)
            # 48 terms: each addition may round by 6e-8 of the sum.
            np.testing.assert_allclose(got, want, rtol=4e-6, atol=1e-12)

    @chex.variants(**BOTH)
    @settings(max_examples=20)
    @given(TARGET)
    def test_both_vanish_on_the_image_itself_alone(self, target):
        group = np.repeat(target, G, axis=1)
        group[:, -1] += 0.5
        for term, want in ((terms.mse, 0.25), (terms.l1, 0.5)):
            got = self.variant(term)(group, target)
            chex.assert_trees_all_equal(got[:, :-1], jnp.zeros((B, G - 1)))
            chex.assert_trees_all_close(got[:, -1], jnp.full(B, want), rtol=1e-6)

    @chex.variants(**BOTH)
    def test_samples_in_bfloat16_are_compared_in_float32(self):
        samples = jnp.linspace(-1, 1, B * G * SIDE * SIDE * 3).reshape(B, G, SIDE, SIDE, 3)
        samples, target = samples.astype(jnp.bfloat16), jnp.zeros((B, 1, SIDE, SIDE, 3))
        for term in (terms.mse, terms.l1):
            got = self.variant(term)(samples, target)
            chex.assert_type(got, jnp.float32)
            want = self.variant(term)(samples.astype(jnp.float32), target)
            chex.assert_trees_all_close(got, want, rtol=1e-6)


class CodesTest(chex.TestCase):
    @chex.variants(**BOTH)
    @settings(max_examples=30)
    @given(
        floats(-1, 1, B, G, TOKENS, WIDTH),
        floats(-4, 4, B, 1, TOKENS, WIDTH),
        st.floats(0.125, 8, width=32),
    )
    def test_cosine_by_numpy_in_its_range_and_of_any_length(self, codes, latents, scale):
        codes[..., 0, 0], latents[..., 0, 0] = 1.0, 2.0  # no vector is zero
        cosine = self.variant(terms.codebook_cosine)
        got = cosine(codes, latents)
        chex.assert_shape(got, (B, G))
        chex.assert_type(got, jnp.float32)
        a, b = np.float64(codes), np.float64(latents)
        lengths = np.linalg.norm(a, axis=(-2, -1)) * np.linalg.norm(b, axis=(-2, -1))
        want = 1 - (a * b).sum((-2, -1)) / lengths
        for found in (got, cosine(scale * codes, latents), cosine(codes, scale * latents)):
            np.testing.assert_allclose(found, want, rtol=0, atol=3e-6)  # of a cosine, so of 1

    @chex.variants(**BOTH)
    def test_cosine_of_parallel_and_opposite_codes_and_of_none(self):
        codes = jnp.arange(1.0, 13.0).reshape(1, 1, 4, 3)
        cosine = self.variant(terms.codebook_cosine)
        for other, want in ((3 * codes, 0.0), (-codes, 2.0), (0 * codes, 1.0)):
            np.testing.assert_allclose(cosine(codes, other), want, rtol=0, atol=1e-6)


class LogitsTest(chex.TestCase):
    @chex.variants(**BOTH)
    @parameterized.parameters(jnp.float32, jnp.bfloat16)
    def test_gan_is_minus_the_mean_logit(self, dtype):
        logits = jnp.asarray(np.random.default_rng(0).normal(size=(B, G, 3, 3, 1)), dtype)
        got = self.variant(terms.gan)(logits)
        chex.assert_shape(got, (B, G))
        chex.assert_type(got, jnp.float32)
        want = -np.asarray(logits, np.float64).mean(PIXELS)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


def test_unknown_reduction():
    with pytest.raises(ValueError, match="'median'.*'mean'.*'sum'"):
        terms.mse(jnp.zeros((1, 1, 2, 2, 3)), jnp.zeros((1, 1, 2, 2, 3)), "median")
