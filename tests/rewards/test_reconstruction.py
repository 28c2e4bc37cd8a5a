"""The reward's terms as pure functions."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vapi_jax.rewards import RewardSpec, make_terms, total
from vapi_jax.rewards import reconstruction as reward

SAMPLES = jax.random.uniform(jax.random.key(0), (2, 3, 4, 4, 3), minval=-1, maxval=1)
TARGET = jax.random.uniform(jax.random.key(1), (2, 1, 4, 4, 3), minval=-1, maxval=1)


def test_terms_by_numpy():
    samples, target = np.asarray(SAMPLES), np.asarray(TARGET)
    squares = (samples - target) ** 2
    chex.assert_trees_all_close(reward.mse(SAMPLES, TARGET), squares.mean((2, 3, 4)), rtol=1e-6)
    chex.assert_trees_all_close(
        reward.mse(SAMPLES, TARGET, "sum"), squares.sum((2, 3, 4)), rtol=1e-6
    )
    chex.assert_trees_all_close(
        reward.l1(SAMPLES, TARGET), np.abs(samples - target).mean((2, 3, 4)), rtol=1e-6
    )


def test_terms_vanish_on_the_image_itself():
    assert np.all(np.asarray(reward.mse(TARGET, TARGET)) == 0.0)
    assert np.all(np.asarray(reward.l1(TARGET, TARGET)) == 0.0)
    codes = jax.random.normal(jax.random.key(2), (2, 1, 16, 8))
    np.testing.assert_allclose(reward.codebook_cosine(codes, 3 * codes), 0.0, atol=1e-6)
    np.testing.assert_allclose(reward.codebook_cosine(codes, -codes), 2.0, atol=1e-6)


def test_reward_is_the_weighted_sum():
    values = {"mse": -jnp.array([[1.0, 2.0]]), "lpips": -jnp.array([[0.5, 0.25]])}
    both = make_terms([RewardSpec("mse"), RewardSpec("lpips")])
    chex.assert_trees_all_close(total(values, both), jnp.array([[-1.5, -2.25]]))
    one = make_terms([RewardSpec("lpips", 2.0)])
    chex.assert_trees_all_close(total(values, one), jnp.array([[-1.0, -0.5]]))


def test_a_term_that_was_not_computed():
    with pytest.raises(KeyError, match="gan"):
        total({"mse": jnp.zeros(1)}, make_terms([RewardSpec("mse"), RewardSpec("gan")]))


def test_unknown_reduction():
    with pytest.raises(ValueError, match="mean"):
        reward.mse(SAMPLES, TARGET, "median")
