"""Adapters: fresh ones change nothing, alone they are trained, and merged they are the same model."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.compare import assert_close, assert_close_in_norm
from tests.helpers.policies import BATCH, CASES, JANUS, TOKENS, VOCAB, draw_weights, make_condition
from tests.helpers.tiny import BATCH as ROWS
from tests.helpers.tiny import SIDE, make_tiny_method
from vapi_jax.common.trees import flatten, unflatten
from vapi_jax.methods.config import to_dict
from vapi_jax.methods.resolve import ConfigError, resolve
from vapi_jax.models.lora import Adapted, LoRA, merged, split, union
from vapi_jax.models.policies import make_policy, without_adapters
from vapi_jax.parallel.sharding import host_array, make_mesh, shard_batch
from vapi_jax.training import train
from vapi_jax.training.export import open_trained
from vapi_jax.weights.store import save_safetensors

LORA = {"rank": 3, "alpha": 6.0}


@pytest.mark.parametrize("name", ["class, grouped heads", "janus"])
def test_fresh_adapters_change_nothing_and_merged_ones_are_the_same_model(name):
    kind, options = CASES[name]
    policy = make_policy(kind, **options, lora=LORA)
    assert hash(policy) == hash(make_policy(kind, **options, lora=LoRA(**LORA)))
    shapes = jax.eval_shape(policy.init, jax.random.key(0))
    base, adapters = split(draw_weights(shapes))
    plain = without_adapters(policy)
    assert jax.tree.map(jnp.shape, base) == jax.tree.map(
        lambda leaf: leaf.shape, jax.eval_shape(plain.init, jax.random.key(0))
    )
    maps = {path.rpartition("/")[0] for path in flatten(adapters)}
    assert {path.rpartition("/")[2] for path in maps} >= {"wo", "w1", "w2", "w3"}
    rng = np.random.default_rng(0)
    condition = make_condition(kind, rng)
    context = jnp.asarray(rng.integers(0, VOCAB, (BATCH, TOKENS - 1)), jnp.int32)
    unmerged, forward = (jax.jit(p.logits) for p in (policy, plain))
    fresh = {k: leaf * (not k.endswith("lora_b")) for k, leaf in flatten(adapters).items()}
    want = forward(base, condition, context)
    got = unmerged(union(base, unflatten(fresh)), condition, context)
    np.testing.assert_array_equal(got, want)
    whole = union(base, adapters)
    adapted = unmerged(whole, condition, context)
    assert_close(forward(merged(whole, policy.config.lora), condition, context), adapted, 2e-5)
    assert np.abs(adapted - want).max() > 0.1


def test_initial_adapters_are_fresh_and_targets_are_those_of_the_layers():
    policy = make_policy("janus", **JANUS, lora={**LORA, "targets": ["wq", "w2"]})
    adapters = flatten(split(jax.eval_shape(policy.init, jax.random.key(0)))[1])
    assert {path.split("/")[2] for path in adapters} == {"wq", "w2"}
    dense = Adapted(4, LoRA(**LORA), 0.02, "float32")
    drawn = dense.init(jax.random.key(0), jnp.zeros((1, 5)))["params"]
    assert drawn["lora_a"].shape == (5, 3) and drawn["lora_a"].all()
    assert drawn["lora_b"].shape == (3, 4) and not drawn["lora_b"].any()
    with pytest.raises(ValueError, match="wqkv"):
        make_policy("janus", **JANUS, lora={"targets": ["wqkv"]})


@pytest.fixture(scope="module")
def base_file(tmp_path_factory):
    """A generator's weights for `make_tiny_method`."""
    policy = make_tiny_method("base", make_mesh(1, 1, jax.devices()[:1])).policy
    params = draw_weights(jax.eval_shape(policy.init, jax.random.key(0)))
    path = tmp_path_factory.mktemp("lora") / "base.safetensors"
    save_safetensors(path, params)
    return path, params


def method_of(mesh, base_file):
    still = dict.fromkeys(("token_dropout_p", "resid_dropout_p", "ffn_dropout_p"), 0.0)
    return make_tiny_method(
        "base", mesh, policy={"lora": LORA, **still}, init={"gpt": str(base_file)}
    )


def two_steps(mesh, base_file):
    method = method_of(mesh, base_file)
    optimizer = train.make_optimizer(method.config.optimizer, 2)
    state, shardings = train.init_state(method, optimizer, 0)
    step, frozen = train.make_train_step(method, optimizer, shardings), train.load_frozen(method)
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.uniform(-1, 1, (ROWS, SIDE, SIDE, 3)).astype(np.float32),
        "condition": rng.integers(0, 12, ROWS).astype(np.int32),
    }
    start = jax.tree.map(host_array, state.params)
    for _ in range(2):
        state, metrics = step(state, frozen, shard_batch(batch, mesh))
    return start, state, frozen, float(metrics["grad_norm"])


def test_adapters_alone_are_trained_the_same_on_any_mesh(base_file):
    path, params = base_file
    start, one, frozen, norm = two_steps(make_mesh(1, 1, jax.devices()[:1]), path)
    _, many, split_up, same = two_steps(make_mesh(2, 4), path)
    assert same == pytest.approx(norm, rel=1e-4)
    backbone = split_up["backbone"]
    assert not backbone["layers"]["feed_forward"]["w1"]["kernel"].is_fully_replicated
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(frozen["backbone"]), params)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(backbone), params)
    state = flatten(jax.device_get(one.params))
    assert {path.rpartition("/")[2] for path in state} == {"lora_a", "lora_b"}
    moments = [x for x in jax.tree.leaves(one.opt_state) if x.ndim]
    assert sum(x.size for x in moments) == 2 * sum(x.size for x in state.values())
    moved = {path: leaf - flatten(start)[path] for path, leaf in state.items()}
    assert all(np.abs(change).max() > 0 for change in moved.values())
    other = flatten(jax.tree.map(host_array, many.params))
    changed = {path: leaf - flatten(start)[path] for path, leaf in other.items()}
    assert_close_in_norm(changed, moved, 1e-3)


def test_an_export_of_a_run_has_its_adapters_in_the_weights(base_file, tmp_path):
    path, params = base_file
    method = method_of(make_mesh(1, 1, jax.devices()[:1]), path)
    adapters = draw_weights(jax.eval_shape(method.init, jax.random.key(0)), seed=1)
    (tmp_path / "weights").mkdir()
    save_safetensors(tmp_path / "weights" / "lora.safetensors", adapters)
    (tmp_path / "config.json").write_text(json.dumps(to_dict(method.config)))
    want = flatten(merged(union(params, adapters), LoRA(**LORA)))
    with open_trained(tmp_path) as (weights, _):
        assert weights.leaves.keys() == want.keys()
        for name, leaf in weights.leaves.items():
            for i in range(leaf.shape[0]) if name.startswith("layers/") else (None,):
                index = () if i is None else (slice(i, i + 1),)
                assert_close(weights.read(name, index), want[name][index], 1e-6)


def test_adapters_want_weights_and_a_recipe_keeps_its_options(base_file):
    config = method_of(make_mesh(1, 1, jax.devices()[:1]), base_file[0]).config
    assert config.policy["lora"] == LoRA(**LORA)
    assert resolve(json.loads(json.dumps(to_dict(config)))) == config
    recipe = to_dict(dataclasses.replace(config, init=dataclasses.replace(config.init, gpt="")))
    with pytest.raises(ConfigError, match=r"policy\.lora.*init\.gpt"):
        resolve(recipe)
    recipe["policy"]["lora"] = {"rnk": 3, "alpha": -1}
    with pytest.raises(ConfigError) as error:
        resolve(recipe)
    assert "policy.lora.rnk" in str(error.value) and "policy.lora.alpha=-1" in str(error.value)
