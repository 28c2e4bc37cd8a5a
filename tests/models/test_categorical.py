"""Categorical distributions: group sampling by inverse CDF, log-probabilities and entropy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from tests.helpers.compare import assert_close
from vapi_jax.models.categorical import entropy, sample_group, token_log_probs


def histogram(logits, draws, temperature=1.0, key=0):
    """Counts of `draws` samples of one distribution."""
    group = 4096
    rows = jnp.broadcast_to(logits, (draws // group, logits.shape[-1]))
    samples = sample_group(jax.random.key(key), rows, group, temperature)
    return np.bincount(np.asarray(samples).ravel(), minlength=logits.shape[-1])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("vocab", [3, 257, 1000])
def test_matches_the_softmax(vocab, temperature):
    logits = jax.random.normal(jax.random.key(vocab), (vocab,)) * 2
    counts = histogram(logits, 1 << 19, temperature)
    probs = np.asarray(jax.nn.softmax(logits.astype(jnp.float32) / temperature), np.float64)
    probs /= probs.sum()
    keep = probs * counts.sum() > 5  # the chi-square approximation wants five expected
    observed = np.append(counts[keep], counts[~keep].sum())
    expected = np.append(probs[keep], probs[~keep].sum()) * counts.sum()
    observed, expected = observed[expected > 0], expected[expected > 0]
    assert stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > 1e-4


def test_rare_tokens_of_one_in_a_million():
    """1000 tokens of probability 1e-6 each, at both ends and in the middle of the vocabulary."""
    rare, common = 1000, 24
    probs = np.full(rare + common, 1e-6)
    places = np.linspace(300, 700, common).astype(int)
    probs[places] = (1 - rare * 1e-6) / common
    draws = 1 << 24
    counts = histogram(jnp.log(jnp.asarray(probs, jnp.float32)), draws)
    mask = np.ones(len(probs), bool)
    mask[places] = False
    expected = rare * 1e-6 * draws
    assert abs(counts[mask].sum() - expected) < 5 * np.sqrt(expected)
    # And spread over them as a Poisson of mean 17 each, not bunched on a grid of the uniforms.
    chi2 = ((counts[mask] - 1e-6 * draws) ** 2 / (1e-6 * draws)).sum()
    assert stats.chi2.sf(chi2, rare) > 1e-4
    assert stats.chi2.cdf(chi2, rare) > 1e-4


def test_impossible_tokens_are_never_drawn():
    logits = jnp.where(jnp.arange(64) % 3 == 0, -jnp.inf, jnp.linspace(-30.0, 3.0, 64))
    counts = histogram(logits, 1 << 18)
    assert counts[np.arange(64) % 3 == 0].sum() == 0


def test_positions_and_samples_are_independent():
    logits = jnp.zeros((2, 1, 2))
    samples = np.asarray(sample_group(jax.random.key(0), jnp.tile(logits, (1, 64, 1)), 512))
    flat = samples.reshape(-1, 64).astype(float)
    correlation = np.corrcoef(flat.T) - np.eye(64)
    assert np.abs(correlation).max() < 0.2
    between = np.corrcoef(samples[0].astype(float)) - np.eye(512)
    assert np.abs(between).max() < 0.75


def test_shape_dtype_and_no_gradient():
    logits = jax.random.normal(jax.random.key(1), (3, 5, 11), jnp.bfloat16)
    samples = sample_group(jax.random.key(2), logits, 4)
    assert samples.shape == (3, 4, 5)
    assert samples.dtype == jnp.int32

    def loss(x):
        return jnp.sum(x * sample_group(jax.random.key(2), x, 1)[..., 0, :, None])

    x = logits.astype(jnp.float32)
    picked = sample_group(jax.random.key(2), x, 1)[..., 0, :, None]
    expected = jnp.broadcast_to(picked, x.shape).astype(jnp.float32)
    np.testing.assert_array_equal(jax.grad(loss)(x), expected)


def test_nothing_of_size_batch_group_length_vocabulary():
    batch, length, vocab, group = 2, 8, 1024, 16
    logits = jnp.zeros((batch, length, vocab))
    compiled = jax.jit(lambda k, x: sample_group(k, x, group)).lower(jax.random.key(0), logits)
    memory = compiled.compile().memory_analysis()
    full = batch * group * length * vocab * 4
    assert memory.temp_size_in_bytes < full / 2


def test_token_log_probs_are_a_softmax():
    logits = jax.random.normal(jax.random.key(0), (2, 3, 5))
    samples = jax.random.randint(jax.random.key(1), (2, 4, 3), 0, 5)
    got = token_log_probs(logits, samples, temperature=0.7)
    table = np.asarray(jax.nn.log_softmax(logits / 0.7))
    b, _, t = np.ogrid[:2, :4, :3]
    assert_close(got, table[b, t, samples], 1e-6)


def test_entropy_limits():
    """Of even chances, with one of them impossible, and of a certainty."""
    cases = [([0.0] * 3, np.log(3)), ([0.0, -np.inf, 0.0], np.log(2)), ([500.0, 0.0, -np.inf], 0.0)]
    logits, want = map(np.array, zip(*cases, strict=True))
    assert_close(entropy(jnp.asarray(logits, jnp.float32)), want, 1e-6)
