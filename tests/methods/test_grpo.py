"""Advantages, ratios and losses of GRPO as pure functions, compiled and as they stand."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from jax.test_util import check_grads

from tests.helpers.compare import assert_close
from vapi_jax.methods import grpo

BOTH = {"with_jit": True, "without_jit": True}
B, G, T = 2, 3, 4


def floats(low, high, *shape):
    return arrays(np.float32, shape, elements=st.floats(low, high, width=32))


LOGPS = floats(-6, 0, B, G, T)
ADVANTAGES = floats(-3, 3, B, G)


class AdvantagesTest(chex.TestCase):
    def advantages(self, rewards, **options):
        rewards = jnp.asarray(rewards, jnp.float32)
        return self.variant(grpo.group_advantages)(rewards, **options)

    @chex.variants(**BOTH)
    def test_by_hand(self):
        got = self.advantages([[1.0, 2.0, 3.0, 6.0]])
        # mean 3, unbiased variance (4 + 1 + 0 + 9) / 3
        want = (np.array([[1.0, 2.0, 3.0, 6.0]]) - 3.0) / np.sqrt(14 / 3)
        chex.assert_trees_all_close(got, np.float32(want), rtol=1e-6)
        chex.assert_type(got, jnp.float32)

    @chex.variants(**BOTH)
    @settings(max_examples=60)
    @given(floats(-10, 10, 1, 4), st.floats(0.125, 50, width=32), st.floats(-5, 5, width=32))
    def test_shift_and_scale_are_ignored(self, rewards, scale, shift):
        if rewards.std() < 0.1:
            return
        plain, moved = self.advantages(rewards), self.advantages(rewards * scale + shift)
        # Rounding of the moved rewards, against a spread of at least 0.1 times the scale.
        largest = np.abs(rewards * scale).max() + abs(shift)
        within = 1e-6 * (1 + largest / (scale * rewards.std()))
        assert_close(moved, plain, within, scale=1.0)
        assert_close(plain.sum(), 0.0, 1e-6, scale=1.0)

    @chex.variants(**BOTH)
    @parameterized.product(value=(-0.3, 0.1, 1e6), size=(2, 3, 7, 8))
    def test_equal_rewards_give_exactly_zero(self, value, size):
        got = self.advantages(np.full((2, size), value))
        chex.assert_trees_all_equal(got, jnp.zeros((2, size)))

    @chex.variants(**BOTH)
    @parameterized.parameters(2, 8, 26, 27, 40)
    def test_they_are_bounded_by_the_group_size(self, size):
        """(G - 1)/sqrt(G): 2.47 at G = 8; the clip at 5 acts from G = 27 on."""
        rewards = np.eye(1, size)
        free = float(self.advantages(rewards, clip=1e9).max())
        assert free == pytest.approx((size - 1) / np.sqrt(size), rel=1e-6)
        clipped = self.advantages(rewards)
        assert (float(clipped.max()) < free) == (free > 5.0)
        assert float(jnp.abs(clipped).max()) <= 5.0


def plain_surrogate(logps, old, advantages, epsilon, ratio, mask, penalty):
    """The loss of every sample in float64, one token after the other."""
    out = np.zeros((B, G))
    for b, g in np.ndindex(B, G):
        counted = [t for t in range(T) if mask[b, g, t]] or [0]
        a = advantages[b, g]

        def worse(rho, a=a):
            return -min(rho * a, np.clip(rho, 1 - epsilon, 1 + epsilon) * a)

        steps = [float(logps[b, g, t]) - float(old[b, g, t]) for t in counted]
        if ratio == "token":
            out[b, g] = np.mean([worse(np.exp(step)) for step in steps])
        else:
            out[b, g] = worse(np.exp(sum(steps) if ratio == "sequence" else np.mean(steps)))
        out[b, g] += np.mean([penalty[b, g, t] for t in counted])
    return out


class SurrogateTest(chex.TestCase):
    def surrogate(self, logps, old, advantages, ratio="token", *more):
        run = self.variant(grpo.clipped_surrogate, static_argnums=(3, 4))
        return run(logps, old, advantages, 0.2, ratio, *more)

    @chex.variants(**BOTH)
    @parameterized.parameters(*grpo.RATIOS)
    @settings(max_examples=40)
    @given(
        logps=LOGPS,
        old=LOGPS,
        advantages=ADVANTAGES,
        mask=arrays(np.bool_, (B, G, T)),
        penalty=floats(0, 1, B, G, T),
    )
    def test_it_is_the_formula(self, ratio, logps, old, advantages, mask, penalty):
        """Token by token in NumPy; a sample that the mask leaves without tokens keeps its first."""
        got = self.surrogate(logps, old, advantages, ratio, mask, penalty)
        chex.assert_shape(got, (B, G))
        chex.assert_type(got, jnp.float32)
        want = plain_surrogate(logps, old, advantages, 0.2, ratio, mask, penalty)
        # An exponential passes the rounding of its exponent on, which is up to 4 · 6 here.
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)

    @chex.variants(**BOTH)
    @parameterized.parameters(*grpo.RATIOS)
    def test_on_policy_gradient_is_reinforce(self, ratio):
        """At ρ = 1 the surrogate's gradient is -A·∇log π, per token over T or of the whole grid."""
        logps = -jnp.abs(jax.random.normal(jax.random.key(0), (B, G, T)))
        advantages = jax.random.normal(jax.random.key(1), (B, G))

        def loss(x):
            old = jax.lax.stop_gradient(x)
            return grpo.clipped_surrogate(x, old, advantages, ratio=ratio).sum()

        scale = 1.0 if ratio == "sequence" else 1 / T
        want = jnp.broadcast_to(-advantages[..., None] * scale, logps.shape)
        chex.assert_trees_all_close(self.variant(jax.grad(loss))(logps), want, rtol=1e-6)

    @chex.variants(**BOTH)
    def test_clip_stops_the_gradient_only_where_it_is_pessimistic(self):
        old = jnp.zeros((1, 4, 1))
        logps = jnp.log(jnp.array([1.5, 0.5, 1.5, 0.5])).reshape(1, 4, 1)
        advantages = jnp.array([[1.0, 1.0, -1.0, -1.0]])
        loss = self.variant(jax.grad(lambda x: grpo.clipped_surrogate(x, old, advantages).sum()))
        # Too likely already and good: nothing. Unlikely and good, likely and bad: push on.
        chex.assert_trees_all_close(
            loss(logps).ravel(), jnp.array([0.0, -0.5, 1.5, 0.0]), rtol=1e-6
        )

    @chex.variants(**BOTH)
    def test_the_ratio_of_a_grid_is_the_product_of_its_tokens(self):
        logps = jnp.log(jnp.array([[[1.1, 0.9, 1.05]]]))
        old, advantages = jnp.zeros_like(logps), jnp.ones((1, 1))
        got = self.surrogate(logps, old, advantages, ratio="sequence")
        chex.assert_trees_all_close(got, jnp.array([[-1.1 * 0.9 * 1.05]]), rtol=1e-6)

    @chex.variants(**BOTH)
    @settings(max_examples=25)
    @given(LOGPS, LOGPS, ADVANTAGES, st.permutations(range(G)))
    def test_permuting_samples_permutes_losses(self, logps, old, advantages, order):
        order = np.array(order)
        plain = self.surrogate(logps, old, advantages)
        moved = self.surrogate(logps[:, order], old[:, order], advantages[:, order])
        chex.assert_trees_all_equal(plain[:, order], moved)

    @chex.variants(**BOTH)
    def test_the_share_of_clipped_ratios(self):
        got = self.variant(grpo.clip_fraction)(jnp.array([0.79, 0.81, 1.0, 1.19, 1.21]))
        chex.assert_trees_all_close(got, jnp.float32(2 / 5), rtol=1e-6)


def test_surrogate_gradient_by_finite_differences():
    old = -jnp.abs(jax.random.normal(jax.random.key(0), (2, 2, 3)))
    logps = old + 0.1 * jax.random.normal(jax.random.key(1), old.shape)
    advantages = jnp.array([[1.0, -0.5], [0.3, -2.0]])
    for ratio in grpo.RATIOS:
        check_grads(
            lambda x, r=ratio: grpo.clipped_surrogate(x, old, advantages, 0.5, r),
            (logps,), order=1, modes=["rev"], atol=1e-2, rtol=1e-2,
        )  # fmt: skip


class KLTest(chex.TestCase):
    @chex.variants(**BOTH)
    @settings(max_examples=40)
    @given(LOGPS, LOGPS)
    def test_it_is_non_negative_and_zero_on_equal(self, logps, base):
        kl = self.variant(grpo.k3_kl)
        assert float(kl(logps, base).min()) >= -1e-6  # e^d - d - 1 rounds near d = 0
        chex.assert_trees_all_equal(kl(logps, logps), jnp.zeros_like(logps))

    @chex.variants(**BOTH)
    def test_its_mean_is_the_kl(self):
        logits = jax.random.normal(jax.random.key(0), (2, 6))
        p, q = jax.nn.log_softmax(logits[0]), jax.nn.log_softmax(logits[1])
        exact = jnp.sum(jnp.exp(p) * (p - q))
        mean = jnp.sum(jnp.exp(p) * self.variant(grpo.k3_kl)(p, q))
        chex.assert_trees_all_close(mean, exact, rtol=3e-6)


def test_a_shuffle_is_a_permutation_and_each_is_as_likely():
    """Of three numbers, 6000 times: each of six orders about 1000 times, whose deviation is 29."""
    keys = jax.random.split(jax.random.key(0), 6000)
    rows = jax.vmap(lambda key: grpo.shuffled(key, jnp.arange(3.0)))(keys)
    orders, counts = np.unique(rows, axis=0, return_counts=True)
    assert {tuple(sorted(order)) for order in orders} == {(0.0, 1.0, 2.0)}
    assert len(orders) == 6
    assert np.all(np.abs(counts - 1000) < 5 * 29)


def test_unknown_ratio():
    x = jnp.zeros((1, 1, 1))
    with pytest.raises(ValueError, match="'image'.*token.*sequence"):
        grpo.clipped_surrogate(x, x, jnp.zeros((1, 1)), ratio="image")
