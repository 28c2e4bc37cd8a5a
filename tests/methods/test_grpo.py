"""Advantages, ratios and losses of GRPO as pure functions."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from vapi_jax.methods import grpo
from vapi_jax.models import categorical


def test_advantages_by_hand():
    got = grpo.group_advantages(jnp.array([[1.0, 2.0, 3.0, 6.0]]))
    # mean 3, unbiased variance (4 + 1 + 0 + 9) / 3
    want = (np.array([[1.0, 2.0, 3.0, 6.0]]) - 3.0) / np.sqrt(14 / 3)
    chex.assert_trees_all_close(got, jnp.asarray(want, jnp.float32), atol=1e-6)


@given(
    st.lists(st.floats(-10, 10, width=32), min_size=4, max_size=4),
    st.floats(0.125, 50, width=32),
    st.floats(-5, 5, width=32),
)
@settings(max_examples=60, deadline=None)
def test_advantages_ignore_shift_and_scale(rewards, scale, shift):
    rewards = np.array([rewards], np.float32)
    if rewards.std() < 0.1:
        return
    plain = grpo.group_advantages(jnp.asarray(rewards))
    moved = grpo.group_advantages(jnp.asarray(rewards * scale + shift))
    chex.assert_trees_all_close(plain, moved, atol=2e-3)
    assert abs(float(plain.sum())) < 1e-3


@pytest.mark.parametrize("value", [-0.3, 0.1, 1e6])
@pytest.mark.parametrize("size", [2, 3, 7, 8])
def test_equal_rewards_give_exactly_zero(value, size):
    got = grpo.group_advantages(jnp.full((2, size), value, jnp.float32))
    assert np.all(np.asarray(got) == 0.0)


@pytest.mark.parametrize("size", [2, 8, 28, 40])
def test_advantages_are_bounded_by_group_size(size):
    """(G - 1)/sqrt(G): 2.47 at G = 8; the clip at 5 acts from G = 28 on."""
    rewards = jnp.zeros((1, size)).at[0, 0].set(1.0)
    free = float(grpo.group_advantages(rewards, clip=1e9).max())
    np.testing.assert_allclose(free, (size - 1) / np.sqrt(size), rtol=1e-5)
    assert (float(grpo.group_advantages(rewards).max()) < free) == (free > 5.0)


def test_token_log_probs_are_a_softmax():
    logits = jax.random.normal(jax.random.key(0), (2, 3, 5))
    samples = jax.random.randint(jax.random.key(1), (2, 4, 3), 0, 5)
    got = categorical.token_log_probs(logits, samples, temperature=0.7)
    table = jax.nn.log_softmax(logits / 0.7)
    for b, g, t in np.ndindex(2, 4, 3):
        np.testing.assert_allclose(got[b, g, t], table[b, t, samples[b, g, t]], atol=1e-6)


@pytest.mark.parametrize("ratio", grpo.RATIOS)
def test_on_policy_gradient_is_reinforce(ratio):
    """At ρ = 1 the surrogate's gradient is -A·∇log π, per token over T or of the whole grid."""
    logps = -jnp.abs(jax.random.normal(jax.random.key(0), (2, 3, 4)))
    advantages = jax.random.normal(jax.random.key(1), (2, 3))

    def loss(x):
        old = jax.lax.stop_gradient(x)
        return grpo.clipped_surrogate(x, old, advantages, ratio=ratio).sum()

    scale = 1.0 if ratio == "sequence" else 1 / 4
    want = jnp.broadcast_to(-advantages[..., None] * scale, logps.shape)
    chex.assert_trees_all_close(jax.grad(loss)(logps), want, atol=1e-6)


def test_clip_stops_the_gradient_only_where_it_is_pessimistic():
    old = jnp.zeros((1, 4, 1))
    logps = jnp.log(jnp.array([1.5, 0.5, 1.5, 0.5])).reshape(1, 4, 1)
    advantages = jnp.array([[1.0, 1.0, -1.0, -1.0]])
    grad = jax.grad(lambda x: grpo.clipped_surrogate(x, old, advantages).sum())(logps)
    # Too likely already and good: nothing. Unlikely and good, likely and bad: push on.
    np.testing.assert_allclose(np.ravel(grad), [0.0, -0.5, 1.5, 0.0], atol=1e-6)


def test_sequence_ratio_is_the_product_of_token_ratios():
    logps = jnp.log(jnp.array([[[1.1, 0.9, 1.05]]]))
    got = grpo.clipped_surrogate(logps, jnp.zeros_like(logps), jnp.ones((1, 1)), ratio="sequence")
    np.testing.assert_allclose(got, [[-1.1 * 0.9 * 1.05]], rtol=1e-6)


def test_surrogate_gradient_by_finite_differences():
    old = -jnp.abs(jax.random.normal(jax.random.key(0), (2, 2, 3)))
    logps = old + 0.1 * jax.random.normal(jax.random.key(1), old.shape)
    advantages = jnp.array([[1.0, -0.5], [0.3, -2.0]])
    for ratio in grpo.RATIOS:
        check_grads(
            lambda x, r=ratio: grpo.clipped_surrogate(x, old, advantages, 0.5, r),
            (logps,), order=1, modes=["rev"], atol=1e-2, rtol=1e-2,
        )  # fmt: skip


def test_kl_is_non_negative_and_zero_on_equal():
    x = -jnp.abs(jax.random.normal(jax.random.key(0), (50,)))
    y = -jnp.abs(jax.random.normal(jax.random.key(1), (50,)))
    assert float(grpo.k3_kl(x, y).min()) >= 0.0
    assert np.all(np.asarray(grpo.k3_kl(x, x)) == 0.0)


def test_kl_estimates_the_kl():
    logits = jax.random.normal(jax.random.key(0), (2, 6))
    p, q = jax.nn.log_softmax(logits[0]), jax.nn.log_softmax(logits[1])
    exact = float(jnp.sum(jnp.exp(p) * (p - q)))
    mean = float(jnp.sum(jnp.exp(p) * grpo.k3_kl(p, q)))
    np.testing.assert_allclose(mean, exact, rtol=1e-5)


def test_entropy_limits():
    np.testing.assert_allclose(categorical.entropy(jnp.zeros(16)), np.log(16), rtol=1e-6)
    impossible = jnp.array([0.0, -jnp.inf, 0.0])
    np.testing.assert_allclose(categorical.entropy(impossible), np.log(2), rtol=1e-6)
    np.testing.assert_allclose(categorical.entropy(jnp.array([500.0, 0.0])), 0.0, atol=1e-6)


def test_permuting_samples_permutes_losses():
    logps = -jnp.abs(jax.random.normal(jax.random.key(0), (2, 5, 4)))
    old = logps - 0.1
    advantages = jax.random.normal(jax.random.key(1), (2, 5))
    order = jnp.array([3, 1, 4, 0, 2])
    plain = grpo.clipped_surrogate(logps, old, advantages)
    moved = grpo.clipped_surrogate(logps[:, order], old[:, order], advantages[:, order])
    chex.assert_trees_all_close(plain[:, order], moved)


def test_unknown_ratio():
    x = jnp.zeros((1, 1, 1))
    with pytest.raises(ValueError, match="choose one of"):
        grpo.clipped_surrogate(x, x, jnp.zeros((1, 1)), ratio="image")
