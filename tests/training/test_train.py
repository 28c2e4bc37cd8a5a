"""The optimizer by hand, the schedules, and one step that is the same on every mesh."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.helpers.compare import assert_close
from tests.helpers.jaxprs import every_equation
from tests.helpers.tiny import BATCH, Machine, make_tiny_method
from vapi_jax.common.trees import flatten
from vapi_jax.methods import HealthError
from vapi_jax.methods.config import OptimizerConfig
from vapi_jax.parallel.sharding import make_mesh, shard_batch
from vapi_jax.training import train

# --- the optimizer --------------------------------------------------------------------------------

PARAMS = {
    "layer": {"kernel": np.array([[1.0, -2.0]]), "bias": np.array([0.5])},
    "attention_norm": {"scale": np.array([3.0])},
    "embed": {"embedding": np.array([[4.0]])},
}
GRADS = {
    "layer": {"kernel": np.array([[0.3, -0.4]]), "bias": np.array([1.2])},
    "attention_norm": {"scale": np.array([-0.5])},
    "embed": {"embedding": np.array([[2.0]])},
}
DECAYED = {"layer/kernel", "embed/embedding"}


def adamw_by_hand(config, steps, clip):
    """Loshchilov and Hutter's algorithm 2 with a constant rate and the same gradient each step."""
    norm = math.sqrt(sum(np.square(g).sum() for g in flatten(GRADS).values()))
    scale = min(1.0, clip / norm) if clip else 1.0
    out = {}
    for name, p in flatten(PARAMS).items():
        g, m, v = flatten(GRADS)[name] * scale, 0.0, 0.0
        for t in range(1, steps + 1):
            m = config.b1 * m + (1 - config.b1) * g
            v = config.b2 * v + (1 - config.b2) * g**2
            step = (m / (1 - config.b1**t)) / (np.sqrt(v / (1 - config.b2**t)) + config.eps)
            decay = config.weight_decay * p if name in DECAYED else 0.0
            p = p - config.learning_rate * (step + decay)
        out[name] = p
    return out


@pytest.mark.parametrize("clip", [0.0, 1.0, 100.0])
def test_adamw_decays_matrices_only_and_clips_the_whole_gradient(clip):
    config = OptimizerConfig(
        learning_rate=0.1, weight_decay=0.2, b1=0.8, b2=0.9, eps=0.5, max_grad_norm=clip
    )
    optimizer = train.make_optimizer(config, steps=3)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), PARAMS)
    grads = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), GRADS)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for _ in range(3):
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    for name, want in adamw_by_hand(config, 3, clip).items():
        assert_close(flatten(params)[name], want, 2e-6)


def test_the_first_step_in_numbers():
    """Norm 2.4372: clipped to 1, the kernel's gradients become 0.12309 and -0.16412."""
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.2, eps=0.5, max_grad_norm=1.0)
    optimizer = train.make_optimizer(config, steps=1)
    params, grads = (jax.tree.map(np.float32, tree) for tree in (PARAMS, GRADS))
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
    got = flatten(optax.apply_updates(params, updates))
    # p - 0.1 (g / (|g| + 0.5) + 0.2 p), without the last term for norm and bias
    assert_close(got["layer/kernel"], [[0.960245, -1.935287]], 2e-6)
    assert_close(got["layer/bias"], [0.450385], 2e-6)
    assert_close(got["attention_norm/scale"], [3.029093], 2e-6)
    assert_close(got["embed/embedding"], [[3.857861]], 2e-6)


def test_what_decays_in_a_real_generator():
    task = make_tiny_method("base", make_mesh())
    mask = flatten(train.decay_mask(jax.eval_shape(task.init, jax.random.key(0))))
    kept = {name for name, decays in mask.items() if not decays}
    assert kept == {"layers/attention_norm/scale", "layers/ffn_norm/scale", "norm/scale"}


def test_what_decays_in_a_tokenizer():
    task = make_tiny_method("tokenizer", make_mesh(), image_size=16)
    mask = flatten(train.decay_mask(jax.eval_shape(task.init, jax.random.key(0))))
    for name, decays in mask.items():
        assert decays == name.endswith(("/kernel", "/embedding")), name


@pytest.mark.parametrize(
    ("change", "steps", "want"),
    [
        ({}, 4, [0.4, 0.4, 0.4, 0.4]),
        ({"warmup_steps": 4}, 6, [0.0, 0.1, 0.2, 0.3, 0.4, 0.4]),
        ({"schedule": "cosine"}, 4, [0.4, 0.347279, 0.22, 0.092721, 0.04]),
        ({"schedule": "cosine", "warmup_steps": 2}, 4, [0.0, 0.2, 0.4, 0.22, 0.04, 0.04]),
    ],
)
def test_learning_rates(change, steps, want):
    schedule = train.learning_rate(OptimizerConfig(learning_rate=0.4, **change), steps)
    got = [float(schedule(step)) for step in range(len(want))]
    assert_close(got, want, 2e-6)


# --- the step -------------------------------------------------------------------------------------


RATIOS = {"ratio_min", "ratio_mean", "ratio_max", "ratio_max_deviation", "clip_fraction"}


@pytest.fixture(scope="module")
def one_device():
    return Machine(1, 1, {})


@pytest.fixture(scope="module")
def one_device_run(one_device):
    return one_device.run()


@pytest.mark.parametrize("options", [{}, {"fused": False}, {"shuffle_advantages": True}])
def test_nothing_is_sorted_in_a_step(options):
    """On a GPU a sort is dozens of small programs, each of which waits."""
    method = make_tiny_method("vapi", make_mesh(1, 1, jax.devices()[:1]), vapi=options)
    optimizer = train.make_optimizer(method.config.optimizer, 2)
    state = train.abstract_state(method, optimizer, 0)
    shardings = train.state_shardings(state, method.mesh)
    step = train.make_train_step(method, optimizer, shardings)
    traced = step.trace(state, method.frozen_shapes(), method.example_batch(BATCH))
    names = {equation.primitive.name for equation in every_equation(traced.jaxpr)}
    assert "cumsum" in names  # the measure measures: the draws are there
    assert "sort" not in names


@pytest.mark.slow
@pytest.mark.parametrize(
    ("data", "fsdp", "changes"),
    [
        (1, 1, {"microbatch_size": 4}),
        (2, 4, {}),
        (2, 4, {"microbatch_size": 8, "vapi": {"fused": False}}),
        (8, 1, {"microbatch_size": 8, "decode_chunk": 1}),
    ],
    ids=["1x1-microbatches", "2x4", "2x4-plain-microbatches", "8x1-microbatches-chunks"],
)
def test_any_mesh_and_any_cut_of_the_batch_take_the_same_steps(one_device_run, data, fsdp, changes):
    done = Machine(data, fsdp, changes).run()
    for number, (got, want) in enumerate(zip(done.metrics, one_device_run.metrics, strict=True)):
        # The plain step knows ratios, which are 1.
        assert got.keys() - want.keys() <= RATIOS
        assert got.get("ratio_max_deviation", 0.0) < 1e-5
        for name in want:
            np.testing.assert_allclose(
                got[name], want[name], rtol=2e-5, atol=2e-6, err_msg=f"step {number}: {name}"
            )
    # Advantages are differences of rewards over their spread, and what rounds there grows: up to 1.2e-5.
    assert_close(done.params, one_device_run.params, 3e-5)


@pytest.mark.slow
def test_the_steps_change_every_parameter_and_metrics_say_what_happened(one_device, one_device_run):
    start = flatten(jax.device_get(one_device.state().params))
    still = [name for name, p in one_device_run.params.items() if np.array_equal(p, start[name])]
    assert not still
    first = one_device_run.metrics[0]
    assert not [name for name in first if "ratio" in name]  # constants of a fused step
    assert first["reward"] == first["reward_mse"] < 0.0
    assert 0.0 < first["entropy"] < math.log(16)
    assert first["advantages_nonzero"] > 0.9
    assert first["learning_rate"] == pytest.approx(1e-2)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bits(one_device, one_device_run):
    again, other = one_device.run(), one_device.run(seed=1)
    assert again.metrics == one_device_run.metrics
    for name, want in one_device_run.params.items():
        np.testing.assert_array_equal(again.params[name], want)
    assert other.metrics[0]["reward"] != again.metrics[0]["reward"]


@pytest.mark.slow
def test_randomness_comes_from_the_step_number(one_device):
    found = [
        one_device.step(one_device.state(step=step), one_device.frozen, one_device.batch)[1]
        for step in (0, 5, 5)
    ]
    rewards = [float(metrics["reward"]) for metrics in found]
    assert rewards[1] == rewards[2] != rewards[0]


@pytest.mark.slow
def test_the_state_is_donated(one_device_run):
    assert one_device_run.donated


# --- several updates ------------------------------------------------------------------------------


def test_metrics_of_a_step_are_those_of_its_applied_updates():
    updates = [
        {"ratio_max": 1.0, "ratio_min": 1.0, "loss": 1.0, "grad_norm": 2.0, "nonfinite": 0.0},
        {"ratio_max": 3.0, "ratio_min": 0.5, "loss": 2.0, "grad_norm": 4.0, "nonfinite": 0.0},
        {"ratio_max": np.nan, "ratio_min": np.nan, "loss": np.nan, "grad_norm": np.inf, "nonfinite": 1.0},
    ]  # fmt: skip
    found = train.over_updates([{k: jnp.float32(v) for k, v in one.items()} for one in updates])
    assert {name: round(float(value), 3) for name, value in found.items()} == {
        "ratio_max": 3.0, "ratio_min": 0.5, "loss": 1.5, "grad_norm": 3.0, "nonfinite": 0.333,
    }  # fmt: skip
    lost = train.over_updates([{"loss": jnp.float32(7.0), "nonfinite": jnp.float32(1.0)}])
    assert (float(lost["loss"]), float(lost["nonfinite"])) == (7.0, 1.0)  # there are no others


@pytest.mark.parametrize(("name", "updates"), [("Mean", 1), ("Twice", 2)])
def test_the_learning_rate_is_of_the_step_whatever_was_applied_before(name, updates):
    """Adam moves a number by the rate where its gradient stays the same."""
    mesh = make_mesh(1, 1, jax.devices()[:1])
    rate = {"learning_rate": 0.01, "warmup_steps": 4, "eps": 1e-8}
    method = make_tiny_method(f"tests.helpers.toys:{name}", mesh, steps=8, optimizer=rate)
    optimizer = train.make_optimizer(method.config.optimizer, 8)
    state, shardings = train.init_state(method, optimizer, 0)
    step, moved, rates = train.make_train_step(method, optimizer, shardings), [], []
    for pixel in (-50.0, np.nan, -50.0, -50.0):
        before = float(state.params["mean"]["bias"][0])
        batch = shard_batch({"image": np.full((BATCH, 8, 8, 3), pixel, np.float32)}, mesh)
        state, metrics = step(state, {}, batch)
        moved.append(before - float(state.params["mean"]["bias"][0]))
        rates.append(float(metrics["learning_rate"]))
    assert rates == pytest.approx([0.0, 0.0025, 0.005, 0.0075])
    want = [0.0, 0.0, updates * 0.005, updates * 0.0075]
    assert moved == pytest.approx(want, rel=1e-3, abs=1e-6)


# --- health ---------------------------------------------------------------------------------------

HEALTHY = {
    "grad_norm": 0.1, "advantages_nonzero": 1.0, "ratio_max_deviation": 0.0, "reward": -0.5,
    "reward_group_std": 0.01,
}  # fmt: skip


@pytest.fixture(scope="module")
def vapi_task():
    return make_tiny_method("vapi", make_mesh())


def test_a_healthy_step_passes(vapi_task):
    vapi_task.check_health(1, HEALTHY)
    vapi_task.check_health(1, {**HEALTHY, "ratio_max_deviation": 0.01})  # bfloat16 rounding


@pytest.mark.parametrize("norm", [0.0, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", ["vapi", "base"])
def test_a_gradient_that_is_zero_or_not_finite_stops_the_run(kind, norm):
    with pytest.raises(HealthError, match="step 7.*gradient"):
        make_tiny_method(kind, make_mesh()).check_health(7, {**HEALTHY, "grad_norm": norm})


def test_equal_rewards_everywhere_stop_the_run(vapi_task):
    with pytest.raises(HealthError, match="step 3.*samples"):
        vapi_task.check_health(3, {**HEALTHY, "advantages_nonzero": 0.0})
    # Or they differ by what places in a batch do.
    with pytest.raises(HealthError, match="step 3.*samples"):
        vapi_task.check_health(3, {**HEALTHY, "reward_group_std": 3e-8})
    vapi_task.check_health(3, {**HEALTHY, "reward_group_std": 1e-5})
    make_tiny_method("sft", vapi_task.mesh).check_health(3, {"grad_norm": 0.1})  # has no advantages


@pytest.mark.parametrize("deviation", [0.03, 5.0, math.nan])
def test_a_first_ratio_off_one_stops_the_run(vapi_task, deviation):
    with pytest.raises(HealthError, match="step 2.*ratio"):
        vapi_task.check_health(2, {**HEALTHY, "ratio_max_deviation": deviation})
    dropout = make_tiny_method("vapi", vapi_task.mesh, preset="reference")
    dropout.check_health(2, {**HEALTHY, "ratio_max_deviation": 0.5})  # dropout moves it rightly


def test_messages_say_what_to_look_at(vapi_task):
    with pytest.raises(HealthError, match="entropy"):
        vapi_task.check_health(1, {**HEALTHY, "advantages_nonzero": 0.0})
    with pytest.raises(HealthError, match="learning rate"):
        vapi_task.check_health(1, {**HEALTHY, "grad_norm": math.nan})
