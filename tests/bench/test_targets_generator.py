"""The generator's layers compiled for devices that are not here: what overlaps, and what attention writes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests.helpers.compilers import optimised
from vapi_jax.bench import hlo
from vapi_jax.bench.hlo_flops import products
from vapi_jax.models.policies import make_policy, on_devices
from vapi_jax.parallel import compiler, fsdp, targets
from vapi_jax.parallel.sharding import make_mesh, tree_shardings

TOKENS, HEADS, LAYERS = 256, 4, 4


def compiled_gradient(target, remat="full"):
    """The program of a gradient through the layers, each device with two images of its own."""
    mesh = make_mesh(1, 8, targets.open_devices(targets.parse(target)))
    sizes = {"dim": 384, "n_layer": LAYERS, "n_head": HEADS, "block_size": TOKENS}
    made = make_policy("class", **sizes, vocab_size=64, dtype="bfloat16", remat=remat)
    policy = on_devices(made, mesh, alone=True)
    shapes = jax.eval_shape(policy.init, jax.random.key(0))
    layout = tree_shardings(shapes, mesh)
    specs, rows = jax.tree.map(lambda s: s.spec, layout), P(("data", "fsdp"))

    def local(params, labels, context):
        def loss(params):
            seen = fsdp.view(params, specs, jnp.bfloat16)
            return policy.hidden(seen, labels, context).astype(jnp.float32).mean()

        return fsdp.mean_gradients(jax.grad(loss)(params), specs, mesh)

    def batch(*shape):
        return jax.ShapeDtypeStruct(shape, np.int32, sharding=NamedSharding(mesh, rows))

    params = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, layout
    )
    run = jax.shard_map(
        local, mesh=mesh, in_specs=(specs, rows, rows), out_specs=specs, check_vma=False
    )
    jitted = jax.jit(run, compiler_options=compiler.options(mesh))
    with optimised():
        return jitted.lower(params, batch(16), batch(16, TOKENS - 1)).compile().as_text()


@pytest.mark.targets("compile-cuda")
@pytest.mark.slow
def test_on_gpus_a_layers_gathers_run_under_matrix_products():
    bodies = {}
    for one in hlo.instructions(compiled_gradient("h100:8")):
        bodies.setdefault(one.computation, []).append(one)
    seen = 0
    for body in bodies.values():
        opcodes = [one.opcode for one in body]
        if body[0].executions <= 1 or "all-gather-start" not in opcodes:
            continue
        seen += 1
        begin, end = opcodes.index("all-gather-start"), opcodes.index("all-gather-done")
        between = [one for one in body[begin:end] if one.opcode in ("custom-call", "fusion")]
        assert any("dot_general" in one.op_name or "cublas" in one.attributes for one in between)
        assert opcodes.count("all-gather-start") == 1  # the layer's matrices travel as one
    assert seen == 2  # forward, and backward


@pytest.mark.targets("compile-cuda")
@pytest.mark.slow
def test_what_is_kept_for_the_backward_pass_is_computed_once():
    none, dots, full = (
        sum(one.flops for one in products(compiled_gradient("h100:8", remat))[0])
        for remat in ("none", "dots", "full")
    )
    assert none <= dots < none + 0.2 * (full - none)  # of what "full" computes again, attention


@pytest.mark.targets("compile-tpu")
@pytest.mark.slow
def test_on_tpus_no_array_of_all_pairs_is_written():
    text = compiled_gradient("v5e:2x4")
    pairs = [
        dims
        for one in hlo.instructions(text)
        for _, dims in hlo.shape_arrays(one.shape)
        if len(dims) >= 3 and dims[-2:] == (TOKENS, TOKENS)
    ]
    assert not pairs
    assert len(re.findall(r"= .* custom-call\(.*tpu_custom_call", text)) == 4  # twice, dkv and dq
