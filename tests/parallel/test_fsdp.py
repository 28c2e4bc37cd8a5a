"""Parameters gathered a layer at a time, gradients scattered: in numbers, and in the compiled step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests.helpers.compare import assert_close
from tests.helpers.jaxprs import every_equation, largest_intermediate
from tests.helpers.tiny import BATCH, Machine
from vapi_jax.bench.hlo import collectives
from vapi_jax.common.trees import flatten, unflatten
from vapi_jax.models.policies import make_policy
from vapi_jax.parallel import fsdp
from vapi_jax.parallel.sharding import make_mesh, tree_shardings

LAYERS, WIDTH = 3, 16


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(2, 4)


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    shapes = {
        "layers/feed_forward/w1/kernel": (LAYERS, WIDTH, WIDTH),
        "layers/ffn_norm/scale": (LAYERS, WIDTH),
        "output/kernel": (WIDTH, 8),
    }
    return unflatten({k: (rng.normal(size=s) * 0.3).astype(np.float32) for k, s in shapes.items()})


def model(params, x):
    def layer(x, p):
        p = fsdp.assemble(p)
        hidden = jnp.tanh(x * p["ffn_norm"]["scale"] @ p["feed_forward"]["w1"]["kernel"])
        return x + hidden, None

    x, _ = jax.lax.scan(layer, x, params["layers"])
    return jnp.square(x @ params["output"]["kernel"]).mean()


def test_gradients_of_shards_are_those_of_the_whole_model(mesh, params):
    images = np.random.default_rng(1).normal(size=(16, WIDTH)).astype(np.float32)
    want = flatten(jax.grad(model)(params, images))
    layout = tree_shardings(params, mesh)
    specs = jax.tree.map(lambda s: s.spec, layout)
    assert specs["layers"]["feed_forward"]["w1"]["kernel"] == P(None, "fsdp", None)

    def local(params, images):
        grads = jax.grad(lambda p: model(fsdp.view(p, specs, "float32"), images))(params)
        assert grads["layers"]["feed_forward"]["w1"]["kernel"].shape == (LAYERS, WIDTH // 4, WIDTH)
        return fsdp.mean_gradients(grads, specs, mesh)

    run = jax.jit(
        jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(specs, P(("data", "fsdp"))),
            out_specs=specs,
            check_vma=False,
        )
    )
    got = flatten(run(jax.device_put(params, layout), images))
    for name, array in want.items():
        assert_close(got[name], array, 3e-6)
        assert got[name].sharding.is_equivalent_to(
            NamedSharding(mesh, flatten(specs)[name]), array.ndim
        )


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_no_gathered_parameter_is_kept_for_the_backward_pass(mesh, remat):
    sizes = {"dim": 32, "n_layer": LAYERS, "n_head": 2, "block_size": 16, "vocab_size": 64}
    policy = make_policy("class", **sizes, remat=remat)
    shapes = jax.eval_shape(policy.init, jax.random.key(0))
    specs = jax.tree.map(lambda s: s.spec, tree_shardings(shapes, mesh))
    kept = []
    whole = [leaf.shape for path, leaf in flatten(shapes).items() if "layers/" in path]
    whole = {shape for shape in whole if len(shape) == 3}

    def local(params, labels, context):
        _, backward = jax.vjp(
            lambda p: policy.hidden(fsdp.view(p, specs, "float32"), labels, context), params
        )
        kept.extend(x.shape for x in jax.tree.leaves(backward))
        return labels

    batch = P(("data", "fsdp"))
    run = jax.shard_map(
        local, mesh=mesh, in_specs=(specs, batch, batch), out_specs=batch, check_vma=False
    )
    jax.eval_shape(
        run, shapes, jax.ShapeDtypeStruct((8,), "int32"), jax.ShapeDtypeStruct((8, 15), "int32")
    )
    assert len(whole) == 4  # wqkv, wo, w1 and w3, w2
    assert (LAYERS, 1, 16, 32) in kept  # the measure measures: every layer's input
    assert not set(kept) & whole


def test_devices_shares_of_a_gradient_are_added_in_float32(mesh):
    """Each device's 1 + 1/128 takes all of bfloat16's bits: a sum of four in bfloat16 would lose some."""
    share = 1 + 1 / 128
    specs = {"output": {"kernel": P("fsdp", None)}}

    def local(params, images):
        def loss(params):
            whole = fsdp.view(params, specs, "bfloat16")["output"]["kernel"].astype("bfloat16")
            return (whole * images[0, 0]).sum().astype("float32")

        return fsdp.mean_gradients(jax.grad(loss)(params), specs, mesh)

    run = jax.shard_map(
        local, mesh=mesh, in_specs=(specs, P(("data", "fsdp"))), out_specs=specs, check_vma=False
    )
    rows = np.full((8, 1), share, "float32").astype("bfloat16")
    rows[0] = 256.0  # beside which bfloat16 sees no 1
    got = jax.jit(run)({"output": {"kernel": jnp.ones((8, 2))}}, rows)
    np.testing.assert_array_equal(got["output"]["kernel"], (256 + 7 * share) / 8)


# --- the compiled step ----------------------------------------------------------------------------

MICROBATCHES, FSDP = 2, 8
POLICY = {"dim": 48, "remat": "full"}  # a width that nothing in the tokenizer has


@pytest.fixture(scope="module")
def step():
    changes = {"microbatch_size": BATCH // MICROBATCHES, "policy": POLICY}
    machine = Machine(1, FSDP, changes)
    state = machine.state()
    args = (state, machine.frozen, machine.batch)
    text = machine.step.lower(*args).compile().as_text()
    jaxpr = jax.make_jaxpr(machine.step)(*args).jaxpr
    specs = flatten(jax.tree.map(lambda s: s.spec, machine.shardings.params))
    sizes = {name: 4 * leaf.size for name, leaf in flatten(state.params).items()}
    split = {name: size for name, size in sizes.items() if "fsdp" in specs[name]}
    return machine, collectives(text), jaxpr, split, sum(sizes.values()) - sum(split.values())


def total_bytes(found):
    """What devices hold after all executions."""
    return sum(c.result_bytes * c.executions for c in found)


def split_bytes(split, where):
    """float32 bytes of the parameters that are split over devices, layers or the others."""
    return sum(n for k, n in split.items() if k.startswith("layers/") == (where == "layers"))


@pytest.mark.slow
def test_parameters_are_gathered_where_they_are_used_and_nowhere_whole(step):
    machine, found, _, split, _ = step
    gathers = [c for c in found if c.kind == "all-gather" and "all_gather" in c.op_name]
    layers = machine.task.policy.config.n_layer
    largest = max(n // layers for name, n in split.items() if name.startswith("layers/"))
    inside = [c for c in gathers if c.executions > 1]
    assert max(c.result_bytes for c in inside) <= largest  # one layer's matrix
    # Forward, and again in the backward pass, of every microbatch. The others are the same for all.
    assert total_bytes(inside) == 2 * MICROBATCHES * split_bytes(split, "layers")
    outside = [c for c in gathers if c.executions == 1]
    assert total_bytes(outside) == split_bytes(split, "others")


@pytest.mark.slow
def test_every_gradient_is_scattered_where_it_is_made(step):
    machine, found, jaxpr, split, whole = step
    scatters = [c for c in found if c.kind == "reduce-scatter"]
    everything = split_bytes(split, "layers") + split_bytes(split, "others")
    # The result of a reduce-scatter is one device's share.
    assert total_bytes(scatters) * FSDP == MICROBATCHES * everything
    assert max(c.result_bytes for c in scatters) * FSDP <= max(split.values())
    stacked = {leaf.shape for leaf in jax.tree.leaves(machine.state().params["layers"])}
    stacked = {shape for shape in stacked if len(shape) == 3}
    assert stacked
    assert not stacked & set(shapes_on_a_device(jaxpr))
    others = [c for c in found if c.kind == "all-reduce" and c.group_size > 1]
    assert {c.executions for c in others} == {1}
    assert total_bytes(others) < whole + 400  # norms, and the scalars of metrics and clipping


@pytest.mark.slow
def test_the_reward_path_communicates_nothing(step):
    found = step[1]
    assert not [
        c for c in found if any(part in c.op_name for part in ("decode", "encode", "lpips"))
    ]
    assert {c.kind for c in found} == {"all-gather", "reduce-scatter", "all-reduce"}


@pytest.mark.slow
def test_the_policy_runs_one_sequence_an_image(step):
    """Nothing of the transformer's width has a row for each of the B·G samples."""
    machine, _, jaxpr, _, _ = step
    config, policy = machine.task.config, machine.task.policy.config
    images = config.microbatch_size // FSDP
    sequences = images * config.options.group_size
    shapes = set(hidden_shapes(jaxpr, policy.dim))
    assert any(shape[0] == images for shape in shapes)
    assert not [shape for shape in shapes if shape[0] == sequences]
    plain = Machine(1, 1, {"vapi": {"fused": False}, "policy": POLICY})
    traced = plain.step.trace(plain.state(), plain.frozen, plain.batch).jaxpr.jaxpr
    rows = {shape[0] for shape in hidden_shapes(traced, policy.dim)}
    assert BATCH * config.options.group_size in rows  # the measure measures
    assert largest_intermediate(traced) > largest_intermediate(jaxpr)


def shapes_on_a_device(jaxpr):
    """Of everything that is computed inside of `shard_map`."""
    for outer in every_equation(jaxpr):
        if outer.primitive.name == "shard_map":
            for equation in every_equation(outer.params["jaxpr"]):
                yield from (v.aval.shape for v in equation.outvars if hasattr(v.aval, "shape"))


def hidden_shapes(jaxpr, dim):
    """[B, S, dim] shapes in a jaxpr, those inside loops included."""
    for equation in jaxpr.eqns:
        for v in equation.outvars:
            if getattr(v.aval, "ndim", 0) == 3 and v.aval.shape[-1] == dim:
                yield v.aval.shape
        for value in equation.params.values():
            for inner in value if isinstance(value, list | tuple) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from hidden_shapes(inner, dim)
