"""Convolution and group normalisation: both formulations agree, options mean what they say."""

import re
from functools import partial

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, SingleDeviceSharding
from scipy.signal import correlate

from tests.helpers.compare import assert_close
from tests.helpers.compilers import optimised
from vapi_jax.bench.hlo_flops import matmul_flops
from vapi_jax.models import layers
from vapi_jax.models.layers import Conv, GroupNorm, conv2d
from vapi_jax.parallel import compiler, targets


def arrays(*shapes):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


@pytest.mark.parametrize(
    "size, window, strides, pads",
    [
        ((2, 2), (3, 3), (1, 1), ((1, 1), (1, 1))),
        ((1, 3), (3, 3), (1, 1), ((1, 1), (1, 1))),
        ((4, 4), (3, 3), (2, 2), ((0, 1), (0, 1))),
        ((5, 4), (3, 2), (2, 1), ((0, 2), (1, 0))),
        ((3, 3), (5, 5), (1, 1), ((2, 2), (2, 2))),
    ],
)
def test_formulations_agree_in_values_and_gradients(size, window, strides, pads):
    x, kernel = arrays((2, *size, 3), (*window, 3, 4))
    results = []
    for formulation in (layers._conv_lax, layers._conv_matmul):
        out, pullback = jax.vjp(lambda x, k, f=formulation: f(x, k, strides, pads), x, kernel)
        cotangent = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
        results.append((out, *pullback(cotangent)))
    for ours, reference in zip(*results, strict=True):
        assert_close(ours, reference, 2e-6)


def test_cpu_choice_follows_the_measured_rule():
    assert layers.uses_matmul((2, 2), (3, 3), (2, 2))
    assert layers.uses_matmul((2, 4), (3, 3), (2, 4))
    assert layers.uses_matmul((4, 4), (3, 3), (2, 2))  # its input gradient runs on 2x2
    assert not layers.uses_matmul((3, 3), (3, 3), (3, 3))
    assert not layers.uses_matmul((1, 1), (1, 1), (1, 1))
    assert not layers.uses_matmul((32, 32), (11, 11), (7, 7))


@pytest.mark.parametrize("side", [2, 6])
def test_the_operation_is_the_one_that_the_compiled_platform_wants(side):
    """Forward and backward, traced on a CPU whatever it is compiled for."""
    x, kernel = arrays((1, side, side, 3), (3, 3, 3, 4))
    gradient = jax.jit(jax.grad(lambda x: jnp.square(conv2d(x, kernel)).sum()))
    for platform in ("cpu", "cuda", "tpu"):
        text = jax.export.export(gradient, platforms=[platform])(x).mlir_module()
        convolves, multiplies = ("stablehlo." + op in text for op in ("convolution", "dot_general"))
        assert convolves != multiplies
        assert multiplies == (platform == "cpu" and side == 2)
    optimised = gradient.lower(x).compile().as_text()
    assert "conditional(" not in optimised


@pytest.mark.parametrize("side", [2, 6])
def test_conv2d_against_scipy(side):
    x, kernel = arrays((1, side, side, 2), (3, 3, 2, 3))
    padded = np.pad(np.asarray(x[0], np.float64), ((1, 1), (1, 1), (0, 0)))
    expected = np.stack(
        [correlate(padded, np.asarray(kernel[..., o]), "valid")[..., 0] for o in range(3)], axis=-1
    )
    for padding in ("SAME", 1, ((1, 1), (1, 1))):
        assert_close(conv2d(x, kernel, padding=padding)[0], expected, 2e-6)


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (2, 2), (5, 4)])
@pytest.mark.parametrize(
    "formulation",
    [layers._upsampled_quarters, layers._upsampled_transposed, layers.conv2d_upsampled],
)
def test_a_convolution_of_repeated_pixels_without_repeating_them(formulation, size):
    x, kernel = arrays((2, *size, 3), (3, 3, 3, 4))

    def repeated(x, kernel):
        return conv2d(x.repeat(2, axis=1).repeat(2, axis=2), kernel, padding=1)

    wanted, pullback = jax.vjp(repeated, x, kernel)
    cotangent = jnp.cos(jnp.arange(wanted.size, dtype=jnp.float32)).reshape(wanted.shape)
    got, ours = jax.vjp(formulation, x, kernel)
    assert_close((got, *ours(cotangent)), (wanted, *pullback(cotangent)), 2e-6)

    low = formulation(x.astype(jnp.bfloat16), kernel)  # sums of taps are taken in float32
    assert low.dtype == jnp.bfloat16
    assert_close(low.astype(jnp.float32), wanted, 0.015)
    if formulation is layers.conv2d_upsampled:
        with pytest.raises(ValueError, match=r"takes a kernel of \[3, 3, 2, O\]"):
            formulation(x[..., :2], kernel)


def test_gradients_over_repeated_pixels_are_as_precise_as_what_they_are_of():
    def total(x, kernel):
        with jax.default_matmul_precision("highest"):
            return jnp.square(layers.conv2d_upsampled(x, kernel)).sum()

    gradients = jax.jit(jax.grad(total, (0, 1)))
    for platform in ("cpu", "cuda", "tpu"):
        text = jax.export.export(gradients, platforms=[platform])(
            *arrays((2, 4, 4, 3), (3, 3, 3, 4))
        ).mlir_module()
        found = re.findall(r"stablehlo.convolution.*", text)
        assert len(found) == (12 if platform == "cpu" else 3)
        assert all("HIGHEST" in one for one in found)


@pytest.mark.slow
@pytest.mark.parametrize(
    "target",
    [
        pytest.param("h100:1", marks=pytest.mark.targets("compile-cuda")),
        pytest.param("v5e:1x1", marks=pytest.mark.targets("compile-tpu")),
    ],
)
def test_repeated_pixels_are_never_made_and_four_products_of_nine_are_left(target):
    """Forward, and by both gradients: what a library computes, and room beside arguments and results."""
    batch, side, width = 8, 96, 256  # of VQ-16 on 384 pixels
    device = targets.open_devices(targets.parse(target))[0]
    options = compiler.options(Mesh([device], "x"))
    jit = partial(
        jax.jit,
        compiler_options=options,
        in_shardings=SingleDeviceSharding(device),
        out_shardings=SingleDeviceSharding(device),
    )
    shapes = ((batch, side, side, width), (3, 3, width, width), (batch, 2 * side, 2 * side, width))
    x, kernel, dy = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)

    def gradients(x, kernel, dy):
        return jax.vjp(layers.conv2d_upsampled, x, kernel)[1](dy)

    with optimised():
        forward = jit(layers.conv2d_upsampled).lower(x, kernel).compile()
        backward = jit(gradients).lower(x, kernel, dy).compile()
    once = 2 * batch * (2 * side) ** 2 * 4 * width**2
    assert matmul_flops(forward.as_text()).convolution == once
    assert matmul_flops(backward.as_text()).convolution == 2 * once
    if target.startswith("h100"):
        calls = [re.findall(r"__cudnn\$(\w+)", p.as_text()) for p in (forward, backward)]
        assert calls == [["convBackwardInput"], ["convForward", "convBackwardFilter"]]
        taps = 2 * 16 * width**2
        assert all(p.memory_analysis().temp_size_in_bytes < 2.5 * taps for p in (forward, backward))


def test_conv_module_parameters_dtype_and_asymmetric_padding():
    (x,) = arrays((2, 6, 6, 3))
    module = Conv(5, strides=2, padding=((0, 1), (0, 1)), dtype=jnp.bfloat16)
    params = module.init(jax.random.key(0), x)["params"]
    assert {name: (p.shape, p.dtype.name) for name, p in params.items()} == {
        "kernel": ((3, 3, 3, 5), "float32"),
        "bias": ((5,), "float32"),
    }
    out = module.apply({"params": {**params, "bias": jnp.ones(5)}}, x)
    assert out.shape == (2, 3, 3, 5) and out.dtype == jnp.bfloat16
    padded = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
    expected = conv2d(padded, params["kernel"], strides=2, padding="VALID") + 1
    assert_close(out.astype(jnp.float32), expected, 0.01)
    assert set(Conv(5, use_bias=False).init(jax.random.key(0), x)["params"]) == {"kernel"}


def test_conv2d_refuses_what_cannot_be_convolved():
    x, kernel = arrays((1, 2, 2, 3), (3, 3, 3, 4))
    with pytest.raises(ValueError, match="3x3"):
        conv2d(x, kernel, padding="VALID")
    with pytest.raises(ValueError, match="expects 3"):
        conv2d(x[..., :2], kernel)


def test_group_norm_against_numpy_with_large_mean_and_in_bfloat16():
    (x,) = arrays((2, 3, 3, 64))
    x = x + 1000.0
    scale, bias = (
        np.linspace(0.5, 2, 64, dtype=np.float32),
        np.linspace(-1, 1, 64, dtype=np.float32),
    )
    params = {"scale": scale, "bias": bias}
    assert set(GroupNorm().init(jax.random.key(0), x)["params"]) == set(params)
    groups = np.asarray(x, np.float64).reshape(2, 3, 3, 32, 2)
    mean, variance = (f(groups, axis=(1, 2, 4), keepdims=True) for f in (np.mean, np.var))
    expected = ((groups - mean) / np.sqrt(variance + 1e-6)).reshape(x.shape) * scale + bias
    assert_close(GroupNorm().apply({"params": params}, x), expected, 1e-6, scale=1000.0)

    low = GroupNorm(dtype=jnp.bfloat16).apply({"params": params}, x)
    assert low.dtype == jnp.bfloat16
    # Statistics in bfloat16 would be wrong by whole units here (spacing of bfloat16 at 1000 is 4).
    assert_close(low.astype(jnp.float32), expected, 0.01)
