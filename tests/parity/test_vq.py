"""The tokenizer against golden arrays of the reference: forward, tokens, losses and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.compare import assert_close, assert_close_in_norm
from tests.helpers.golden import assert_golden_gradients, make_tokenizer, nhwc
from vapi_jax.models import quantize, vq
from vapi_jax.weights.names import to_reference


@pytest.fixture(scope="module")
def tokenizer(golden):
    return make_tokenizer(golden)


@pytest.fixture(scope="module")
def forward(tokenizer):
    model, params, arrays = tokenizer
    return jax.jit(model.apply)({"params": params}, nhwc(arrays["image"]))


def test_names_round_trip(golden, tokenizer):
    _, params, _ = tokenizer
    back = to_reference(params, vq.NAME_RULES)
    theirs = golden.tensors("vq")
    assert set(back) == set(theirs) - {"quantize.codebook_used"}
    for name, tensor in back.items():
        np.testing.assert_array_equal(tensor, theirs[name], err_msg=name)


def test_latents(tokenizer, forward):
    assert_close(forward.z, nhwc(tokenizer[2]["z"]), 2e-5)


def test_tokens_are_exact(tokenizer, forward):
    model, params, arrays = tokenizer
    np.testing.assert_array_equal(forward.indices, arrays["indices"])
    encode = jax.jit(lambda p, x: model.apply({"params": p}, x, method="encode"))
    tokens = encode(params, nhwc(arrays["image"]))
    assert tokens.dtype == jnp.int32
    np.testing.assert_array_equal(tokens, arrays["indices"])


def test_quantised_latents_and_codebook(tokenizer, forward):
    model, params, arrays = tokenizer
    assert_close(forward.quantized, nhwc(arrays["quant"]), 1e-6)
    codes = model.apply({"params": params}, method="codes")
    assert_close(codes, arrays["codebook_norm"], 1e-6)
    entries = model.apply({"params": params}, arrays["random_codes"], method="lookup")
    assert_close(entries, nhwc(arrays["codebook_entry_random"]), 1e-6)


def test_reconstruction(tokenizer, forward):
    assert_close(forward.reconstruction, nhwc(tokenizer[2]["recon"]), 1e-5)


def test_decoded_tokens(tokenizer):
    model, params, arrays = tokenizer
    decode = jax.jit(lambda p, t: model.apply({"params": p}, t, method="decode_tokens"))
    for tokens, images in (
        ("indices", "decode_code_indices"),
        ("random_codes", "decode_code_random"),
    ):
        got = decode(params, arrays[tokens])
        assert_close(got, nhwc(arrays[images]), 1e-5)


@pytest.fixture(scope="module")
def training(golden):
    return make_tokenizer(golden, training=True)


def codebook_terms(out):
    return out.vq_loss + out.commit_loss + out.entropy_loss


def test_training_losses(training):
    model, params, arrays = training
    image = nhwc(arrays["image"])
    out = jax.jit(model.apply)({"params": params}, image)
    for name in ("vq_loss", "commit_loss", "entropy_loss"):
        assert_close(getattr(out, name), arrays[f"train_{name}"], 1e-5)
    total = jnp.square(out.reconstruction - image).mean()
    total += codebook_terms(out)
    assert_close(total, arrays["train_total_mse_plus_codebook"], 2e-5)
    assert_close(out.reconstruction, nhwc(arrays["train_recon"]), 1e-5)
    # The reference counts distinct codes of a ring buffer that starts as all zeros.
    ring = jnp.concatenate([jnp.zeros(1, jnp.int32), out.indices.reshape(-1)])
    usage = quantize.codebook_usage(ring, model.config.codebook_size)
    assert_close(usage, arrays["train_codebook_usage"], 1e-6)


def test_training_gradients(training):
    """All gradients of MSE + codebook terms, taken at the reference's latents.

    The entropy term divides distances by a temperature of 0.01, which magnifies the float32 noise
    of the encoder: the reference's own encoder gradients are 2e-4 away from their float64 values.
    Moving the latents by a constant to the reference's values takes that noise out of both.
    """
    model, params, arrays = training
    image = nhwc(arrays["image"])

    @jax.jit
    @jax.grad
    def backward(params, image, want):
        variables = {"params": params}
        z = model.apply(variables, image, method="encode_latents")
        z = z + jax.lax.stop_gradient(want - z)
        out = model.apply(variables, z, method="from_latents")
        return jnp.square(out.reconstruction - image).mean() + codebook_terms(out)

    gradients = to_reference(backward(params, image, nhwc(arrays["z"])), vq.NAME_RULES)
    assert "train_grad/decoder.conv_out.weight" in arrays
    assert_golden_gradients(gradients, arrays, "train_grad/", 3e-5)


def test_gradient_through_the_quantiser(training):
    """Straight-through, commitment and entropy gradients with respect to the latents alone."""
    model, params, arrays = training

    def loss(latents):
        out = model.apply({"params": params}, latents, method="from_latents")
        return (out.quantized * nhwc(arrays["train_quant_probe"])).sum() + codebook_terms(out)

    got = jax.jit(jax.grad(loss))(nhwc(arrays["train_quant_input"]))
    assert_close_in_norm(got, nhwc(arrays["train_quant_input_grad"]), 3e-5)
