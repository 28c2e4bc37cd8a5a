"""The decoder on what a frozen generator draws: which tokens, and what stays as it was."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.tiny import make_tiny_config, make_tiny_method, policy_file
from vapi_jax.methods.config import ConfigError
from vapi_jax.methods.tokenizer_loss import LossWeights
from vapi_jax.parallel.sharding import make_mesh
from vapi_jax.training import train

TOKENS = jax.random.randint(jax.random.key(3), (8, 64), 0, 16)


def method_of(**options):
    return make_tiny_method(
        "tokenizer_post", make_mesh(1, 1, jax.devices()[:1]), image_size=16,
        init={"gpt": policy_file(16)}, tokenizer_post=options,
    )  # fmt: skip


def test_a_share_of_the_tokens_is_true_and_the_others_are_drawn_after_them():
    method = method_of(rollout="mixed", true_share=0.5)
    frozen = {"policy": method.load_frozen()["policy"]}
    batch = {"condition": jnp.zeros(8, jnp.int32), "index": jnp.arange(8)}
    drawn = jax.jit(method.drawn)(TOKENS, frozen, batch, jax.random.key(1), 1.0)
    assert 0.45 < float((drawn == TOKENS).mean()) < 0.65  # a half, and what is right by chance
    assert int(drawn.min()) >= 0 and int(drawn.max()) < 16


def test_which_tokens_are_true_says_nothing_of_what_the_others_are():
    """Whatever half of the vocabulary a token is drawn from, as many are drawn elsewhere."""
    method = method_of(rollout="mixed", true_share=0.5)
    frozen = {"policy": jax.jit(method.policy.init)(jax.random.key(0))}  # uniform over 16 codes
    batch = {"condition": jnp.zeros(64, jnp.int32), "index": jnp.arange(64)}
    true = jnp.zeros((64, 64), jnp.int32)
    drawn = np.array(jax.jit(method.drawn)(true, frozen, batch, jax.random.key(1), 1.0))
    upper = drawn[:, :32] >= 8
    assert 0.4 < (drawn[:, ::2] != 0)[upper].mean() < 0.55


def test_one_weight_of_the_loss_leaves_the_others_as_they_are():
    assert method_of(loss={"perceptual": 0.5}).options.loss == LossWeights(
        reconstruction=1.0, perceptual=0.5, codebook=0.0, adversarial=0.0
    )


def test_frozen_parts_come_back_after_an_update():
    for trained in (True, False):
        method = method_of(post_quant_conv=trained)
        tokenizer = {name: {"kernel": jnp.ones(2)} for name in (
            "encoder", "decoder", "quant_conv", "post_quant_conv", "codebook",
        )}  # fmt: skip
        extra = method.init_extra({"tokenizer": tokenizer})
        moved = {"tokenizer": jax.tree.map(lambda x: 2 * x, tokenizer)}
        params, _ = method.after_update(moved, extra, jax.random.key(0), jnp.int32(0), {})
        changed = {k for k, v in params["tokenizer"].items() if float(v["kernel"][0]) == 2.0}
        assert changed == {"decoder"} | ({"post_quant_conv"} if trained else set())


@pytest.mark.slow
def test_only_the_decoder_takes_a_gradient():
    method = method_of(post_quant_conv=False)
    frozen = train.load_frozen(method)
    state, _ = train.init_state(method, train.make_optimizer(method.config.optimizer, 1), 0)
    batch = {
        "image": jax.random.uniform(jax.random.key(0), (4, 16, 16, 3), minval=-1.0),
        "condition": jnp.zeros(4, jnp.int32),
        "index": jnp.arange(4),
    }

    @jax.jit
    def slopes(params):
        loss = jax.grad(method.loss, has_aux=True)
        return loss(params, state.extra, frozen, batch, jax.random.key(2), jnp.int32(0))[0]

    moved = {
        name: max(float(np.abs(x).max()) for x in jax.tree.leaves(tree))
        for name, tree in slopes(state.params)["tokenizer"].items()
    }
    assert moved.pop("decoder") > 0.0
    assert set(moved.values()) == {0.0}


def test_both_networks_have_to_be_named():
    with pytest.raises(ConfigError, match=r"(?s)init\.gpt=''.*init\.vq=''"):
        make_tiny_config("tokenizer_post", image_size=16, init={"vq": ""})
