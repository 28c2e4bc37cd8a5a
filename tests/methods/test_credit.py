"""Spatial credit and the energy score: their parts against plain loops, their gradients by enumeration."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.compare import assert_close
from vapi_jax.methods import credit
from vapi_jax.models.lpips import load_lpips_params
from vapi_jax.rewards.pairs import pooling
from vapi_jax.rewards.reconstruction import LPIPS, MSE


def test_pooling_keeps_the_mean_and_everything_in_its_place():
    for side, cells in ((8, 4), (2, 4), (7, 4), (31, 8), (4, 1)):
        shares = pooling(side, cells)
        np.testing.assert_allclose(shares.sum(axis=1), 1.0, rtol=1e-6)
        np.testing.assert_allclose(shares.sum(axis=0), cells / side, rtol=1e-5)
    np.testing.assert_allclose(pooling(4, 2), [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]])
    np.testing.assert_allclose(pooling(1, 2), [[1.0], [1.0]])
    np.testing.assert_allclose(pooling(3, 2), [[2 / 3, 1 / 3, 0], [0, 1 / 3, 2 / 3]], rtol=1e-6)


@pytest.mark.parametrize(
    "reward", [MSE(), MSE("sum"), LPIPS(net="alex")], ids=["mse", "sum", "lpips"]
)
def test_inner_products_hold_the_reward_and_the_distances_of_samples(reward):
    weights = load_lpips_params("alex") if isinstance(reward, LPIPS) else {}
    rng = np.random.default_rng(0)
    image = jnp.asarray(rng.uniform(-1, 1, (1, 31, 31, 3)), jnp.float32)
    pixels = jnp.asarray(rng.uniform(-1, 1, (1, 3, 31, 31, 3)), jnp.float32)

    @jax.jit
    def found(pixels, image):
        says = functools.partial(reward, weights, pixels)
        # Of the image, and of one sample when another is the image.
        told = says({"image": image}), -says({"image": pixels[:, 1]})
        return reward.inner(weights, pixels, {"image": image}, 4), *told

    inner, want, between = found(pixels, image)
    assert inner.shape == (1, 3, 3, 16)
    assert_close(-credit.losses(inner).mean(-1), want, 1e-5)
    whole = inner.mean(-1)
    squares = whole[:, 0, 0] + whole[:, 1, 1] - 2 * whole[:, 0, 1]
    assert_close(squares, between[:, 0], 1e-4)


def test_a_change_in_one_cell_is_that_cell_s_alone():
    image = jnp.zeros((1, 8, 8, 3))
    pixels = jnp.zeros((1, 2, 8, 8, 3)).at[0, 1, 2:4, 4:6].set(0.5)
    found = credit.losses(MSE().inner({}, pixels, {"image": image}, 4))
    want = np.zeros((2, 16))
    want[1, 4 * 1 + 2] = 0.25
    np.testing.assert_allclose(found[0], want, atol=1e-7)


# Points of a plane that a token may decode to, and the image.
POINTS = np.array([[0.0, 0.0], [1.0, 0.2], [-0.4, 0.9]])
TRUTH = np.array([0.2, 0.1])
LOGITS = jnp.array([0.3, -0.5, 0.1])


def inner_of(tokens):
    away = POINTS[list(tokens)] - TRUTH
    return jnp.asarray(away @ away.T, jnp.float32)[None, :, :, None]


def energy_score(logits):
    p = jax.nn.softmax(logits)
    apart = jnp.asarray(np.linalg.norm(POINTS[:, None] - POINTS, axis=-1))
    return p @ np.linalg.norm(POINTS - TRUTH, axis=-1) - 0.5 * p @ apart @ p


def expected_gradient(signal, group):
    """E Σ_g signal_g ∇ log π(y_g) / G over all groups of draws, each weighted by its probability."""
    logps = np.asarray(jax.nn.log_softmax(LOGITS))
    score = np.eye(3) - np.exp(logps)  # ∇ log π(y)
    total = np.zeros(3)
    for tokens in itertools.product(range(3), repeat=group):
        weight = np.exp(sum(logps[y] for y in tokens))
        total += (
            weight * np.asarray(signal(inner_of(tokens)))[0, :, 0] @ score[list(tokens)] / group
        )
    return total


def test_the_gradient_is_the_energy_score_s():
    want = -np.asarray(jax.grad(energy_score)(LOGITS))
    assert_close(expected_gradient(credit.energy_rewards, 3), want, 1e-5)

    def with_baseline(inner):
        found = credit.energy_rewards(inner, baseline=True)
        return found - found.mean(axis=1, keepdims=True)

    # A group's mean takes a third, of both terms alike.
    assert_close(expected_gradient(with_baseline, 3), want * 2 / 3, 1e-5)


def test_the_proper_score_does_not_sharpen_where_the_plain_reward_does():
    """With the image drawn from π itself, the energy score is at its best and -D wants the medoid."""
    p = np.asarray(jax.nn.softmax(LOGITS))
    energy, plain = np.zeros(3), np.zeros(3)
    for y, weight in enumerate(p):
        distance = np.linalg.norm(POINTS - POINTS[y], axis=-1)
        apart = np.linalg.norm(POINTS[:, None] - POINTS, axis=-1)
        energy += weight * np.asarray(
            jax.grad(lambda x, d=distance, a=apart: _score(x, d, a))(LOGITS)
        )
        plain += weight * np.asarray(jax.grad(lambda x, d=distance: jax.nn.softmax(x) @ d)(LOGITS))
    np.testing.assert_allclose(energy, 0.0, atol=1e-6)
    assert np.abs(plain).max() > 0.01


def _score(logits, distance, apart):
    p = jax.nn.softmax(logits)
    return p @ distance - 0.5 * p @ apart @ p
