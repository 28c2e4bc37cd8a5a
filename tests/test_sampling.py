"""Free-running generation: the distribution, the filters, and independence of the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vapi_jax.grpo import entropy
from vapi_jax.policy import make_policy
from vapi_jax.sampling import draw, filter_logits, generate

VOCAB, TOKENS = 7, 4
POLICY = make_policy(
    "class", dim=16, n_head=2, n_layer=2, vocab_size=VOCAB, block_size=TOKENS, multiple_of=16,
    num_classes=5,
)  # fmt: skip
LABELS = jnp.arange(6, dtype=jnp.int32) % 5
RNG = jax.random.key(7)


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.4, jnp.float32),
        jax.eval_shape(POLICY.init, RNG),
    )


@pytest.fixture(scope="module")
def plain(params):
    return generate(POLICY, params, LABELS, RNG, return_entropy=True)


def test_tokens_are_reproducible_and_in_range(params, plain):
    tokens, _ = plain
    assert (tokens.shape, tokens.dtype) == ((6, TOKENS), jnp.int32)
    assert np.all((np.asarray(tokens) >= 0) & (np.asarray(tokens) < VOCAB))
    again, _ = generate(POLICY, params, LABELS, RNG, return_entropy=True)
    np.testing.assert_array_equal(again, tokens)
    other, _ = generate(POLICY, params, LABELS, jax.random.key(8), return_entropy=True)
    assert np.any(np.asarray(other) != np.asarray(tokens))


def test_samples_do_not_depend_on_the_batch(params, plain):
    """Another batch size, another order: sample_ids say which sample is which."""
    rows = jnp.array([4, 1, 5])
    got = generate(POLICY, params, LABELS[rows], RNG, sample_ids=rows)
    np.testing.assert_array_equal(got, plain[0][rows])


def test_entropies_are_those_of_the_teacher_forced_distribution(params, plain):
    logits = jax.jit(POLICY.logits)(params, LABELS, plain[0][:, :-1])
    np.testing.assert_allclose(plain[1], entropy(logits), atol=1e-4)


def test_filters_and_temperature_act_on_what_is_drawn(params):
    options = {"temperature": 0.7, "top_k": 4, "top_p": 0.8}
    tokens, spread = generate(POLICY, params, LABELS, RNG, return_entropy=True, **options)
    logits = jax.jit(POLICY.logits)(params, LABELS, tokens[:, :-1])
    kept = filter_logits(logits / 0.7, 4, 0.8)
    np.testing.assert_allclose(spread, entropy(kept), atol=1e-4)
    chosen = np.take_along_axis(np.asarray(kept), np.asarray(tokens)[..., None], axis=-1)
    assert np.all(chosen > -np.inf)


def test_guidance_ends_with_its_interval(params):
    """Interval 0 guides tokens 0 and 1 (prefill and decoding step 0), later ones not."""
    scale = 3.0
    tokens, spread = generate(
        POLICY, params, LABELS, RNG, cfg_scale=scale, cfg_interval=0, return_entropy=True
    )
    forward = jax.jit(POLICY.logits)
    given = forward(params, LABELS, tokens[:, :-1])
    without = forward(params, POLICY.unconditional(LABELS), tokens[:, :-1])
    guided = without + scale * (given - without)
    want = jnp.concatenate([entropy(guided[:, :2]), entropy(given[:, 2:])], axis=1)
    np.testing.assert_allclose(spread, want, atol=1e-4)
    assert np.abs(entropy(guided) - entropy(given)).max() > 1e-2


def test_greedy_takes_the_most_probable_token(params):
    tokens, spread = generate(POLICY, params, LABELS, RNG, greedy=True, return_entropy=True)
    logits = jax.jit(POLICY.logits)(params, LABELS, tokens[:, :-1])
    np.testing.assert_array_equal(tokens, jnp.argmax(logits, axis=-1))
    np.testing.assert_array_equal(spread, 0)


def test_joint_frequencies_are_the_models(params):
    """Pairs (token 0, token 1) against p(x0) p(x1 | x0), 20000 samples, all 49 pairs at once."""
    count = 20_000
    labels = jnp.full(count, 2, jnp.int32)
    tokens = np.asarray(generate(POLICY, params, labels, RNG))
    first = jnp.arange(VOCAB, dtype=jnp.int32)
    context = jnp.stack([first, first, first], axis=1)
    probs = jax.nn.softmax(jax.jit(POLICY.logits)(params, labels[:VOCAB], context), axis=-1)
    joint = np.asarray(probs[:1, 0].T * probs[:, 1])
    seen = np.zeros((VOCAB, VOCAB))
    np.add.at(seen, (tokens[:, 0], tokens[:, 1]), 1)
    expected = joint * count
    usual = expected > 5
    chi2 = np.sum((seen - expected)[usual] ** 2 / expected[usual])
    freedom = usual.sum() - 1
    assert chi2 < freedom + 5 * np.sqrt(2 * freedom)


def test_draw_inverts_the_distribution():
    """Evenly spaced uniforms give every token its probability; impossible ones never come."""
    probs = np.array([0.0, 0.5, 0.0, 1e-3, 0.299, 0.2, 0.0])
    uniforms = (jnp.arange(10_000) + 0.5) / 10_000
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(probs, jnp.float32)), (10_000, 7))
    counts = np.bincount(np.asarray(jax.jit(draw)(uniforms, logits)), minlength=7)
    np.testing.assert_allclose(counts / 10_000, probs, atol=1.5e-4)
    ends = draw(jnp.array([0.0, 1.0 - 2**-24]), logits[:2])
    np.testing.assert_array_equal(ends, [1, 5])


def test_filter_logits():
    logits = jnp.log(jnp.array([[0.4, 0.3, 0.2, 0.1]]))

    def kept(**options):
        return (np.asarray(filter_logits(logits, **options)) > -np.inf)[0].tolist()

    assert kept() == [True] * 4
    assert kept(top_k=2) == [True, True, False, False]
    assert kept(top_k=9) == [True] * 4
    assert kept(top_p=0.35) == [True, False, False, False]  # always at least one
    assert kept(top_p=0.45) == [True, True, False, False]  # the one that crosses stays
    assert kept(top_k=3, top_p=0.6) == [True, True, False, False]
    tied = filter_logits(jnp.array([1.0, 2.0, 2.0, 0.0]), top_k=1)
    assert (np.asarray(tied) > -np.inf).tolist() == [False, True, True, False]


def test_entropy():
    logits = jnp.array([[0.0, 0.0, -jnp.inf], [5.0, -jnp.inf, -jnp.inf]])
    np.testing.assert_allclose(entropy(logits), [np.log(2), 0.0], atol=1e-6)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"cfg_interval": -2}, "cfg_interval"),
    ],
)
def test_mistakes_are_named(params, options, match):
    with pytest.raises(ValueError, match=match):
        generate(POLICY, params, LABELS, RNG, **options)
