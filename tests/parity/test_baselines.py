"""The paper's baselines and their rivals against the golden arrays: straight-through training, CCA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.compare import assert_close, assert_close_in_norm
from tests.helpers.golden import assert_golden_gradients, make_generator, make_tokenizer, nhwc
from vapi_jax.methods.cca import CCAOptions, contrastive_loss
from vapi_jax.methods.rewarded import says
from vapi_jax.methods.ste import straight_through
from vapi_jax.models import categorical
from vapi_jax.models.lpips import load_lpips_params
from vapi_jax.models.pixels import PixelSpace
from vapi_jax.rewards import DEFAULT, make_terms
from vapi_jax.weights.names import to_reference


@pytest.fixture(scope="module")
def ste(golden):
    """name of a variant -> what it gives: latents, tokens, losses and gradients; and the arrays."""
    z = golden.npz("ste")
    policy, params = make_generator(golden, "gpt_c2i")
    tokenizer, tokenizer_params, _ = make_tokenizer(golden)
    frozen = {"tokenizer": tokenizer_params, "rewards": {"lpips": load_lpips_params("vgg")}}
    pixels = PixelSpace(tokenizer, None, chunk=8)  # one image at a time
    image, tokens = nhwc(z["image"]), jnp.asarray(z["gt_tokens"], jnp.int32)
    labels = jnp.asarray(z["class_ids"], jnp.int32)
    terms = make_terms(DEFAULT)
    judges = {t.name: (lambda *args, t=t: says(t, *args)) for t in terms}

    def run(params, noise, codes):
        def loss(params, shift, latent_shift):
            logits = policy.logits(params, labels, tokens[:, :-1]) + shift
            tempered = logits / float(z["temperature"])
            latents, chosen = straight_through(tempered, codes, float(z["tau"]), noise)
            batch = {"image": image, "condition": labels}
            values = pixels.judge_latents(frozen, latents + latent_shift, chosen, batch, judges)
            rec, perceptual = (-values[name].mean() for name in ("mse", "lpips"))
            ce = categorical.cross_entropy(logits, tokens).mean()
            lost = z["rec_weight"] * rec + z["perc_weight"] * perceptual + z["aux_ce_weight"] * ce
            return lost, (rec, perceptual, ce, latents, chosen, logits)

        zeros = jnp.zeros(z["gumbel/logits"].shape), jnp.zeros(z["gumbel/zq"].shape)
        return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(params, *zeros)

    compiled, raw = jax.jit(run), jnp.asarray(z["codebook_raw"])
    unit = tokenizer.apply({"params": tokenizer_params}, method="codes")
    noise = jnp.asarray(z["gumbel_noise"])
    done = {
        "gumbel": compiled(params, noise, raw),
        "argmax": compiled(params, jnp.zeros_like(noise), raw),
        "argmax_normcode": compiled(params, jnp.zeros_like(noise), unit),
    }
    return done, z, policy


@pytest.mark.parametrize("name", ["gumbel", "argmax", "argmax_normcode"])
def test_straight_through(ste, name):
    done, z, policy = ste
    (loss, parts), (grads, of_logits, of_latents) = done[name]
    rec, perceptual, ce, latents, chosen, logits = parts
    assert_close(logits, z[f"{name}/logits"], 1e-5)
    np.testing.assert_array_equal(chosen, z[f"{name}/hard_indices"])
    assert_close(latents, z[f"{name}/zq"], 1e-6)
    for got, key in ((rec, "rec_loss"), (perceptual, "perc_loss"), (ce, "ce"), (loss, "loss")):
        assert_close(got, z[f"{name}/{key}"], 3e-6)
    assert_close_in_norm(of_logits, z[f"{name}/grad_logits"], 3e-5)
    assert_close_in_norm(of_latents, z[f"{name}/grad_zq"], 3e-5)
    got = to_reference(grads, policy.name_rules)
    assert_golden_gradients(got, z, f"{name}/grad/", 3e-5)


def test_cca(golden):
    z = golden.npz("cca")
    tokens = jnp.asarray(z["tokens"], jnp.int32)
    options = CCAOptions(beta=float(z["beta"]), negative_weight=float(z["lam"]))
    positive = jnp.asarray(z["dropped"] | (z["classes"] == z["shuffled_classes"]))

    def gap(logits, base):
        own, start = (categorical.token_log_probs(x, tokens[:, None]) for x in (logits, base))
        return (own - start).sum(axis=(1, 2))

    def loss(logits, shuffled):
        gaps = gap(logits, z["ref_logits"]), gap(shuffled, z["shuffled_ref_logits"])
        return contrastive_loss(*gaps, positive, options).mean(), gaps

    given = jnp.asarray(z["logits"]), jnp.asarray(z["shuffled_logits"])
    (value, gaps), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(*given)
    assert_close(gaps[0], z["gap"], 1e-5)
    assert_close(gaps[1], z["negative_gap"], 1e-5)
    assert_close(value, z["loss"], 1e-5)
    assert_close_in_norm(grads[0], z["d_logits"], 1e-5)
    assert_close_in_norm(grads[1], z["d_shuffled_logits"], 1e-5)
