"""Collectives and FLOPs read from HLO: a literal module, and programs compiled for eight devices."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from vapi_jax.bench import hlo
from vapi_jax.bench.hlo_flops import matmul_flops, products, taps
from vapi_jax.parallel.sharding import make_mesh

# Four devices. An all-gather in a loop of 3 inside a loop of 5, one in the inner condition, an
# asynchronous pair, a wrapped one, a tuple, and a group of one device.
MODULE = """HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[8]{0})->f32[8]{0}}, num_partitions=4

FileNames
1 "step.py"

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%wrapped (p: bf16[16,2]) -> bf16[4,2] {
  %p = bf16[16,2]{1,0} parameter(0)
  ROOT %rs = bf16[4,2]{1,0} reduce-scatter(%p), channel_id=9, replica_groups=[1,4]<=[4], dimensions={0}, to_apply=%sum
}

%inner_body (t: (s32[], f32[2,3])) -> (s32[], f32[2,3]) {
  %t = (s32[], /*index=1*/f32[2,3]{1,0}) parameter(0)
  %x = f32[2,3]{1,0} get-tuple-element(%t), index=1
  %gather = f32[8,3]{1,0:T(8,128)S(1)} all-gather(%x), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}, use_global_device_ids=true, metadata={op_name="jit(step)/while/body/\\"quoted\\"/all_gather" stack_frame_id=7}
  ROOT %out = (s32[], f32[2,3]{1,0}) tuple(%i, %x)
}

%inner_condition (t: (s32[], f32[2,3])) -> pred[] {
  %t.1 = (s32[], f32[2,3]{1,0}) parameter(0)
  %max = f32[] all-reduce(%y), replica_groups={}, to_apply=%sum
  ROOT %less = pred[] compare(%i.1, %c), direction=LT
}

%outer_body (t: (s32[], f32[2,3])) -> (s32[], f32[2,3]) {
  %t.2 = (s32[], f32[2,3]{1,0}) parameter(0)
  ROOT %while.1 = (s32[], f32[2,3]{1,0}) while(%t.2), condition=%inner_condition, body=%inner_body, backend_config={"known_induction_variable":{"tuple_index":"0"},"known_trip_count":{"n":"3"}}
}

%outer_condition (t: (s32[], f32[2,3])) -> pred[] {
  ROOT %less.1 = pred[] compare(%i.2, %c.1), direction=LT
}

%free_body (t: f32[4]) -> f32[4] {
  %q = f32[4]{0} parameter(0)
  ROOT %swap = f32[4]{0} collective-permute(%q), channel_id=3, source_target_pairs={{0,1},{1,0}}
}

%free_condition (t: f32[4]) -> pred[] {
  ROOT %known.1 = pred[] constant(false)
}

ENTRY %main (p0: f32[8]) -> f32[8] {
  %p0 = f32[8]{0} parameter(0)
  %while.2 = (s32[], f32[2,3]{1,0}) while(%init), condition=%outer_condition, body=%outer_body, backend_config={"known_trip_count":{"n":"5"}}
  %while.3 = f32[4]{0} while(%p0), condition=%free_condition, body=%free_body
  %ar = (f32[], f32[10]{0}, /*index=2*/bf16[3]{0}) all-reduce(%s, %v, %w), channel_id=2, replica_groups=mesh['data'=2,'fsdp'=2] {'fsdp'}, to_apply=%sum, metadata={op_name="jit(step)/psum"}
  %alone = f32[100]{0} all-reduce(%p0), replica_groups={{0},{1},{2},{3}}, to_apply=%sum
  %ag-start = (bf16[4]{0}, bf16[16]{0}) all-gather-start(%z), channel_id=4, replica_groups={{0,1,2,3}}, dimensions={0}
  %ag-done = bf16[16]{0} all-gather-done(%ag-start)
  %rs-start = ((bf16[16,2]{1,0}), bf16[4,2]{1,0}) async-start(%u), calls=%wrapped
  %rs-done = bf16[4,2]{1,0} async-done(%rs-start)
  ROOT %r = f32[8]{0} copy(%p0)
}
"""  # noqa: E501


def test_a_literal_module_by_hand():
    found = {one.name: one for one in hlo.collectives(MODULE)}
    assert set(found) == {"gather", "max", "swap", "ar", "alone", "ag-start", "rs"}
    gather = found["gather"]
    assert (gather.kind, gather.executions, gather.exact) == ("all-gather", 15, True)
    assert (gather.operand_bytes, gather.result_bytes) == (24, 96)
    assert gather.op_name == r"jit(step)/while/body/\"quoted\"/all_gather"
    assert gather.sent_bytes == 15 * 72
    assert (found["max"].executions, found["max"].group_size) == (5 * 4, 4)  # asked once more
    assert (found["swap"].executions, found["swap"].exact) == (1, False)
    assert found["swap"].sent_bytes == 16
    ar = found["ar"]
    assert (ar.operand_bytes, ar.group_size, ar.dtypes) == (4 + 40 + 6, 2, ("f32", "bf16"))
    assert ar.sent_bytes == 50
    assert (found["alone"].group_size, found["alone"].sent_bytes) == (1, 0)
    start = found["ag-start"]
    assert (start.kind, start.operand_bytes, start.result_bytes) == ("all-gather", 8, 32)
    scatter = found["rs"]
    assert (scatter.operand_bytes, scatter.result_bytes, scatter.group_size) == (64, 16, 4)
    assert scatter.sent_bytes == 48


def test_totals_leave_out_what_one_device_does_alone():
    totals = hlo.totals(hlo.collectives(MODULE))
    assert totals["all-gather"] == hlo.Total(
        ("bf16", "f32"), 16, 15 * 24 + 8, 15 * 96 + 32, 15 * 72 + 24
    )
    assert totals["all-reduce"].executions == 21
    assert totals["all-reduce"].operand_bytes == 20 * 4 + 50


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("replica_groups={{0,1,2},{3,4,5}}", 3),
        ("replica_groups={ {0}, {1} }", 1),
        ("replica_groups={}", 8),
        ("replica_groups=[2,4]<=[8]", 4),
        ("replica_groups=[4,2]<=[2,4]T(1,0), dimensions={1}", 2),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", 8),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}, to_apply=%x", 4),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}", 2),
        ("dimensions={0}", 8),
    ],
)
def test_replica_groups_in_every_notation(groups, size):
    assert hlo.group_size(f"channel_id=1, {groups}", 8) == size


@pytest.mark.parametrize(
    ("groups", "message"),
    [("replica_groups=<4>", "notation"), ("replica_groups=mesh['a'=2] {'c'}", "lack")],
)
def test_replica_groups_that_mean_nothing_are_errors(groups, message):
    with pytest.raises(hlo.HloError, match=message):
        hlo.group_size(groups, 8)


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("f32[]", 4),
        ("bf16[3,5]{1,0:T(8,128)(2,1)}", 30),
        ("(f32[2]{0}, (s32[], pred[7]{0}))", 8 + 4 + 7),
        ("s4[3]{0}", 2),
        ("f8e4m3fn[10]{0}", 10),
        ("c64[2]{0}", 16),
        ("token[]", 0),
        ("f32[0,4]{1,0}", 0),
    ],
)
def test_bytes_of_shapes(shape, size):
    assert hlo.shape_bytes(shape) == size


@pytest.mark.parametrize("text", ["", "module @jit_f {\n}", "HloModule empty\n"])
def test_other_text_is_refused(text):
    with pytest.raises(hlo.HloError, match="ENTRY"):
        hlo.collectives(text)


def test_an_unknown_element_type_is_refused():
    with pytest.raises(hlo.HloError, match="q7"):
        hlo.shape_bytes("q7[3]{0}")


# --- programs for eight devices -------------------------------------------------------------------


WHOLE = P()


def compiled_text(function, *specs, out=WHOLE, args=()):
    mesh = make_mesh(2, 4)
    mapped = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)
    return jax.jit(mapped).lower(*args).compile().as_text()


@pytest.fixture(scope="module")
def nested():
    """Gathers in a loop of 3 within one of 5, a psum in the outer, a scatter and a psum outside."""

    def step(x, y):
        def inner(carry, _):
            gathered = jax.lax.all_gather(carry, "fsdp", tiled=True)  # [2, 6] -> [8, 6]
            return jnp.sin(gathered[:2] + carry), None

        def outer(carry, _):
            carry, _ = jax.lax.scan(inner, carry, length=3)
            return carry + jax.lax.psum(carry, ("data", "fsdp")), None

        x, _ = jax.lax.scan(outer, x, length=5)
        scattered = jax.lax.psum_scatter(y, "fsdp", tiled=True)  # [16] -> [4]
        return x.sum() + jax.lax.psum(scattered, "data").sum()

    args = jnp.ones((16, 6)), jnp.ones(16)
    return compiled_text(step, P(("data", "fsdp")), P(), args=args)


def test_nested_loops_multiply(nested):
    found = hlo.collectives(nested)
    assert all(one.exact for one in found)
    gathers = [one for one in found if one.kind == "all-gather"]
    assert [(one.executions, one.operand_bytes, one.result_bytes) for one in gathers] == [
        (15, 48, 192)
    ]
    assert gathers[0].group_size == 4
    assert "all_gather" in gathers[0].op_name
    assert gathers[0].dtypes == ("f32",)
    sums = {(one.executions, one.operand_bytes, one.group_size) for one in found
            if one.kind == "all-reduce"}  # fmt: skip
    assert sums == {(5, 48, 8), (1, 16, 2)}
    (scatter,) = [one for one in found if one.kind == "reduce-scatter"]
    assert (scatter.executions, scatter.operand_bytes, scatter.result_bytes) == (1, 64, 16)


def test_totals_of_nested_loops(nested):
    totals = hlo.totals(hlo.collectives(nested))
    assert totals["all-gather"].sent_bytes == 15 * 192 * 3 / 4
    assert totals["all-reduce"].sent_bytes == 5 * 2 * 48 * 7 / 8 + 2 * 16 / 2
    assert totals["reduce-scatter"].sent_bytes == 64 * 3 / 4


def test_a_loop_of_unknown_length_is_said_to_be_inexact():
    def step(x):
        return jax.lax.while_loop(lambda v: v.sum() < 100.0, lambda v: jax.lax.psum(v, "fsdp"), x)

    text = compiled_text(step, P(), args=(jnp.ones(3),))
    (found,) = [one for one in hlo.collectives(text) if one.kind == "all-reduce"]
    assert (found.executions, found.exact, found.operand_bytes) == (1, False, 12)


def test_both_branches_count_and_are_said_to_be_inexact():
    def step(x, flag):
        return jax.lax.cond(flag[0] > 0.0, lambda v: jax.lax.psum(v, "fsdp"), lambda v: 2 * v, x)

    text = compiled_text(step, P(), P(), args=(jnp.ones(3), jnp.ones(1)))
    (found,) = [one for one in hlo.collectives(text) if one.kind == "all-reduce"]
    assert (found.executions, found.exact) == (1, False)


def test_all_to_all_and_permutation():
    def step(x):
        x = jax.lax.all_to_all(x, "fsdp", 0, 0, tiled=True)
        return jax.lax.ppermute(x, "fsdp", [(0, 1), (1, 2), (2, 3), (3, 0)])

    text = compiled_text(step, P(None, "data"), out=P(None, "data"), args=(jnp.ones((4, 6)),))
    totals = hlo.totals(hlo.collectives(text))
    assert totals["all-to-all"].sent_bytes == 48 * 3 / 4
    assert totals["collective-permute"].sent_bytes == 48


def test_one_device_communicates_nothing():
    text = jax.jit(lambda x: x @ x).lower(jnp.ones((4, 4))).compile().as_text()
    assert hlo.collectives(text) == []


# --- FLOPs ----------------------------------------------------------------------------------------


def cost(function, *args):
    """(our count, XLA's) of a program without loops."""
    compiled = jax.jit(function).lower(*args).compile()
    return matmul_flops(compiled.as_text(), padding=False), compiled.cost_analysis()["flops"]


def conv(x, kernel, stride, pads, base=(1, 1), dilation=(1, 1), groups=1):
    return jax.lax.conv_general_dilated(
        x, kernel, stride, pads, base, dilation, ("NHWC", "HWIO", "NHWC"), groups
    )


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (jnp.matmul, [(5, 7), (7, 3)]),
        (functools.partial(jnp.einsum, "bij,bkj->bik"), [(4, 5, 6), (4, 7, 6)]),
        (functools.partial(jnp.einsum, "ijab,ba->ij"), [(2, 3, 4, 5), (5, 4)]),
        (functools.partial(conv, stride=(1, 1), pads="SAME"), [(2, 6, 6, 3), (3, 3, 3, 8)]),
        (
            functools.partial(conv, stride=(2, 1), pads=((0, 1), (2, 0))),
            [(2, 7, 5, 3), (3, 2, 3, 4)],
        ),
        (
            functools.partial(conv, stride=(1, 2), pads=((1, 2), (0, 0)), dilation=(2, 1)),
            [(1, 9, 8, 4), (3, 3, 4, 2)],
        ),
        (
            functools.partial(conv, stride=(1, 1), pads=((1, 1), (1, 1)), base=(2, 3)),
            [(1, 4, 5, 2), (3, 3, 2, 3)],
        ),
        (
            functools.partial(conv, stride=(1, 1), pads="SAME", groups=2),
            [(1, 5, 5, 4), (3, 3, 2, 6)],
        ),
    ],
    ids=["matmul", "batched", "two-axes", "conv", "strided", "dilated", "transposed", "grouped"],
)
def test_single_operations_cost_what_xla_says(function, shapes):
    ours, xla = cost(function, *[jnp.ones(shape) for shape in shapes])
    assert ours.total == xla
    assert ours.exact


def test_a_convolution_with_and_without_its_padding():
    """On 3x3 pixels, of the 81 meetings of place and tap of a 3x3 kernel 49 miss the padding."""
    text = jax.jit(functools.partial(conv, stride=(1, 1), pads="SAME")).lower(
        jnp.ones((1, 3, 3, 2)), jnp.ones((3, 3, 2, 5))
    ).compile().as_text()  # fmt: skip
    assert matmul_flops(text).convolution == 2 * 81 * 2 * 5
    assert matmul_flops(text, padding=False).convolution == 2 * 49 * 2 * 5


@pytest.mark.parametrize(
    ("arguments", "with_padding", "without"),
    [
        ({"size": 4, "out": 4, "window": 3, "low": 1}, 12, 10),
        ({"size": 4, "out": 2, "window": 3, "stride": 2}, 6, 5),
        ({"size": 3, "out": 5, "window": 1, "base": 2}, 3, 3),
        ({"size": 5, "out": 1, "window": 3, "dilation": 2}, 3, 3),
    ],
)
def test_taps_by_hand(arguments, with_padding, without):
    assert taps(**arguments) == with_padding
    assert taps(**arguments, padding=False) == without


def test_loops_count_as_often_as_they_run_where_xla_counts_once():
    def layers(x, w):
        def body(x, w):
            return jnp.tanh(x @ w), None

        return jax.lax.scan(body, x, w)[0]

    compiled = jax.jit(layers).lower(jnp.ones((8, 16)), jnp.ones((6, 16, 16))).compile()
    once = 2 * 8 * 16 * 16
    assert matmul_flops(compiled.as_text()).dot == 6 * once
    assert compiled.cost_analysis()["flops"] < 2 * once


GPU_CALLS = """HloModule jit_f, num_partitions=1

ENTRY %main (p0: bf16[64,32]) -> bf16[64,16] {
  %p0 = bf16[64,32]{1,0} parameter(0)
  %p1 = bf16[32,16]{1,0} parameter(1)
  %gemm = (bf16[64,16]{1,0}, s8[4194304]{0}) custom-call(%p0, %p1), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"alpha_real":1,"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"],"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]},"epilogue":"DEFAULT"}}
  %image = bf16[2,8,8,4]{3,2,1,0} parameter(2)
  %kernel = bf16[6,3,3,4]{3,2,1,0} parameter(3)
  %cudnn = (bf16[2,8,8,6]{3,2,1,0}, u8[0]{0}) custom-call(%image, %kernel), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convForward", backend_config={}
  %small = bf16[2,4,4,5]{3,2,1,0} parameter(5)
  %wide = bf16[5,4,4,7]{3,2,1,0} parameter(6)
  %dx = (bf16[2,8,8,7]{3,2,1,0}, u8[0]{0}) custom-call(%small, %wide), window={size=4x4 stride=2x2 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardInput", backend_config={}
  %large = bf16[2,8,8,3]{3,2,1,0} parameter(7)
  %dk = (bf16[5,4,4,3]{3,2,1,0}, u8[0]{0}) custom-call(%large, %small), window={size=4x4 stride=2x2 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardFilter", backend_config={}
  %q = bf16[4,128,12,64]{3,2,1,0} parameter(4)
  %fmha = (bf16[4,12,128,64]{3,1,2,0}, u8[0]{0}) custom-call(%q, %q, %q), custom_call_target="__cudnn$fmhaSoftmax", backend_config={"cudnn_fmha_backend_config":{"algorithm":{"algo_id":"0"},"fmha_scale":0.125,"intermediate_tensor_shape":{"element_type":"BF16","dimensions":["4","12","128","128"],"tuple_shapes":[]}}}
  %back = (bf16[4,12,128,64]{3,1,2,0}, u8[0]{0}) custom-call(%q, %q, %q), custom_call_target="__cudnn$fmhaSoftmaxBackward", backend_config={"cudnn_fmha_backend_config":{"intermediate_tensor_shape":{"element_type":"BF16","dimensions":["4","12","128","128"]}}}
  %sorted = f32[7]{0} custom-call(%p0), custom_call_target="__cub$DeviceRadixSort"
  ROOT %out = bf16[64,16]{1,0} get-tuple-element(%gemm), index=0
}
"""  # noqa: E501


def test_library_calls_on_gpus_by_hand():
    found = matmul_flops(GPU_CALLS)
    attention = 4 * 12 * 128 * 128 * 64 * 2
    assert found.dot == 2 * 64 * 16 * 32 + (2 + 5) * attention
    # Forward 8x8 places; the gradients' convolution has 4x4 places of 4x4 taps.
    assert found.convolution == 2 * 2 * (64 * 6 * 9 * 4 + 16 * 5 * 16 * 7 + 16 * 5 * 16 * 3)
    assert found.uncounted == {"__cub$DeviceRadixSort": 1}


def test_attention_without_the_shape_of_its_scores_is_an_error():
    with pytest.raises(hlo.HloError, match="scores"):
        matmul_flops(GPU_CALLS.replace("intermediate_tensor_shape", "shape"))


def test_library_calls_printed_with_spaces_are_read_alike():
    spaced = GPU_CALLS.replace('":', '": ')
    assert spaced != GPU_CALLS
    assert matmul_flops(spaced) == matmul_flops(GPU_CALLS)
    assert hlo.instructions(MODULE.replace('":', '": ')) != []
    executions = {one.name: one.executions for one in hlo.instructions(MODULE.replace('":', '": '))}
    assert executions["gather"] == 15


# A scan of six on a TPU: no trip count is printed, one gather is fused with what runs beside it, and the
# attributes of a Pallas kernel go over lines.
TPU = """HloModule jit_f, num_partitions=4

%start (s: bf16[4,2]) -> (bf16[4,2], bf16[16,2]) {
  %s = bf16[4,2]{1,0:T(8,128)} parameter(0)
  %g.1 = bf16[16,2]{1,0:T(8,128)} all-gather(%s), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %c.1 = (bf16[4,2]{1,0}, bf16[16,2]{1,0}) custom-call(%g.1), custom_call_target="AsyncCollectiveStart"
}

%beside (s.1: bf16[4,2], x: f32[8,16]) -> (f32[8,2], bf16[16,2]) {
  %s.1 = bf16[4,2]{1,0:T(8,128)} parameter(0)
  %x = f32[8,16]{1,0:T(8,128)} parameter(1)
  %w = f32[16,2]{1,0:T(8,128)} constant({...})
  %fast = f32[8,2]{1,0:T(8,128)} convolution(%x, %w), dim_labels=bf_io->bf
  %exact = f32[8,2]{1,0:T(8,128)} convolution(%x, %w), dim_labels=bf_io->bf, operand_precision={highest,highest}
  %g.2 = bf16[16,2]{1,0:T(8,128)} all-gather(%s.1), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %t = (f32[8,2]{1,0}, bf16[16,2]{1,0}) tuple(%exact, %g.2)
}

%body (p: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %p = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}) parameter(0)
  %kernel = bf16[4,2]{1,0} custom-call(%p), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
}}, metadata={op_name="jit(f)/while/body/pallas_call"}
  %f.1 = (bf16[4,2]{1,0}, bf16[16,2]{1,0}) fusion(%p), kind=kCustom, calls=%start
  ROOT %f.2 = (f32[8,2]{1,0}, bf16[16,2]{1,0}) fusion(%f.1, %p), kind=kOutput, calls=%beside
}

%condition (p.1: (s32[], f32[8,16])) -> pred[] {
  %limit = s32[]{:T(128)} constant(6), metadata={op_name="jit(f)/while"}
  %p.1 = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

ENTRY %main (a: f32[8,16]) -> f32[8,16] {
  %a = f32[8,16]{1,0:T(8,128)} parameter(0)
  ROOT %loop = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}) while(%a), condition=%condition, body=%body
}
"""  # noqa: E501


def test_a_loop_of_a_tpu_runs_as_often_as_its_condition_says():
    found = {one.name: one for one in hlo.instructions(TPU)}
    assert (found["exact"].executions, found["exact"].exact) == (6, True)
    assert found["limit"].literal == "6" and found["lt"].executions == 7
    other = TPU.replace("direction=LT", "direction=NE")
    assert not {one.name: one.exact for one in hlo.instructions(other)}["exact"]


def test_a_gather_fused_with_what_runs_beside_it_counts_once():
    (gather,) = hlo.collectives(TPU)
    assert (gather.name, gather.executions, gather.result_bytes) == ("g.1", 6, 64)
    apart = TPU.replace(', frontend_attributes={chain_id="0"}', "")
    assert len(hlo.collectives(apart)) == 2


SCATTER = """HloModule jit_f, num_partitions=4

%scatter (g: f32[14,8]) -> f32[4,8] {
  %g = f32[14,8]{1,0} parameter(0)
  %zero = f32[] constant(0)
  %even = f32[16,8]{1,0} pad(%g, %zero), padding=0_2x0_0
  %all = f32[16,8]{1,0} all-reduce(%even), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%sum
  ROOT %part = f32[4,8]{1,0} dynamic-slice(%all, %at, %zero), dynamic_slice_sizes={4,8}
}

ENTRY %main (a: f32[14,8]) -> f32[4,8] {
  %a = f32[14,8]{1,0} parameter(0)
  ROOT %f = f32[4,8]{1,0} fusion(%a), kind=kCustom, calls=%scatter, backend_config={"collective_algorithm_config":{"emitter":"SingleInputAllReduceScatterFusion"}}
}
"""  # noqa: E501


def test_a_sum_fused_with_the_slice_that_is_taken_of_it_is_a_scatter():
    (found,) = hlo.collectives(SCATTER)
    assert (found.kind, found.operand_bytes, found.result_bytes) == ("reduce-scatter", 512, 128)
    assert found.sent_bytes == 3 * 128
    (whole,) = hlo.collectives(SCATTER.replace("AllReduceScatterFusion", "AllReduceFusion"))
    assert (whole.kind, whole.sent_bytes) == ("all-reduce", 2 * 3 * 128)


def test_products_at_float32_speed():
    found, _ = products(TPU)
    assert [(one.instruction.name, one.slow, one.flops) for one in found] == [
        ("fast", False, 6 * 2 * 8 * 16 * 2),  # a TPU takes bfloat16 unless it is told
        ("exact", True, 6 * 2 * 8 * 16 * 2),
    ]
    assert not any(one.slow for one in products(GPU_CALLS)[0])
    wide = GPU_CALLS.replace("bf16[64,32]", "f32[64,32]").replace("bf16[32,16]", "f32[32,16]")
    assert [one.instruction.name for one in products(wide)[0] if one.slow] == ["gemm"]
