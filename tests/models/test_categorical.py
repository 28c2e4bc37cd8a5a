"""Categorical distributions: the sampler, log-probabilities and entropy."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from tests.helpers.compare import assert_close
from tests.helpers.compilers import optimised
from vapi_jax.models.categorical import draw, entropy, num_choices, sample_group, token_log_probs


def histogram(logits, draws, temperature=1.0, key=0):
    """Counts of `draws` samples of one distribution."""
    group = 1 << 14  # what stays in a processor's caches
    keys = jax.random.split(jax.random.key(key), draws // group)
    samples = jax.lax.map(lambda k: sample_group(k, logits[None], group, temperature), keys)
    return np.bincount(np.asarray(samples).ravel(), minlength=logits.shape[-1])


@pytest.fixture
def compile_effort():
    """Many draws are work for the CPU, not the compiler."""
    with optimised():
        yield


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


def test_rare_tokens_of_one_in_a_million(compile_effort):
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


@pytest.mark.parametrize(
    ("vocab", "want"),
    [(1, 1), (8, 1), (9, 2), (64, 2), (65, 3), (1024, 4), (4096, 4), (4097, 5), (16384, 5)],
)
def test_a_token_is_chosen_in_a_few_steps(vocab, want):
    assert num_choices(vocab) == want


def descend(uniforms, probs):
    """The same choices in float64: an eighth of the range (rounded up), an eighth of that, ..."""
    low, high = 0, 8 ** (len(uniforms) - 1) * -(-len(probs) // 8 ** (len(uniforms) - 1))
    probs = np.pad(probs, (0, high - len(probs)))
    for left, uniform in zip(range(len(uniforms) - 1, -1, -1), uniforms, strict=True):
        cdf = probs[low:high].reshape(-1, 8**left).sum(axis=1).cumsum()
        part = np.searchsorted(cdf, uniform * cdf[-1], side="right")
        low, high = low + part * 8**left, low + (part + 1) * 8**left
    return low


@pytest.mark.parametrize("vocab", [5, 8, 23, 64, 100, 513, 1024, 5000])
def test_draws_are_those_of_choices_in_float64(vocab):
    """Some tokens are impossible, and whole blocks of them, the first and the last as well."""
    rng = np.random.default_rng(vocab)
    logits = rng.normal(size=(3, 2, vocab)).astype(np.float32) * 3
    logits[rng.random(logits.shape) < 0.3] = -np.inf
    logits[..., : vocab // 4], logits[..., vocab - vocab // 4 :] = -np.inf, -np.inf
    logits[..., vocab // 3 : vocab // 2] = -np.inf
    logits[..., vocab // 2] = 1.0
    uniforms = rng.integers(0, 2**24, (3, 2, 7, num_choices(vocab))) / np.float32(2**24)
    got = jax.jit(draw)(uniforms, logits)
    probs = np.exp(np.float64(logits))
    want = [[[descend(u, p) for u in us] for us, p in zip(*pair, strict=True)]
            for pair in zip(uniforms, probs, strict=True)]  # fmt: skip
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_draws_at_the_ends_of_every_choice_are_possible_tokens(dtype):
    """Uniforms of 0 and just below 1 at each choice, between impossible and sure tokens."""
    vocab, corners = 600, np.array([0.0, 2**-24, 0.5, 1 - 2**-24], np.float32)
    uniforms = np.stack(np.meshgrid(*[corners] * num_choices(vocab), indexing="ij"), axis=-1)
    rng = np.random.default_rng(0)
    logits = rng.choice(
        [-np.inf, -200.0, -87.0, -16.0, 0.0], (64, vocab), p=[0.5, 0.2, 0.1, 0.1, 0.1]
    )
    logits[::2] = np.where(rng.random((32, vocab)) < 0.99, -np.inf, logits[::2])
    logits[:, 300] = 88.0 * (np.arange(64) % 3 == 0)
    logits = jnp.asarray(logits, dtype)
    rows = jnp.broadcast_to(jnp.asarray(uniforms).reshape(-1, 4), (64, 256, 4))
    drawn = jax.jit(draw)(rows, logits)
    chosen = np.take_along_axis(np.asarray(logits, np.float32), np.asarray(drawn), axis=-1)
    assert np.all(chosen > -np.inf)
    top = np.asarray(logits, np.float32).max(axis=-1, keepdims=True)
    assert np.all(chosen - top > -104)  # the smallest float32 is exp(-103.3)


def test_draw_inverts_the_distribution():
    """Evenly spaced uniforms give every token its probability; impossible ones never come."""
    probs = np.array([0.0, 0.5, 0.0, 1e-3, 0.299, 0.2, 0.0])
    uniforms = (jnp.arange(10_000) + 0.5) / 10_000
    logits = jnp.log(jnp.asarray(probs, jnp.float32))
    counts = np.bincount(np.asarray(jax.jit(draw)(uniforms[:, None], logits)), minlength=7)
    assert np.abs(counts - 10_000 * probs).max() < 1.5
    ends = draw(jnp.array([[0.0], [1.0 - 2**-24]]), logits)
    np.testing.assert_array_equal(ends, [1, 5])


def test_draws_over_several_steps_follow_the_distribution():
    """200,000 draws from one distribution over 1024 tokens, some of them impossible."""
    count = 200_000
    logits = np.array(some_logits(1))[0]
    logits[::5] = -np.inf
    uniforms = jax.random.uniform(jax.random.key(6), (count, num_choices(1024)))
    seen = np.bincount(np.asarray(jax.jit(draw)(uniforms, logits)), minlength=1024)
    probs = np.exp(np.float64(logits))
    expected = count * probs / probs.sum()
    assert np.all(seen[expected == 0] == 0)
    usual = expected > 5
    chi2 = np.sum((seen - expected)[usual] ** 2 / expected[usual])
    freedom = usual.sum() - 1
    assert freedom > 300
    assert abs(chi2 - freedom) < 5 * np.sqrt(2 * freedom)


def some_logits(count, vocab=1024):
    return jax.random.normal(jax.random.key(5), (count, vocab)) * 3.0


def test_a_draw_hardly_notices_rounding():
    """Logits off by a thousandth change one draw in 600, and one in 40 where one inverse CDF over all
    tokens is searched, each step of which the error can move across the uniform.
    """
    count = 4000
    logits = some_logits(count)
    others = logits + 1e-3 * jax.random.normal(jax.random.key(7), logits.shape)
    uniforms = jax.random.uniform(jax.random.key(8), (count, 1, num_choices(1024)))
    fast = jax.jit(draw)
    changed = np.sum(np.asarray(fast(uniforms, logits) != fast(uniforms, others)))
    cdfs = (np.cumsum(np.asarray(jax.nn.softmax(x)), axis=-1) for x in (logits, others))
    first, second = (np.sum(cdf <= np.asarray(uniforms[:, 0, :1]), axis=-1) for cdf in cdfs)
    assert changed < 16
    assert np.sum(first != second) > 60


def test_positions_and_samples_are_independent():
    logits = jnp.zeros((2, 1, 2))
    samples = np.asarray(sample_group(jax.random.key(0), jnp.tile(logits, (1, 64, 1)), 512))
    flat = samples.reshape(-1, 64).astype(float)
    correlation = np.corrcoef(flat.T) - np.eye(64)
    assert np.abs(correlation).max() < 0.2
    between = np.corrcoef(samples[0].astype(float)) - np.eye(512)
    assert np.abs(between).max() < 0.75


def test_shape_and_dtype():
    logits = jax.random.normal(jax.random.key(1), (3, 5, 11), jnp.bfloat16)
    samples = sample_group(jax.random.key(2), logits, 4)
    assert samples.shape == (3, 4, 5)
    assert samples.dtype == jnp.int32


def test_nothing_of_size_batch_group_length_vocabulary():
    batch, length, vocab, group = 2, 8, 1024, 16
    logits = jnp.zeros((batch, length, vocab))
    uniforms = jnp.zeros((batch, length, group, num_choices(vocab)))
    lowered = jax.jit(draw).lower(uniforms, logits)
    with optimised():
        memory = lowered.compile().memory_analysis()
    full = batch * group * length * vocab * 4
    assert memory.temp_size_in_bytes < full / 2
    text = lowered.as_text()
    assert text.count('"stablehlo.gather"(') == 1  # of a block for every draw
    assert not re.search(r"stablehlo\.(sort|while)", text)


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
