"""The fused step against the plain one, and what must not change it: microbatches, order, samples."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.compare import assert_close, assert_close_in_norm
from vapi_jax.common.trees import flatten
from vapi_jax.methods import vapi
from vapi_jax.methods.vapi_plain import plain_vapi_loss
from vapi_jax.models.policies import make_policy
from vapi_jax.rewards import RewardSpec, make_terms

B, G, GRID, V = 4, 5, 3, 11
TERMS = make_terms([RewardSpec("mse"), RewardSpec("l1", 0.5)])
CONFIG = vapi.VAPiOptions(group_size=G, noise_rate=0.3)


def encode(images):
    grey = images.mean((-2, -1)).reshape(len(images), -1)
    return jnp.round((grey + 1) * (V - 1) / 2).astype(jnp.int32)


def judge(samples, batch):
    images = batch["image"]
    decoded = samples.astype(jnp.float32) * 2 / (V - 1) - 1
    target = images.mean((-2, -1)).reshape(len(images), 1, -1)
    difference = decoded - target
    return {"mse": -jnp.square(difference).mean(-1), "l1": -jnp.abs(difference).mean(-1)}


def differentiate(policy, method, config):
    """(params, batch, rng, **more) -> (loss, aux), gradients."""
    loss = functools.partial(
        method, policy=policy, encode=encode, judge=judge, terms=TERMS, config=config
    )
    return jax.value_and_grad(loss, has_aux=True)


@dataclasses.dataclass(frozen=True)
class Toy:
    """A small policy over images that ARE their tokens, so that the method stands alone."""

    policy: object
    params: dict
    batch: dict

    def grad(self, method, config, rows=slice(None), params=None, rng=0, **more):
        """(loss, aux), gradients of `method` on some rows of the batch."""
        batch = jax.tree.map(lambda x: x[rows], self.batch)
        params = self.params if params is None else params
        # Not compiled as a whole: its operations are, and most of them serve every test.
        return differentiate(self.policy, method, config)(
            params, batch, jax.random.key(rng), **more
        )


BOTH = pytest.mark.parametrize("toy", ["class", "text"], indirect=True)


@pytest.fixture(scope="module")
def toy(request):
    """A class-conditional one, where a test does not ask for another."""
    kind = getattr(request, "param", "class")
    sizes = {"dim": 32, "n_layer": 2, "n_head": 2, "multiple_of": 16, "vocab_size": V}
    if kind == "class":
        policy = make_policy("class", num_classes=5, block_size=GRID**2, **sizes)
        condition = jnp.arange(B, dtype=jnp.int32)
    else:
        policy = make_policy("text", block_size=GRID**2, cls_token_num=3, caption_dim=8, **sizes)
        condition = policy.example_condition(B)
        features = jax.random.normal(jax.random.key(9), condition["features"].shape)
        condition = {**condition, "features": features}
    params = jax.jit(policy.init)(jax.random.key(0))
    # LlamaGen's head starts at zero, under which all gradients but its own vanish.
    head = jax.random.normal(jax.random.key(1), params["output"]["kernel"].shape)
    params["output"]["kernel"] = 0.3 * head
    tokens = jax.random.randint(jax.random.key(2), (B, GRID, GRID, 1, 1), 0, V)
    images = jnp.broadcast_to(tokens * 2 / (V - 1) - 1.0, (B, GRID, GRID, 1, 3))
    batch = {"image": images, "condition": condition, "index": jnp.arange(B)}
    return Toy(policy, params, batch)


def assert_same_gradients(got, want):
    got, want = flatten(got), flatten(want)
    # The embedding of no caption is in no batch here, and its gradient zero.
    for name in [name for name in want if name.endswith("/uncond_embedding")]:
        np.testing.assert_array_equal(got.pop(name), want.pop(name))
    assert_close_in_norm(got, want, 1e-5)


@pytest.mark.parametrize(
    ("toy", "change"),
    [
        ("class", {}),
        ("text", {}),
        ("class", {"ratio": "sequence"}),
        ("class", {"temperature": 0.7, "corruption": "full"}),
        ("class", {"token_dropout": 0.4}),
        ("class", {"advantage": "per_reward"}),
        ("class", {"kl_weight": 0.05}),
        ("class", {"kl": "k2", "kl_weight": 0.5, "clip_epsilon_high": 0.28}),
        ("class", {"kl": "forward", "kl_weight": 0.5, "entropy_share": 0.4}),
        ("class", {"kl": "reverse", "monitor_kl": True, "advantage_scale": "rloo"}),
        ("class", {"ratio": "sequence_mean", "advantage_scale": "batch"}),
    ],
    ids=lambda x: x if isinstance(x, str) else "-".join(x) or "paper",
    indirect=["toy"],
)
def test_fused_equals_plain(toy, change):
    config = dataclasses.replace(CONFIG, **change)
    base = jax.tree.map(lambda x: x * 1.1, toy.params)
    (fused_loss, fused), fused_grads = toy.grad(vapi.vapi_loss, config, base_params=base)
    (plain_loss, plain), plain_grads = toy.grad(plain_vapi_loss, config, base_params=base)
    assert_close(fused_loss, plain_loss, 3e-6)
    assert_same_gradients(fused_grads, plain_grads)
    assert set(plain) - set(fused) == {"ratio"}
    chex.assert_trees_all_close(fused["reward"], plain["reward"], rtol=1e-6)


def test_microbatches_add_up(toy):
    (_, whole), grads = toy.grad(vapi.vapi_loss, CONFIG)
    # No other test has operations of half the size.
    half = jax.jit(functools.partial(toy.grad, vapi.vapi_loss, CONFIG))
    halves = [half(jnp.array(rows)) for rows in ([0, 2], [1, 3])]
    mean = jax.tree.map(lambda a, b: (a + b) / 2, halves[0][1], halves[1][1])
    assert_same_gradients(mean, grads)
    for (_, aux), rows in zip([half[0] for half in halves], ([0, 2], [1, 3]), strict=True):
        chex.assert_trees_all_close(aux["reward"], whole["reward"][jnp.array(rows)], rtol=1e-6)


def test_order_of_the_batch_is_nothing(toy):
    order = jnp.array([2, 0, 3, 1])
    (loss, aux), grads = toy.grad(vapi.vapi_loss, CONFIG)
    (moved_loss, moved), moved_grads = toy.grad(vapi.vapi_loss, CONFIG, order)
    assert_close(loss, moved_loss, 1e-6)
    chex.assert_trees_all_close(aux["advantage"][order], moved["advantage"], rtol=1e-5)
    assert_same_gradients(moved_grads, grads)


def test_the_ratio_of_the_plain_step_is_one_without_dropout(toy):
    (_, aux), _ = toy.grad(plain_vapi_loss, CONFIG)
    assert_close(aux["ratio"], 1.0, 1e-5)


def test_dropout_in_the_update_moves_the_first_ratio(toy):
    config = dataclasses.replace(CONFIG, fused=False, update_dropout=True)
    (_, aux), _ = toy.grad(plain_vapi_loss, config, dropout_rng=jax.random.key(5))
    assert float(jnp.abs(aux["ratio"] - 1.0).max()) > 1e-3


@BOTH
def test_fused_step_runs_one_policy_forward(toy):
    """[B, T] sequences only: no dot of the policy sees B·G rows."""

    def widths(method):
        text = str(jax.make_jaxpr(lambda p: toy.grad(method, CONFIG, params=p)[0][0])(toy.params))
        return f"f32[{B * G}," in text

    assert not widths(vapi.vapi_loss)
    assert widths(plain_vapi_loss)


def test_shuffled_advantages_are_the_same_numbers_elsewhere(toy):
    config = dataclasses.replace(CONFIG, shuffle_advantages=True)
    (_, aux), _ = toy.grad(vapi.vapi_loss, CONFIG)
    (_, shuffled), _ = toy.grad(vapi.vapi_loss, config)
    chex.assert_trees_all_close(aux["reward"], shuffled["reward"])
    a, b = np.asarray(aux["advantage"]), np.asarray(shuffled["advantage"])
    assert np.abs(a - b).max() > 0.1
    assert_close(np.sort(a, axis=1), np.sort(b, axis=1), 1e-6)


def test_noise_reaches_the_context_only(toy):
    """A policy that cannot see its context is asked for the same and judged alike."""
    deaf = jax.tree.map(lambda x: x, toy.params)
    deaf["tok_embeddings"]["embedding"] = jnp.zeros_like(deaf["tok_embeddings"]["embedding"])
    for params, alike in ((toy.params, False), (deaf, True)):
        clean, noisy = (
            toy.grad(vapi.vapi_loss, dataclasses.replace(CONFIG, noise_rate=rate), params=params)[
                0
            ][1]
            for rate in (0.0, 1.0)
        )
        for name in ("ce", "reward"):
            assert np.array_equal(clean[name], noisy[name]) == alike


@BOTH
def test_reward_rises_under_its_own_gradient(toy):
    """Fifty plain gradient steps on one batch find better tokens."""
    params, rewards = toy.params, []
    config = dataclasses.replace(CONFIG, group_size=16, noise_rate=0.0, ce_weight=0.0)

    @jax.jit
    def step(params, rng):
        run = differentiate(toy.policy, vapi.vapi_loss, config)
        (_, aux), grads = run(params, toy.batch, rng)
        return jax.tree.map(lambda p, g: p - 0.5 * g, params, grads), aux["reward"].mean()

    for i in range(50):
        params, mean = step(params, jax.random.key(i))
        rewards.append(float(mean))
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.05
