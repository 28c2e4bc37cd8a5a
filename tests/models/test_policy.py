"""What every generator must satisfy, whichever kind it is. A new kind is one more row in CASES."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.compare import assert_close
from tests.helpers.policies import (
    BATCH,
    CASES,
    JANUS,
    LLAMA,
    TOKENS,
    VOCAB,
    draw_weights,
    make_condition,
)
from vapi_jax.models import conditions
from vapi_jax.models.policies import make_policy


@dataclasses.dataclass
class Case:
    kind: str
    policy: object
    params: dict
    condition: object
    context: jnp.ndarray

    @functools.cached_property
    def forward(self):
        return jax.jit(self.policy.logits)

    @functools.cached_property
    def logits(self):
        return np.asarray(self.forward(self.params, self.condition, self.context))

    @functools.cached_property
    def within(self):
        return 2e-2 if self.policy.config.dtype == "bfloat16" else 2e-6


@pytest.fixture(scope="module", params=sorted(CASES))
def case(request):
    kind, config = CASES[request.param]
    policy = make_policy(kind, **config)
    rng = np.random.default_rng(0)
    params = draw_weights(jax.eval_shape(policy.init, jax.random.key(0)))
    context = jnp.asarray(rng.integers(0, VOCAB, (BATCH, TOKENS - 1)), jnp.int32)
    return Case(kind, policy, params, make_condition(kind, rng), context)


def test_shapes_and_dtypes(case):
    policy = case.policy
    assert (policy.vocab_size, policy.num_tokens, policy.context_length) == (
        VOCAB,
        TOKENS,
        TOKENS - 1,
    )
    assert hash(policy) == hash(dataclasses.replace(policy))  # may be a static argument of jit
    logits = jax.eval_shape(policy.logits, case.params, case.condition, case.context)
    assert (logits.shape, logits.dtype) == ((BATCH, TOKENS, VOCAB), jnp.float32)
    embedded = jax.eval_shape(policy.embed, case.params, case.condition)
    assert embedded.ndim == 3 and embedded.shape[0] == BATCH
    first, cache = jax.eval_shape(policy.prefill, case.params, case.condition)
    assert (first.shape, first.dtype) == ((BATCH, VOCAB), jnp.float32)
    cache = jax.eval_shape(lambda cache: policy.with_room(cache, 1), cache)
    token = jnp.zeros(BATCH, jnp.int32)
    after, grown = jax.eval_shape(policy.decode, case.params, cache, token, jnp.int32(0))
    assert (after.shape, after.dtype) == (first.shape, first.dtype)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), grown) == jax.tree.map(
        lambda x: (x.shape, x.dtype), cache
    )
    assert all(leaf.shape[0] in (1, BATCH) for leaf in jax.tree.leaves(cache))


def test_init_is_deterministic_and_in_float32(case):
    init = jax.jit(case.policy.init)
    first, again, other = (init(jax.random.key(seed)) for seed in (0, 0, 1))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(first))
    same = [
        np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (first, again)), strict=True)
    ]
    assert all(same)
    moved = [
        not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (first, other)), strict=True)
    ]
    assert sum(moved) >= 5  # embeddings and matrices; norms and zero starts are the same


def test_causal(case):
    """Changing context token t leaves the logits of tokens 0 .. t alone and changes later ones."""
    changed = (case.context + jnp.eye(BATCH, dtype=jnp.int32)) % VOCAB  # row t: token t
    after = np.asarray(case.forward(case.params, case.condition, changed))
    for t in range(BATCH):
        np.testing.assert_array_equal(after[t, : t + 1], case.logits[t, : t + 1])
        moved = np.abs(after[t, t + 1 :] - case.logits[t, t + 1 :]).max(axis=-1)
        assert np.all(moved > 1e-4), f"token {t} is not seen by every later position"


def test_rows_are_independent(case):
    order = np.roll(np.arange(BATCH), 3)
    condition = jax.tree.map(lambda leaf: leaf[order], case.condition)
    got = case.forward(case.params, condition, case.context[order])
    assert_close(got, case.logits[order], case.within)


def test_unconditional_keeps_the_structure_and_drops_the_condition(case):
    without = case.policy.unconditional(case.condition)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), without) == jax.tree.map(
        lambda x: (x.shape, x.dtype), case.condition
    )
    context = jnp.broadcast_to(case.context[:1], case.context.shape)
    given = np.asarray(case.forward(case.params, case.condition, context))
    logits = np.asarray(case.forward(case.params, without, context))
    changed = np.abs(logits - given).max(axis=(1, 2)) > 1e-3
    # A Janus prompt of two tokens is all frame and has nothing to drop.
    assert changed.sum() >= BATCH // 2
    if case.kind == "class":
        assert_close(logits, np.broadcast_to(logits[:1], logits.shape), 2e-6)


def test_drop_condition(case):
    without = case.policy.unconditional(case.condition)
    keys = jax.random.split(jax.random.key(3), BATCH)
    kept = conditions.drop(case.policy.condition, keys, case.condition, 0.0)
    dropped = conditions.drop(case.policy.condition, keys, case.condition, 1.0)
    for got, want in ((kept, case.condition), (dropped, without)):
        assert jax.tree.structure(got) == jax.tree.structure(want)
        jax.tree.map(np.testing.assert_array_equal, got, want)


def test_whether_a_condition_is_dropped_depends_on_its_own_key_alone(case):
    keys = jax.random.split(jax.random.key(3), BATCH)
    together = conditions.drop(case.policy.condition, keys, case.condition, 0.5)
    for i in range(BATCH):
        one = jax.tree.map(lambda x, i=i: x[i : i + 1], case.condition)
        alone = conditions.drop(case.policy.condition, keys[i : i + 1], one, 0.5)
        jax.tree.map(lambda a, b, i=i: np.testing.assert_array_equal(a[0], b[i]), alone, together)


def test_cached_decoding_equals_teacher_forcing(case):
    @jax.jit
    def run(params, condition, context):
        first, cache = case.policy.prefill(params, condition)
        cache = case.policy.with_room(cache, TOKENS - 1)

        def step(cache, inputs):
            logits, cache = case.policy.decode(params, cache, *inputs)
            return cache, logits

        _, rest = jax.lax.scan(step, cache, (context.T, jnp.arange(TOKENS - 1)))
        return jnp.concatenate([first[None], rest]).swapaxes(0, 1)

    got = run(case.params, case.condition, case.context)
    assert_close(got, case.logits, case.within)


def test_padding_changes_nothing():
    """Text and (exact) Janus: what stands in a padded place is never seen."""
    for name in ("text", "janus"):
        kind, config = CASES[name]
        policy = make_policy(kind, **config)
        rng = np.random.default_rng(1)
        params = draw_weights(jax.eval_shape(policy.init, jax.random.key(0)), 0.3)
        condition = make_condition(kind, rng)
        content = "features" if kind == "text" else "tokens"
        hidden = ~np.asarray(condition["mask"])
        hidden = hidden[..., None] if kind == "text" else hidden
        other = {**condition, content: jnp.where(hidden, 7, condition[content])}
        context = jnp.zeros((BATCH, TOKENS - 1), jnp.int32)
        forward = jax.jit(policy.logits)
        given, changed = forward(params, condition, context), forward(params, other, context)
        assert np.any(np.asarray(condition[content] != other[content]))
        assert_close(given, changed, 2e-6)


def test_same_position_alignment_takes_all_tokens_and_cannot_sample():
    policy = make_policy("janus", **JANUS, alignment="same_position")
    assert policy.context_length == TOKENS
    params = jax.eval_shape(policy.init, jax.random.key(0))
    condition = policy.example_condition(2)
    context = jax.ShapeDtypeStruct((2, TOKENS), jnp.int32)
    assert jax.eval_shape(policy.logits, params, condition, context).shape == (2, TOKENS, VOCAB)
    with pytest.raises(ValueError, match="no sampling"):
        policy.prefill(params, condition)


@pytest.mark.parametrize(
    "kind, config, error, match",
    [
        ("diffusion", {}, ValueError, "'diffusion'.*class.*text.*janus"),
        ("class", {"size": "GPT-Z"}, ValueError, "GPT-Z.*GPT-B"),
        ("class", {"model_type": "t2i"}, ValueError, "t2i"),
        ("class", {"wings": 2}, TypeError, "wings"),
        ("class", {"block_size": 15}, ValueError, "block_size.*15"),
        ("class", {"n_kv_head": 5}, ValueError, "n_kv_head"),
        ("class", {"cls_token_num": 3}, ValueError, "cls_token_num"),
        ("class", {"dim": 24, "n_head": 4}, ValueError, "RoPE"),
        ("janus", {"alignment": "diagonal"}, ValueError, "alignment"),
        ("janus", {"padding": "none"}, ValueError, "padding"),
        ("janus", {"pad_id": -1}, ValueError, "pad_id"),
    ],
)
def test_mistakes_are_named(kind, config, error, match):
    with pytest.raises(error, match=match):
        make_policy(kind, **config)


def test_guidance_needs_an_unconditional_row():
    policy = make_policy("class", **LLAMA, class_dropout_prob=0.0)
    with pytest.raises(ValueError, match="class_dropout_prob"):
        policy.unconditional(policy.example_condition(2))
    rows = jax.eval_shape(policy.init, jax.random.key(0))["cls_embedding"]["embedding"].shape[0]
    assert rows == LLAMA["num_classes"]
