"""Janus's generator against the reference's numbers, in both alignments.

The golden prompts are padded on the RIGHT, positions count through the padding, and the first
token's logits are read at the last column, padding or not: `padding="counted"`. Guidance is
compared at batch 1, where the reference pairs its two halves rightly.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.compare import assert_close
from vapi_jax.models import janus
from vapi_jax.models.janus_folder import infer_janus
from vapi_jax.models.policies import make_policy
from vapi_jax.weights import names as weights


@pytest.fixture(scope="module")
def arrays(golden):
    return golden.npz("janus")


@pytest.fixture(scope="module")
def make(golden, arrays):
    args = golden.args("janus")

    def build(**options):
        tensors = golden.tensors("janus")
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        heads = {"num_attention_heads": args["H"], "num_key_value_heads": args["KV"]}
        tokens, pad_id = arrays["gt_tokens"].shape[1], int(arrays["pad_id"])
        config = infer_janus(shapes, heads, tokens, pad_id).config
        policy = make_policy("janus", **dataclasses.asdict(config), **options)
        target = jax.eval_shape(policy.init, jax.random.key(0))
        return policy, weights.from_reference(
            tensors, target, policy.name_rules, policy.ignored_names
        )

    return build


@pytest.fixture(scope="module")
def condition(arrays):
    tokens = jnp.asarray(arrays["prompt_tokens"], jnp.int32)
    mask = jnp.asarray(arrays["attention_mask"][:, : tokens.shape[1]]).astype(bool)
    return {"tokens": tokens, "mask": mask}


@pytest.mark.parametrize(
    "alignment, key",
    [
        ("same_position", "logits_cfg1_official"),
        ("shifted_by_one", "logits_cfg1_shifted_by_one"),
    ],
)
def test_logits(make, arrays, condition, alignment, key):
    policy, params = make(alignment=alignment, padding="counted")
    context = jnp.asarray(arrays["noisy_tokens"], jnp.int32)[:, : policy.context_length]
    got = jax.jit(policy.logits)(params, condition, context)
    assert_close(got, arrays[key], 1e-5)


def test_guided_logits(make, arrays, condition):
    if "logits_cfg5_official_B1" not in arrays:
        pytest.skip("this golden set has no guided logits")
    policy, params = make(alignment="same_position", padding="counted")
    one = jax.tree.map(lambda x: x[:1], condition)
    context = jnp.asarray(arrays["noisy_tokens"], jnp.int32)[:1]
    forward = jax.jit(policy.logits)
    given = forward(params, one, context)
    without = forward(params, policy.unconditional(one), context)
    guided = without + 5 * (given - without)
    # Guidance at 5 multiplies the rounding of both halves by up to 9.
    want = arrays["logits_cfg5_official_B1"]
    assert_close(guided, want, 3e-5)


def test_hidden_states_and_embeddings(make, arrays, condition):
    policy, params = make(alignment="same_position", padding="counted")
    model = janus.Janus(policy.config)
    context = jnp.asarray(arrays["noisy_tokens"], jnp.int32)

    @jax.jit
    def run(params, condition, context):
        variables = {"params": params}
        image = model.apply(variables, context, method="embed_tokens")
        _, state = model.apply(
            variables,
            condition,
            context,
            same_position=True,
            count_padding=True,
            mutable=["intermediates"],
        )
        return image, state["intermediates"]["hidden_norm"][0]

    image, hidden = run(params, condition, context)
    width = condition["tokens"].shape[1]
    if "last_hidden" in arrays:
        want = arrays["last_hidden"][:, width:]
        assert_close(hidden, want, 1e-5)
    if "img_embeds" in arrays:
        assert_close(image, arrays["img_embeds"], 1e-5)


def test_exact_padding_equals_no_padding(make, arrays, condition):
    """What `padding="exact"` is for: a prompt's logits do not depend on its neighbours' lengths."""
    policy, params = make()
    context = jnp.asarray(arrays["noisy_tokens"], jnp.int32)[:, : policy.context_length]
    padded = jax.jit(policy.logits)(params, condition, context)
    lengths = np.asarray(condition["mask"]).sum(axis=1)
    row, length = lengths.argmin(), lengths.min()  # a program for each length would be slow
    assert length < lengths.max()
    alone = {key: leaf[row : row + 1, :length] for key, leaf in condition.items()}
    got = jax.jit(policy.logits)(params, alone, context[row : row + 1])
    assert_close(got[0], padded[row], 1e-5)


def test_names_round_trip(make, golden):
    policy, params = make()
    ours, theirs = weights.to_reference(params, policy.name_rules), golden.tensors("janus")
    assert theirs.keys() - ours.keys() == {"language_model.lm_head.weight"}
    for key, array in ours.items():
        np.testing.assert_array_equal(array, theirs[key])
