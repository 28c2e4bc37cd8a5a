"""Held-out metrics from a whole copy of the parameters, and the devices and dtypes of judgement."""

import jax
import numpy as np
import pytest

from tests.helpers.tiny import make_tiny_method, with_random_head
from vapi_jax.bench import hlo
from vapi_jax.evaluation.held_out import HeldOut
from vapi_jax.evaluation.samples import on_judging_devices
from vapi_jax.parallel.sharding import make_mesh, replicate, tree_shardings, whole_copy
from vapi_jax.training.train import load_frozen


@pytest.fixture(scope="module")
def split():
    """A method, frozen weights, and parameters split over four devices."""
    mesh = make_mesh(2, 4)
    method = make_tiny_method("vapi", mesh)
    params = with_random_head(jax.jit(method.init)(jax.random.key(0)), 1)
    params = jax.device_put(params, tree_shardings(params, mesh))
    assert any(not leaf.is_fully_replicated for leaf in jax.tree.leaves(params))
    return method, load_frozen(method), params


def test_metrics_are_those_of_split_parameters_and_none_of_them_is_gathered(split):
    method, frozen, params = split
    held_out = HeldOut(method, frozen)
    at = replicate(np.float32(0.8), method.mesh)
    rest = frozen, held_out._batch, held_out._rng, at
    whole = whole_copy(params, method.mesh, held_out._narrowed)
    compiled = {
        name: held_out._metrics.lower(tree, *rest).compile()
        for name, tree in {"split": params, "whole": whole}.items()
    }
    sent = {name: hlo.totals(hlo.collectives(one.as_text())) for name, one in compiled.items()}
    assert "all-gather" in sent["split"] and "all-gather" not in sent["whole"]
    want = jax.device_get(compiled["split"](params, *rest))
    found = held_out(params, 0.8)
    assert found.keys() == want.keys() == {"reward", "reward_mse", "ce", "entropy"}
    for name, value in want.items():
        assert found[name] == pytest.approx(float(value), rel=1e-5), name

    alone, alone_frozen = on_judging_devices(method, frozen)
    assert (method.mesh.size, alone.mesh.size) == (8, 1)
    on_one = HeldOut(alone, alone_frozen)(params, 0.8)
    assert on_one == {name: pytest.approx(value, rel=1e-3) for name, value in found.items()}
    assert on_judging_devices(alone, alone_frozen) == (alone, alone_frozen)


def test_a_tokenizer_is_judged_without_dropout():
    method = make_tiny_method(
        "tokenizer", make_mesh(1, 1, jax.devices()[:1]), image_size=32, tokenizer={"dropout_p": 0.5},
        tokenizer_training={"perceptual_net": "alex"},
    )  # fmt: skip
    batch = {"image": np.random.default_rng(0).uniform(-1, 1, (2, 32, 32, 3)).astype(np.float32)}
    params, judge = jax.jit(method.init)(jax.random.key(0)), jax.jit(method.held_out)
    one, other = (judge(params, load_frozen(method), batch, jax.random.key(i), 1.0) for i in (0, 1))
    assert jax.device_get(one) == jax.device_get(other)


def test_a_run_says_in_which_dtypes_it_is_judged(split):
    method, _, _ = split
    narrow = make_tiny_method("vapi", method.mesh, policy={"dtype": "bfloat16"})
    assert narrow.precision == {
        "policy": "bfloat16", "encoder": "float32", "decoder": "float32",
        "rewards": {"mse": "float32"},
    }  # fmt: skip
    rewards = ({"name": "lpips", "options": {"dtype": "bfloat16"}}, {"name": "mse"})
    decoder = {"decoder_dtype": "bfloat16"}
    other = make_tiny_method(
        "vapi", method.mesh, image_size=16, rewards=rewards, tokenizer=decoder
    ).precision
    assert (other["policy"], other["decoder"]) == ("float32", "bfloat16")
    assert other["rewards"] == {"lpips": "bfloat16", "mse": "float32"}
    tokenizer = make_tiny_method("tokenizer", method.mesh, image_size=16)
    assert tokenizer.precision == {"encoder": "float32", "decoder": "float32"}
