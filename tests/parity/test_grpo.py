"""Loss arithmetic and reward extras against the golden arrays of the reference training step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.compare import assert_close
from tests.helpers.golden import make_tokenizer
from vapi_jax.methods import grpo
from vapi_jax.rewards import reconstruction as reward

VARIANTS = ("base", "advclip", "tinyclip", "kl", "tokendrop")


def groups(rewards, advantages):
    """The rewards as [B, G], with the G under which the golden advantages come out."""
    for group in (2, 4, 8, 16, 3, 5, 6):
        if rewards.size % group == 0:
            got = grpo.group_advantages(jnp.asarray(rewards.reshape(-1, group)), clip=1e9)
            if np.abs(np.asarray(got).ravel() - advantages).max() < 1e-3:
                return rewards.reshape(-1, group)
    raise AssertionError("no group size explains the golden advantages")


@pytest.mark.parametrize("kind", ["", "_zero_std_group"])
def test_advantages(golden, kind):
    z = golden.npz("grpo_unit")
    rewards = groups(z[f"rewards{kind}"], z[f"advantages{kind}"])
    got = grpo.group_advantages(jnp.asarray(rewards))
    assert_close(np.asarray(got).ravel(), z[f"advantages{kind}"], 3e-6)
    if kind:
        equal = np.ptp(rewards, axis=1) == 0
        assert equal.any()
        assert np.all(np.asarray(got)[equal] == 0.0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_surrogate(golden, variant):
    z = golden.npz("grpo_unit")
    epsilon, advantage_clip, kl_weight = z[f"{variant}/args_clip_advclip_kl"]
    name = "advantages_big" if variant == "advclip" else "advantages"
    advantages = jnp.clip(jnp.asarray(z[name]), -advantage_clip, advantage_clip)[:, None]
    mask = jnp.asarray(z["token_mask"][:, None] > 0) if variant == "tokendrop" else None
    old = jnp.asarray(z["old_logps"])[:, None]
    base = jnp.asarray(z["ref_logps"])[:, None]

    def loss(logps):
        penalty = kl_weight * grpo.k3_kl(logps, base) if kl_weight else None
        rows = grpo.clipped_surrogate(logps, old, advantages, epsilon, "token", mask, penalty)
        return rows.mean(), rows

    new = jnp.asarray(z["new_logps"])[:, None]
    (value, rows), grad = jax.value_and_grad(loss, has_aux=True)(new)
    assert_close(rows[:, 0], z[f"{variant}/seq_loss"], 3e-6)
    assert_close(value, z[f"{variant}/loss"], 1e-5)
    assert_close(grad[:, 0], z[f"{variant}/grad_new_logps"], 3e-6)


def test_reward_extras(golden):
    z, step = golden.npz("reward_extras"), golden.npz("vapi_step")
    images = jnp.moveaxis(jnp.asarray(step["image"]), 1, -1)
    samples = jnp.moveaxis(jnp.asarray(step["pred_images"]), 1, -1)
    group = samples.shape[0] // images.shape[0]
    grouped = samples.reshape(images.shape[0], group, *samples.shape[1:])
    l1 = reward.l1(grouped, images[:, None])
    assert_close(np.asarray(l1).ravel(), z["rec_l1"], 3e-6)

    model, params, _ = make_tokenizer(golden)
    codes = model.apply({"params": params}, method="codes")[jnp.asarray(step["token_indices"])]
    latents = model.apply({"params": params}, images, method="encode_latents")
    latents = jnp.repeat(latents.reshape(len(images), -1, latents.shape[-1]), group, axis=0)
    cosine = reward.codebook_cosine(codes, latents)
    assert_close(np.asarray(cosine), z["embedcos_loss"], 3e-6)

    logits = jnp.moveaxis(jnp.asarray(z["gan_logits"]), 1, -1)
    assert_close(np.asarray(reward.gan(logits)), z["gan_loss"], 3e-6)
