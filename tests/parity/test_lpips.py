"""LPIPS against values and gradients computed in PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.compare import assert_close, assert_close_in_norm
from vapi_jax.models import lpips as L


@pytest.fixture(scope="module")
def pairs(golden):
    data = golden.npz("lpips")
    images = {k: jnp.asarray(data[k].transpose(0, 2, 3, 1)) for k in ("a", "b")}
    return data, images["a"], images["b"]


@pytest.mark.parametrize("net, prefix", [("vgg", ""), ("alex", "alex_")])
def test_values(pairs, net, prefix):
    data, a, b = pairs
    if f"{prefix}lpips" not in data:
        pytest.skip(f"this golden set has no {prefix}lpips")
    params = L.load_lpips_params(net)

    @jax.jit
    def layers(params, a, b):
        feats_a, feats_b = (L.lpips_features(params, x, net) for x in (a, b))
        return L.lpips_layers(params, feats_a, feats_b, net)

    per_layer = np.asarray(layers(params, a, b))
    assert_close(per_layer.sum(-1), data[f"{prefix}lpips"], 2e-6)
    assert_close(per_layer, data[f"{prefix}per_layer"], 3e-6)


def test_gradient(pairs):
    data, a, b = pairs
    params = L.load_lpips_params("vgg")
    grad = jax.jit(jax.grad(lambda b, a, params: L.lpips(params, a, b).sum()))(b, a, params)
    expected = data["grad_b"].transpose(0, 2, 3, 1)
    assert_close_in_norm(grad, expected, 3e-5)
