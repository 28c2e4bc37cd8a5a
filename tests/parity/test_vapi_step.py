"""Whole post-training steps against the golden arrays: rewards, losses, gradients, three updates."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.helpers.compare import assert_close
from tests.helpers.golden import assert_golden_gradients, make_generator, make_tokenizer, nhwc
from vapi_jax.methods import grpo, vapi
from vapi_jax.methods.config import OptimizerConfig
from vapi_jax.methods.objective import Judged, kl_to_base, objective
from vapi_jax.methods.rewarded import says
from vapi_jax.models import categorical
from vapi_jax.models.head import project
from vapi_jax.models.lpips import load_lpips_params
from vapi_jax.models.pixels import PixelSpace
from vapi_jax.parallel.sharding import make_mesh
from vapi_jax.rewards import DEFAULT, make_terms, total
from vapi_jax.training.train import make_optimizer
from vapi_jax.weights.names import to_reference

SETS = {"vapi_step": 1e-3, "vapi_step_kl": 1e-3, "vapi_step_lr1e-4": 1e-4}


@dataclasses.dataclass
class Step:
    """One golden set with its models, and the rollout it prescribes."""

    z: dict
    args: dict
    policy: object
    params: object
    base: object
    pixels: PixelSpace
    frozen: dict
    judged: Judged
    batch: dict


@pytest.fixture(scope="module", params=sorted(SETS))
def step(request, golden):
    z, args = golden.npz(request.param), golden.args("vapi_step")
    policy, params = make_generator(golden, "gpt_c2i")
    base = None
    if request.param.endswith("_kl"):
        base = make_generator(golden, "gpt_c2i", "gpt_c2i_base")[1]
    tokenizer, tokenizer_params, _ = make_tokenizer(golden)
    frozen = {"tokenizer": tokenizer_params, "rewards": {"lpips": load_lpips_params("vgg")}}
    pixels = PixelSpace(tokenizer, make_mesh(devices=jax.devices()[:1]))
    images, group = nhwc(z["image"]), args["G"]
    samples = jnp.asarray(z["token_indices"].reshape(len(images), group, -1), jnp.int32)
    tokens = jnp.asarray(z["gt_tokens"], jnp.int32)
    labels = jnp.asarray(z["class_ids"], jnp.int32)
    batch = {"image": images, "condition": labels}
    terms = make_terms(DEFAULT)
    judges = {term.name: functools.partial(says, term) for term in terms}
    values = jax.jit(functools.partial(pixels.judge, judges=judges))(frozen, samples, batch)
    rewards = total(values, terms)
    context = jnp.asarray(np.pad(z["noisy_context"], ((0, 0), (0, 1))), jnp.int32)
    judged = Judged(tokens, context, samples, values, rewards, grpo.group_advantages(rewards))
    batch["index"] = jnp.arange(len(images))
    args = args | {"lr": SETS[request.param]}
    return Step(z, args, policy, params, base, pixels, frozen, judged, batch)


def test_encode(step):
    tokens = jax.jit(step.pixels.encode)(step.frozen, step.batch["image"])
    np.testing.assert_array_equal(tokens, step.z["gt_tokens"])


def test_decode(step):
    flat = step.judged.samples.reshape(-1, step.judged.samples.shape[-1])
    images = jax.jit(step.pixels.decode)(step.frozen, flat)
    assert_close(images, nhwc(step.z["pred_images"]), 1e-5)


def test_rewards_and_advantages(step):
    z = step.z
    assert_close(np.ravel(-step.judged.values["mse"]), z["mse"], 1.5e-6)
    assert_close(np.ravel(-step.judged.values["lpips"]), z["lpips"], 1.5e-6)
    assert_close(np.ravel(step.judged.rewards), z["rewards"], 1.5e-6)
    assert_close(np.ravel(step.judged.advantages), z["advantages"], 2e-5)


def test_logits(step):
    fed = step.judged.context[:, :-1]
    logits = jax.jit(step.policy.logits)(step.params, step.batch["condition"], fed)
    assert_close(logits, step.z["sampling_logits"], 1e-5)


def make_update(step):
    """One update on the golden rollout: params -> (params, optimizer state, loss, aux, grads)."""
    config = vapi.VAPiOptions(
        group_size=step.args["G"],
        ce_weight=step.args["aux_ce_weight"],
        clip_epsilon=step.args["clip_range"],
        advantage_clip=step.args["adv_clip_max"],
        temperature=step.args["temperature"],
        kl_weight=step.args["kl_coef"] if step.base is not None else 0.0,
    )
    optimizer = make_optimizer(
        OptimizerConfig(
            learning_rate=step.args["lr"],
            weight_decay=step.args["weight_decay"],
            b1=step.args["betas"][0],
            b2=step.args["betas"][1],
            eps=step.args["eps"],
            max_grad_norm=step.args["max_grad_norm"],
        ),
        steps=3,
    )

    def loss_of(params, old_logps):
        fed = step.judged.context[:, :-1]
        hidden, head = (
            step.policy.hidden(params, step.batch["condition"], fed), step.policy.head(params)
        )  # fmt: skip
        logits = project(hidden, head)
        samples = step.judged.samples
        logps = categorical.token_log_probs(logits, samples, config.temperature)
        ce = categorical.cross_entropy(logits, step.judged.tokens)
        entropy = categorical.entropy(logits, config.temperature)
        kl = None
        if step.base is not None:
            where = step.batch["condition"], fed, hidden, head, samples, logps
            kl = kl_to_base(config, step.policy, step.base, *where)
        loss, aux = objective(logps, old_logps, entropy, step.judged.advantages, config, kl=kl)
        loss, aux = vapi.with_prior(loss, aux, ce, step.judged, config)
        return loss, aux | {"ratio": jnp.exp(logps - old_logps)}

    @jax.jit
    def update(params, opt_state, old_logps):
        (loss, aux), grads = jax.value_and_grad(loss_of, has_aux=True)(params, old_logps)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss, aux, grads

    return optimizer, update


@pytest.fixture(scope="module")
def updates(step):
    """Loss, metrics, gradients and new parameters of three updates on one rollout."""
    optimizer, update = make_update(step)
    params = jax.tree.map(jnp.asarray, step.params)
    opt_state, done = optimizer.init(params), []
    group = step.args["G"]
    old_logps = jnp.asarray(step.z["old_logps"]).reshape(-1, group, step.z["old_logps"].shape[-1])
    for _ in range(3):
        params, opt_state, loss, aux, grads = update(params, opt_state, old_logps)
        done.append((params, loss, aux, grads))
    return done


def test_first_loss_and_ratio(step, updates):
    _, loss, aux, grads = updates[0]
    z = step.z
    assert_close(loss, z["step1/loss"], 3e-6)
    assert_close(np.ravel(aux["ratio"]), np.ravel(z["step1/ratio"]), 3e-5)
    assert_close(aux["ce"].mean(), z["step1/ce"].mean(), 2e-6)
    assert_close(optax.tree.norm(grads), z["step1/grad_norm"], 1e-5)


def test_first_gradients(step, updates):
    got = to_reference(updates[0][3], step.policy.name_rules)
    assert {f"step1/grad/{name}" for name in got} <= step.z.keys()
    assert_golden_gradients(got, step.z, "step1/grad/", 3e-5)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_later_steps(step, updates, number):
    _, loss, aux, grads = updates[number - 1]
    z, epsilon = step.z, step.args["clip_range"]
    # The update of step 1 turns rounding of near-zero gradients into steps of the size of lr.
    assert_close(loss, z[f"step{number}/loss"], 1e-5 if number == 1 else 1e-4)
    assert_close(
        optax.tree.norm(grads), z[f"step{number}/grad_norm"], 1e-5 if number == 1 else 4e-4
    )
    fraction = grpo.clip_fraction(aux["ratio"], epsilon)
    np.testing.assert_allclose(fraction, z[f"step{number}/clip_fraction"], atol=0.005)
    got = to_reference(grads, step.policy.name_rules)
    assert_golden_gradients(got, z, f"step{number}/grad/", 4e-4)


@pytest.mark.parametrize("number", [1, 3])
def test_parameters(step, updates, number):
    keys = [key for key in step.z if key.startswith(f"step{number}/param/")]
    if not keys:
        pytest.skip("this golden set keeps no parameters of this step")
    got = to_reference(updates[number - 1][0], step.policy.name_rules)
    for key in keys:
        mean = np.abs(got[key.split("/param/")[1]] - step.z[key]).mean()
        assert mean < (1e-7 if number == 1 else 1e-6), f"{key}: {mean}"
