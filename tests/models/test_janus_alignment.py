"""Where a token's log-probability is read: one position before it, or one too late."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tests.helpers.policies import JANUS, TOKENS, VOCAB
from vapi_jax.common.trees import flatten, unflatten
from vapi_jax.models.categorical import cross_entropy
from vapi_jax.models.policies import make_policy

IMAGES = np.random.default_rng(1).integers(0, VOCAB, (4, TOKENS), np.int32)
STEPS = 60


def draw(rng, count):
    """Prompts that name one of four images, and the images."""
    which = rng.integers(0, 4, count)
    prompt = {
        "tokens": np.stack([np.ones(count), 3 + which], axis=1).astype(np.int32),
        "mask": np.ones((count, 2), bool),
    }
    return prompt, IMAGES[which]


def test_a_trained_janus_knows_the_next_token_and_not_the_one_it_has_been_fed():
    """What the released trainer reads is a prediction of the token after: cross-entropy tells at once."""
    pretrained = make_policy("janus", **JANUS, alignment="shifted_by_one")
    released = make_policy("janus", **JANUS, alignment="same_position")
    optimizer, rng = optax.adam(1e-2), np.random.default_rng(0)

    @jax.jit
    def train(params, prompts, images):
        def update(carry, batch):
            prompt, tokens = batch

            def loss(params):
                logits = pretrained.logits(params, prompt, tokens[:, :-1])
                return cross_entropy(logits, tokens).mean()

            params, state = carry
            changes, state = optimizer.update(jax.grad(loss)(params), state)
            return (optax.apply_updates(params, changes), state), None

        return jax.lax.scan(update, (params, optimizer.init(params)), (prompts, images))[0][0]

    shapes = flatten(jax.eval_shape(pretrained.init, jax.random.key(0)))
    params = {
        path: jnp.ones(leaf.shape)
        if path.endswith("scale")
        else jnp.asarray(rng.normal(size=leaf.shape) * leaf.shape[-1] ** -0.5, jnp.float32)
        for path, leaf in shapes.items()
    }
    prompts, images = draw(rng, STEPS * 32)
    batches = jax.tree.map(lambda x: x.reshape(STEPS, 32, *x.shape[1:]), (prompts, images))
    params = train(unflatten(params), *batches)
    prompt, tokens = draw(rng, 32)
    ce = {
        policy.alignment: float(
            cross_entropy(
                jax.jit(policy.logits)(params, prompt, tokens[:, : policy.context_length]), tokens
            ).mean()
        )
        for policy in (pretrained, released)
    }
    assert ce["shifted_by_one"] < 0.1
    assert ce["same_position"] > np.log(VOCAB)  # worse than knowing nothing
