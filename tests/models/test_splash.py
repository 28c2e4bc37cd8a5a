"""The TPU's attention kernel, interpreted here: equal to XLA's attention, in value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.compare import assert_close
from vapi_jax.models import splash
from vapi_jax.models.attention import attend, causal_mask
from vapi_jax.models.splash import attend_splash


def draw(length):
    """Queries of four heads, keys and values of two, as wide as LlamaGen's."""
    rng = np.random.default_rng(0)
    shapes = [(2, length, heads, 64) for heads in (4, 2, 2)]
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def with_gradients(function, arrays, weight):
    def scalar(*arrays):
        out = function(*arrays)
        return (out * weight).sum(), out

    gradients, out = jax.grad(scalar, argnums=(0, 1, 2), has_aux=True)(*arrays)
    return [out, *gradients]


@pytest.mark.parametrize(("length", "block"), [(100, 640), (200, 128)], ids=["one", "several"])
def test_it_is_causal_attention(length, block, monkeypatch):
    monkeypatch.setattr(splash, "BLOCK", block)
    arrays = draw(length)
    weight = np.random.default_rng(1).normal(size=arrays[0].shape).astype(np.float32)
    got = with_gradients(lambda *x: attend_splash(*x, interpret=True), arrays, weight)
    want = with_gradients(lambda *x: attend(*x, None, "xla"), arrays, weight)
    for one, other in zip(got, want, strict=True):
        assert_close(one, other, 1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_the_prefix_is_hidden(side):
    """Every row that sees anything is as with the mask, padding's own too; and so are gradients."""
    length, prefix, real = 70, 20, np.array([5, 20])
    place = np.arange(prefix)
    kept = place < real[:, None] if side == "right" else place >= prefix - real[:, None]
    mask = causal_mask(jnp.asarray(kept), length)
    arrays = draw(length)
    visible = np.concatenate([kept, np.ones((2, length - prefix), bool)], axis=1)
    weight = np.random.default_rng(1).normal(size=arrays[0].shape).astype(np.float32)
    seeing = np.cumsum(visible, axis=1) > 0
    assert seeing.all() == (side == "right")
    weight *= seeing[..., None, None]  # nobody reads the others
    got = with_gradients(lambda *x: attend_splash(*x, visible, interpret=True), arrays, weight)
    want = with_gradients(lambda *x: attend(*x, mask, "xla"), arrays, weight)
    assert_close(got[0][seeing], want[0][seeing], 1e-5)
    for one, other in zip(got[1:], want[1:], strict=True):
        assert_close(one, other, 1e-5)
