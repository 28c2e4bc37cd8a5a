"""The tokenizer's losses and discriminator: values by hand, and gradients by the long way round."""

import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.compare import assert_close
from vapi_jax.methods import tokenizer_loss as losses
from vapi_jax.models import discriminator
from vapi_jax.models.layers import conv2d
from vapi_jax.models.vq import VQOutput

REAL = jnp.array([2.0, 0.5, -1.0])
FAKE = jnp.array([-3.0, 0.0, 0.5, 1.0])


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


@pytest.mark.parametrize(
    ("kind", "want"),
    [
        ("hinge", 0.5 * ((0 + 0.5 + 2.0) / 3 + (0 + 1 + 1.5 + 2) / 4)),
        ("vanilla", -0.5 * (np.log(sigmoid(REAL)).mean() + np.log(1 - sigmoid(FAKE)).mean())),
        (
            "non-saturating",
            -0.5 * (np.log(sigmoid(REAL)).mean() + np.log(1 - sigmoid(FAKE)).mean()),
        ),
        # Logit 1 with label `real`, logit 0 with label `fake`.
        ("non-saturating-llamagen", 0.5 * (np.log1p(np.e) - 0.5 + np.log(2))),
    ],
)
def test_discriminator_losses(kind, want):
    assert_close(losses.discriminator_loss(REAL, FAKE, kind), want, 1e-6)


@pytest.mark.parametrize(
    ("kind", "want"),
    [
        ("hinge", 1.5 / 4),
        ("non-saturating", -np.log(sigmoid(FAKE)).mean()),
        ("non-saturating-llamagen", np.log1p(np.e) + 1.5 / 4),
    ],
)
def test_adversarial_losses(kind, want):
    assert_close(losses.generator_adversarial_loss(FAKE, kind), want, 1e-6)


def test_losses_stay_finite_at_large_logits():
    for kind in typing.get_args(losses.DiscriminatorKind):
        assert np.isfinite(losses.discriminator_loss(-1e4 * REAL, 1e4 * FAKE, kind))
    for kind in typing.get_args(losses.AdversarialKind):
        assert np.isfinite(losses.generator_adversarial_loss(1e4 * FAKE, kind))


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="wasserstein"):
        losses.discriminator_loss(REAL, FAKE, "wasserstein")
    with pytest.raises(ValueError, match="vanilla"):
        losses.generator_adversarial_loss(FAKE, "vanilla")


def test_adaptive_weight():
    nll, adv = jnp.array([3.0, 4.0]), jnp.array([0.0, 2.0])
    assert_close(losses.adaptive_weight(nll, adv), 5 / 2.0001, 1e-6)
    assert losses.adaptive_weight(nll, 0 * adv) == 1e4, "clamped"
    assert losses.adaptive_weight(0 * nll, 0 * adv) == 0
    gradient = jax.grad(lambda x: losses.adaptive_weight(x, adv))(nll)
    np.testing.assert_array_equal(gradient, jnp.zeros(2))


# A small tokenizer whose last step is the convolution that `adaptive_weight` looks at.
SIDE = 6


def apply_tokenizer(params, images):
    features = jnp.tanh(images @ params["body"])
    reconstruction = conv2d(features, params["last"]) + params["bias"]
    zero = jnp.zeros(())
    return VQOutput(
        reconstruction=reconstruction,
        indices=jnp.array([[0, 1, 1]]),
        z=features,
        quantized=features,
        vq_loss=jnp.square(params["body"]).sum(),
        commit_loss=zero,
        entropy_loss=zero,
        features=features,
    )


def perceptual(a, b):
    return jnp.square(jnp.sin(2 * a) - jnp.sin(2 * b)).mean((1, 2, 3))


def disc_logits(images):
    return jnp.cos(3 * images).sum(-1)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.fixture(scope="module")
def params():
    return {
        "body": normal(0, 3, 5),
        "last": 0.3 * normal(1, 3, 3, 5, 3),
        "bias": 0.1 * normal(2, 3),
    }


@pytest.fixture(scope="module")
def images():
    return jnp.tanh(normal(3, 2, SIDE, SIDE, 3))


@pytest.mark.parametrize(
    ("adaptive", "disc_on", "norm"), [(True, 1.0, "l2"), (False, 1.0, "l1"), (True, 0.0, "l2")]
)
def test_tokenizer_loss_equals_the_plain_sum(params, images, adaptive, disc_on, norm):
    """Value and every gradient equal those of the formula, differentiated as it stands."""
    weights = losses.LossWeights(
        reconstruction=0.7,
        perceptual=1.3,
        codebook=0.2,
        adversarial=0.4,
        adaptive=adaptive,
        reconstruction_norm=norm,
    )

    def fidelity(params):
        out = apply_tokenizer(params, images)
        error = out.reconstruction - images
        pixel = jnp.square(error).mean() if norm == "l2" else jnp.abs(error).mean()
        return 0.7 * pixel + 1.3 * perceptual(images, out.reconstruction).mean()

    def fooling(params):
        return -disc_logits(apply_tokenizer(params, images).reconstruction).mean()

    def plain(params):
        weight = jnp.ones(())
        if adaptive:
            nll, adv = (jax.grad(term)(params)["last"] for term in (fidelity, fooling))
            weight = jnp.linalg.norm(nll) / (jnp.linalg.norm(adv) + 1e-4)
            weight = jax.lax.stop_gradient(weight)
        codebook = apply_tokenizer(params, images).vq_loss
        loss = fidelity(params) + disc_on * 0.4 * weight * fooling(params) + 0.2 * codebook
        return loss, weight

    def ours(params, disc_on):
        return losses.tokenizer_loss(
            params,
            images,
            apply_tokenizer=apply_tokenizer,
            perceptual_fn=perceptual,
            codebook_size=4,
            disc_logits_fn=disc_logits,
            weights=weights,
            disc_on=disc_on,
        )

    (want, weight), want_gradients = jax.jit(jax.value_and_grad(plain, has_aux=True))(params)
    (got, aux), gradients = jax.jit(jax.value_and_grad(ours, has_aux=True))(params, disc_on)
    assert_close(got, want, 2e-6)
    assert_close(gradients, want_gradients, 3e-6)
    assert aux.metrics["codebook_usage"] == 0.5
    assert_close(aux.metrics["adversarial_scale"], disc_on * 0.4 * weight, 3e-6)


def test_without_adversary_or_perception(params, images):
    loss, aux = jax.jit(
        lambda params: losses.tokenizer_loss(
            params, images, apply_tokenizer=apply_tokenizer, perceptual_fn=None, codebook_size=4
        )
    )(params)
    out = apply_tokenizer(params, images)
    want = jnp.square(out.reconstruction - images).mean() + out.vq_loss
    assert_close(loss, want, 2e-6)
    assert "adversarial_loss" not in aux.metrics


def test_networks_run_once(params, images):
    """One trace of the perceptual network and of the discriminator serves loss and weight."""
    calls = []

    def counted(name, function):
        def call(*args):
            calls.append(name)
            return function(*args)

        return call

    jax.make_jaxpr(
        jax.grad(
            lambda p: losses.tokenizer_loss(
                p,
                images,
                apply_tokenizer=counted("tokenizer", apply_tokenizer),
                perceptual_fn=counted("perceptual", perceptual),
                codebook_size=4,
                disc_logits_fn=counted("discriminator", disc_logits),
            )[0]
        )
    )(params)
    assert sorted(calls) == ["discriminator", "perceptual", "tokenizer"]


# --- PatchGAN -----------------------------------------------------------------------------------

MODEL = discriminator.PatchGAN(ndf=4, n_layers=2)


@pytest.fixture(scope="module")
def patchgan():
    return jax.jit(lambda x: MODEL.init(jax.random.key(0), x, train=True))(
        jnp.zeros((2, 16, 16, 3))
    )


def test_patchgan_as_initialised(patchgan):
    params, stats = patchgan["params"], patchgan["batch_stats"]
    assert set(params) == {"main_0", "main_2", "main_3", "main_5", "main_6", "main_8"}
    assert [p for p in params if "kernel" in params[p] and "bias" not in params[p]] == [
        "main_2",
        "main_5",
    ]
    assert 0.015 < float(jnp.std(params["main_5"]["kernel"])) < 0.025
    scale = params["main_6"]["scale"]
    assert 0.9 < float(scale.min()) < float(scale.max()) < 1.1
    # Initialising looks at zeros; the running statistics must not have moved.
    for layer in stats.values():
        np.testing.assert_array_equal(layer["mean"], 0)
        np.testing.assert_array_equal(layer["var"], 1)


def test_full_size_patchgan():
    """The defaults give the 70 x 70 patches and the width of pix2pix."""
    model = discriminator.PatchGAN()
    logits, variables = jax.eval_shape(
        lambda x: model.init_with_output(jax.random.key(0), x, train=True),
        jax.ShapeDtypeStruct((1, 256, 256, 3), jnp.float32),
    )
    assert logits.shape == (1, 30, 30, 1)
    params = variables["params"]
    kernels = [params[f"main_{i}"]["kernel"].shape for i in (0, 2, 5, 8, 11)]
    assert [kernel[-1] for kernel in kernels] == [64, 128, 256, 512, 1]
    sees = 1
    for kernel, stride in zip(kernels[::-1], (1, 1, 2, 2, 2), strict=True):
        sees = stride * (sees - 1) + kernel[0]
    assert sees == 70


def test_running_statistics_follow_the_torch_convention():
    layer = discriminator.BatchNorm()
    x = 3 + 2 * normal(4, 2, 3, 3, 4)
    variables = layer.init(jax.random.key(0), x, train=True)
    out, updated = layer.apply(variables, x, train=True, mutable=["batch_stats"])
    flat = np.asarray(x, np.float64).reshape(-1, 4)
    whitened = (flat - flat.mean(0)) / np.sqrt(flat.var(0) + 1e-5)
    want = whitened * np.asarray(variables["params"]["scale"])
    assert_close(out.reshape(-1, 4), want, 2e-6)
    stats = updated["batch_stats"]
    assert_close(stats["mean"], 0.1 * flat.mean(0), 2e-6)
    assert_close(stats["var"], 0.9 + 0.1 * flat.var(0, ddof=1), 2e-6)
    # Evaluation reads them and leaves them alone.
    params = {"params": variables["params"], "batch_stats": stats}
    got = layer.apply(params, x, train=False).reshape(-1, 4)
    want = (flat - stats["mean"]) / np.sqrt(np.asarray(stats["var"]) + 1e-5)
    assert_close(got, want * variables["params"]["scale"], 2e-6)


def test_discriminator_step(patchgan):
    """Real and fake are normalised apart, statistics take both in turn, images get no gradient."""
    params, stats = patchgan["params"], patchgan["batch_stats"]
    real = normal(5, 2, 16, 16, 3)
    fake = 0.1 * normal(6, 2, 16, 16, 3) - 2

    def apply(params, stats, images):
        return discriminator.apply_train(MODEL, params, stats, images)

    def loss(params, fake):
        return losses.discriminator_step_loss(
            params, stats, real, fake, apply_discriminator=apply, weight=0.25
        )

    (value, (metrics, moved)), (gradients, image_gradient) = jax.jit(
        jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    )(params, fake)
    logits_real, after_real = jax.jit(apply)(params, stats, real)
    logits_fake, after_fake = jax.jit(apply)(params, after_real, fake)
    want = losses.discriminator_loss(logits_real, logits_fake)
    assert_close(value, 0.25 * want, 2e-6)
    assert_close(metrics["discriminator_loss"], want, 2e-6)
    assert_close(moved, after_fake, 2e-6)
    for name in ("main_0", "main_2", "main_5", "main_8"):
        assert float(jnp.abs(gradients[name]["kernel"]).max()) > 0, name
    np.testing.assert_array_equal(image_gradient, 0)
