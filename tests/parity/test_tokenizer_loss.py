"""The tokenizer's adversarial training against golden arrays: losses, weights and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.compare import assert_close
from tests.helpers.golden import assert_golden_gradients, make_tokenizer, nhwc
from vapi_jax.methods import tokenizer_loss
from vapi_jax.models import discriminator, lpips, vq
from vapi_jax.weights.names import from_reference, to_reference


@pytest.fixture(scope="module")
def arrays(golden):
    return golden.npz("vq_loss")


@pytest.fixture(scope="module")
def patchgan(golden, arrays):
    """The golden discriminator: (model, params, running statistics)."""
    tensors = golden.tensors("patchgan_disc")
    kernels = [name for name, tensor in tensors.items() if tensor.ndim == 4]
    model = discriminator.PatchGAN(
        ndf=tensors["main.0.weight"].shape[0],
        # All kernels but the last two (width, then logits) have stride 2.
        n_layers=len(kernels) - 2,
    )
    image = jax.ShapeDtypeStruct(nhwc(arrays["image"]).shape, jnp.float32)
    target = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=True), image)
    params = from_reference(
        tensors,
        target["params"],
        discriminator.NAME_RULES,
        discriminator.IGNORED_NAMES,
    )
    stats = from_reference(
        tensors,
        target["batch_stats"],
        discriminator.STATS_NAME_RULES,
        discriminator.STATS_IGNORED_NAMES,
    )
    return model, params, stats


def test_patchgan_names_round_trip(golden, patchgan):
    _, params, stats = patchgan
    back = to_reference(params, discriminator.NAME_RULES)
    back |= to_reference(stats, discriminator.STATS_NAME_RULES)
    theirs = golden.tensors("patchgan_disc")
    assert set(back) == {name for name in theirs if not name.endswith("num_batches_tracked")}
    for name, tensor in back.items():
        np.testing.assert_array_equal(tensor, theirs[name], err_msg=name)


def test_losses_on_given_logits(arrays):
    real, fake = arrays["logits_real"], arrays["logits_fake"]
    for kind, key in (
        ("hinge", "hinge_d_loss"),
        ("vanilla", "vanilla_d_loss"),
        # The reference swaps label and logit here; ours is the true one under the plain name.
        ("non-saturating-llamagen", "non_saturating_d_loss"),
    ):
        got = tokenizer_loss.discriminator_loss(real, fake, kind)
        assert_close(got, arrays[key], 1e-6)
    for kind, logits, key in (
        ("hinge", "logits_fake_gen", "gen_adv_loss"),
        ("non-saturating-llamagen", "logits_fake", "non_saturating_gen_loss"),
    ):
        got = tokenizer_loss.generator_adversarial_loss(arrays[logits], kind)
        assert_close(got, arrays[key], 2e-6)


def test_discriminator_step(arrays, patchgan):
    model, params, stats = patchgan

    def loss(params, real, fake):
        return tokenizer_loss.discriminator_step_loss(
            params,
            stats,
            real,
            fake,
            apply_discriminator=lambda p, s, x: discriminator.apply_train(model, p, s, x),
            weight=float(arrays["disc_weight"]),
        )

    real, fake = nhwc(arrays["image"]), nhwc(arrays["recon"])
    (value, (metrics, _)), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(
        params, real, fake
    )
    assert_close(value, arrays["discriminator_loss_weighted"], 3e-6)
    for name in ("logits_real", "logits_fake"):
        assert_close(metrics[name], arrays[name].mean(), 3e-6, scale=np.abs(arrays[name]).max())
    gradients = to_reference(gradients, discriminator.NAME_RULES)
    assert [key for key in arrays if key.startswith("disc_grad/")]
    assert_golden_gradients(gradients, arrays, "disc_grad/", 3e-5)


@pytest.mark.slow
def test_generator_step(golden, arrays, patchgan):
    model, params, stats = patchgan
    tokenizer, vq_params, train = make_tokenizer(golden, training=True)
    image = nhwc(arrays["image"])
    vgg = lpips.load_lpips_params("vgg")

    def apply_tokenizer(vq_params, image):
        # At the reference's latents, see test_training_gradients of the tokenizer.
        z = tokenizer.apply({"params": vq_params}, image, method="encode_latents")
        z = z + jax.lax.stop_gradient(nhwc(train["z"]) - z)
        return tokenizer.apply({"params": vq_params}, z, method="from_latents")

    @jax.jit
    def step(vq_params, disc_params, vgg, image):
        def loss(vq_params):
            return tokenizer_loss.tokenizer_loss(
                vq_params,
                image,
                apply_tokenizer=apply_tokenizer,
                perceptual_fn=lambda a, b: lpips.lpips(vgg, a, b, net="vgg"),
                codebook_size=tokenizer.config.codebook_size,
                disc_logits_fn=lambda x: discriminator.apply_train(model, disc_params, stats, x)[0],
                weights=tokenizer_loss.LossWeights(
                    reconstruction=float(arrays["rec_weight"]),
                    perceptual=float(arrays["perceptual_weight"]),
                    adversarial=float(arrays["disc_weight"]),
                ),
            )

        return jax.value_and_grad(loss, has_aux=True)(vq_params)

    (value, aux), gradients = step(vq_params, params, vgg, image)
    assert_close(aux.output.reconstruction, nhwc(arrays["recon"]), 1e-5)
    codebook_terms = [aux.metrics[f"{name}_loss"] for name in ("vq", "commit", "entropy")]
    assert_close(codebook_terms, arrays["codebook_losses"], 1e-5)
    for name, key, within in (
        ("reconstruction_loss", "rec_loss", 1e-5),
        ("perceptual_loss", "p_loss", 1e-5),
        ("adversarial_loss", "gen_adv_loss", 1e-5),
        # The stored weight is 1.1e-4 below the one that the stored loss and gradients imply (which
        # is also its float64 value); the loss below holds the weight to 2e-5.
        ("adaptive_weight", "adaptive_weight", 3e-4),
        ("loss", "generator_loss", 5e-6),
    ):
        assert_close(aux.metrics[name], arrays[key], within)
    assert value == aux.metrics["loss"]
    gradients = to_reference(gradients, vq.NAME_RULES)
    assert [key for key in arrays if key.startswith("gen_grad/")]
    assert_golden_gradients(gradients, arrays, "gen_grad/", 3e-5)
