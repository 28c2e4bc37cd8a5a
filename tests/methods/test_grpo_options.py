"""What others have made of GRPO, by hand, and by enumeration where a gradient is claimed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.compare import assert_close
from vapi_jax.methods import grpo
from vapi_jax.methods.objective import GRPOOptions, advantages_of
from vapi_jax.models import categorical
from vapi_jax.models.head import Head, exact_kl, project, token_entropy
from vapi_jax.rewards import RewardSpec, make_terms

REWARDS = jnp.array([[1.0, 2.0, 6.0], [0.0, 0.5, 1.0]])
CENTRED = np.array([[-2.0, -1.0, 3.0], [-0.5, 0.0, 0.5]])


def test_advantages_of_every_scale_by_hand():
    std = np.array([[np.sqrt(7.0)], [0.5]])
    wanted = {
        "group": CENTRED / std,
        "none": CENTRED,
        "rloo": CENTRED * 3 / 2,
        "batch": CENTRED / np.std(REWARDS),
    }
    for scale, want in wanted.items():
        assert_close(grpo.scaled_advantages(REWARDS, scale), want, 1e-6)
        assert float(grpo.scaled_advantages(REWARDS, scale, clip=0.25).max()) == 0.25
    others = [[1.0 - 4.0, 2.0 - 3.5, 6.0 - 1.5]]  # less the mean of the others
    assert_close(grpo.scaled_advantages(REWARDS, "rloo")[:1], others, 1e-6)


def test_rewards_normalised_each_and_then_over_the_batch():
    terms = make_terms([RewardSpec("mse"), RewardSpec("l1", 0.5)])
    values = {"mse": REWARDS, "l1": 100.0 * REWARDS[:, ::-1]}
    options = GRPOOptions(advantage="per_reward", advantage_scale="batch", advantage_clip=9.0)
    each = {name: grpo.group_advantages(value, 9.0) for name, value in values.items()}
    summed = np.asarray(each["mse"] + 0.5 * each["l1"])
    assert_close(advantages_of(values, terms, options), summed / summed.std(), 1e-5)


def test_clipping_higher_lets_likely_tokens_rise_further():
    logps, ones = jnp.log(jnp.array([[[1.25, 0.75]]])), jnp.ones((1, 1))

    def slope(high, sign):
        def loss(x):
            old = jnp.zeros_like(x)
            return grpo.clipped_surrogate(x, old, sign * ones, clip_epsilon_high=high).sum()

        return np.asarray(jax.grad(loss)(logps))[0, 0]

    np.testing.assert_allclose(slope(0.0, 1.0), [0.0, -0.375], atol=1e-6)
    np.testing.assert_allclose(slope(0.28, 1.0), [-0.625, -0.375], atol=1e-6)
    np.testing.assert_allclose(slope(0.28, -1.0), [0.625, 0.0], atol=1e-6)  # below, ε as before
    ratios = jnp.array([0.75, 1.25, 1.3])
    assert_close(grpo.clip_fraction(ratios, 0.2, 0.28), 2 / 3, 1e-6)


def test_tokens_of_highest_entropy_and_ties():
    entropy = jnp.array([[0.1, 0.9, 0.5, 0.7, 0.2], [1.0, 1.0, 1.0, 1.0, 1.0]])
    found = grpo.highest_entropy(entropy, 0.4)
    np.testing.assert_array_equal(found[0, 0], [False, True, False, True, False])
    np.testing.assert_array_equal(found.sum(axis=(1, 2)), [2, 2])
    assert int(grpo.highest_entropy(entropy, 0.01).sum()) == 2  # one of each image


def test_advantages_and_weights_of_tokens():
    logps = jnp.log(jnp.array([[[1.1, 0.9]]]))
    old, tokens = jnp.zeros_like(logps), jnp.array([[[2.0, -1.0]]])
    assert_close(grpo.clipped_surrogate(logps, old, tokens), [[-(2.2 - 0.9) / 2]], 1e-6)
    weights = jnp.array([[[0.5, 2.0]]])
    got = grpo.clipped_surrogate(logps, old, jnp.ones((1, 1)), weights=weights)
    assert_close(got, [[-(0.55 + 1.8) / 2]], 1e-6)
    found = grpo.importance_weights(jnp.log(jnp.array([0.5, 1.0, 9.0])), jnp.zeros(3), 2.0)
    assert_close(found, [0.5, 1.0, 2.0], 1e-6)


HIDDEN = jax.random.normal(jax.random.key(0), (2, 6, 4))
OWN, BASE = (Head(jax.random.normal(jax.random.key(k), (4, 7))) for k in (1, 2))


def all_logps(hidden, head, temperature):
    return jax.nn.log_softmax(project(hidden, head) / temperature)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_the_exact_kl_and_its_gradient_in_blocks(direction):
    base = jnp.flip(HIDDEN, 0)

    def plain(hidden):
        p, q = all_logps(hidden, OWN, 0.7), all_logps(base, BASE, 0.7)
        p, q = (p, q) if direction == "reverse" else (q, p)
        return (jnp.exp(p) * (p - q)).sum(-1)

    def blocks(hidden):
        return exact_kl(hidden, OWN, base, BASE, direction, 0.7, limit=2 * 7 * 2)

    assert_close(blocks(HIDDEN), plain(HIDDEN), 2e-6)
    got, want = (jax.grad(lambda h, f=f: f(h).sum())(HIDDEN) for f in (blocks, plain))
    assert_close(got, want, 5e-6)
    got = jax.grad(lambda h: token_entropy(h, OWN, 0.7).sum())(HIDDEN)
    want = jax.grad(lambda h: categorical.entropy(project(h, OWN), 0.7).sum())(HIDDEN)
    assert_close(got, want, 5e-6)


@pytest.mark.parametrize(
    ("estimator", "direction"), [(grpo.k2_kl, "reverse"), (grpo.k3_kl, "forward")]
)
def test_whose_gradient_an_estimator_has(estimator, direction):
    """Over all tokens, weighted as they are drawn: k2 moves like KL(π || base), k3 like KL(base || π)."""

    def estimated(hidden):
        logps, base = all_logps(hidden, OWN, 1.0), all_logps(HIDDEN, BASE, 1.0)
        return (jax.lax.stop_gradient(jnp.exp(logps)) * estimator(logps, base)).sum()

    def exact(hidden):
        return exact_kl(hidden, OWN, HIDDEN, BASE, direction).sum()

    assert_close(jax.grad(estimated)(HIDDEN), jax.grad(exact)(HIDDEN), 1e-5)
