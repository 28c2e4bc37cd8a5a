"""The reward as the sum of its terms."""

import chex
import jax.numpy as jnp
import pytest

from vapi_jax.rewards import RewardSpec, make_terms, total


def test_reward_is_the_weighted_sum():
    values = {"mse": -jnp.array([[1.0, 2.0]]), "lpips": -jnp.array([[0.5, 0.25]])}
    both = make_terms([RewardSpec("mse"), RewardSpec("lpips")])
    chex.assert_trees_all_close(total(values, both), jnp.array([[-1.5, -2.25]]))
    one = make_terms([RewardSpec("lpips", 2.0)])
    chex.assert_trees_all_close(total(values, one), jnp.array([[-1.0, -0.5]]))


def test_a_term_that_was_not_computed():
    with pytest.raises(KeyError, match="gan"):
        total({"mse": jnp.zeros(1)}, make_terms([RewardSpec("mse"), RewardSpec("gan")]))
