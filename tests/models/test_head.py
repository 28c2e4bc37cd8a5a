"""The output layer in blocks: the numbers of all logits at once, and never all logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from tests.helpers.compare import assert_close, assert_close_in_norm
from tests.helpers.jaxprs import largest_intermediate
from vapi_jax.models import categorical
from vapi_jax.models.categorical import num_choices, sample_group, uniforms_24
from vapi_jax.models.head import (
    Head,
    block_length,
    cross_entropy_and_entropy,
    draw,
    project,
    token_log_probs,
)

B, T, D, V, K = 3, 6, 5, 11, 4
LIMITS = [B * V, 2 * B * V, 2**26]
"""One position to a block, two, and all in one."""


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32)
    head = Head(*(jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((D, V), (V,))))
    tokens = jnp.asarray(rng.integers(0, V, (B, K, T)), jnp.int32)
    tokens = tokens.at[:, 1].set(tokens[:, 0])  # a token drawn twice adds up
    weights = jnp.asarray(rng.normal(size=(B, K, T)), jnp.float32)
    return hidden, head, tokens, weights


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("with_bias", [True, False])
def test_blocks_give_the_values_and_gradients_of_all_logits(case, limit, temperature, with_bias):
    hidden, head, tokens, weights = case
    head = head if with_bias else Head(head.kernel)

    def plain(hidden, head):
        logps = categorical.token_log_probs(project(hidden, head), tokens, temperature)
        return jnp.sum(logps * weights), logps

    def blocks(hidden, head):
        logps = token_log_probs(hidden, head, tokens, temperature, limit)
        return jnp.sum(logps * weights), logps

    args = (hidden, head)
    (_, want), wanted = jax.value_and_grad(plain, argnums=(0, 1), has_aux=True)(*args)
    (_, got), grads = jax.jit(jax.value_and_grad(blocks, argnums=(0, 1), has_aux=True))(*args)
    assert_close(got, want, 1e-6)
    for ours, theirs in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted), strict=True):
        assert_close(ours, theirs, 2e-6)


def test_the_gradient_is_that_of_finite_differences(case):
    hidden, head, tokens, _ = case

    def logps(hidden, kernel, bias):
        return token_log_probs(hidden, Head(kernel, bias), tokens, 0.8, LIMITS[0])

    check_grads(logps, (hidden, *head), order=1, modes=["rev"], atol=5e-2, rtol=5e-2)


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("with_bias", [True, False])
def test_cross_entropy_and_entropy_are_those_of_all_logits(case, limit, temperature, with_bias):
    """In value and gradient; the temperature is the entropy's, and no gradient flows through that."""
    hidden, head, tokens, _ = case
    head, tokens = head if with_bias else Head(head.kernel), tokens[:, 2]
    weights = jnp.arange(1.0, B + 1)

    def plain(hidden, head):
        logits = project(hidden, head)
        entropy = jax.lax.stop_gradient(categorical.entropy(logits, temperature))
        ce = categorical.cross_entropy(logits, tokens)
        return jnp.sum(ce * weights) + entropy.sum(), (ce, entropy)

    def blocks(hidden, head, temperature):
        ce, entropy = cross_entropy_and_entropy(hidden, head, tokens, temperature, limit)
        return jnp.sum(ce * weights) + entropy.sum(), (ce, entropy)

    gradient = jax.value_and_grad(plain, argnums=(0, 1), has_aux=True)
    (_, want), wanted = gradient(hidden, head)
    gradient = jax.jit(jax.value_and_grad(blocks, argnums=(0, 1), has_aux=True))
    (_, got), grads = gradient(hidden, head, temperature)  # traced, as in held-out judgements
    assert [x.shape for x in got] == [(B,), (B, T)]
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-6)
    for ours, theirs in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=5e-6)


@pytest.mark.parametrize("limit", LIMITS)
def test_draws_are_those_of_the_whole_logits(case, limit):
    hidden, head, _, _ = case
    key, temperature = jax.random.key(3), 0.7
    uniforms = uniforms_24(key, (B, T, 40, num_choices(V)))
    samples, entropy = jax.jit(lambda *a: draw(*a, temperature, limit))(hidden, head, uniforms)
    logits = project(hidden, head)
    np.testing.assert_array_equal(samples, sample_group(key, logits, 40, temperature))
    assert_close(entropy, categorical.entropy(logits, temperature), 1e-6)
    assert len(np.unique(samples)) > V // 2


def test_nothing_flows_back_through_a_draw(case):
    hidden, head, _, _ = case
    uniforms = uniforms_24(jax.random.key(0), (B, T, 2, num_choices(V)))
    gradient = jax.grad(lambda h: draw(h, head, uniforms)[1].sum())(hidden)
    np.testing.assert_array_equal(gradient, 0.0)


@pytest.mark.parametrize("function", [token_log_probs, cross_entropy_and_entropy])
def test_forward_and_backward_never_hold_all_logits(function):
    batch, length, width, vocab = 4, 64, 8, 512
    hidden = jax.ShapeDtypeStruct((batch, length, width), jnp.float32)
    kernel = jax.ShapeDtypeStruct((width, vocab), jnp.float32)
    several = (3,) if function is token_log_probs else ()
    tokens = jax.ShapeDtypeStruct((batch, *several, length), jnp.int32)

    def traced(limit):
        def loss(hidden, kernel, tokens):
            return jax.tree.leaves(function(hidden, Head(kernel), tokens, 1.0, limit))[0].sum()

        return jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(hidden, kernel, tokens).jaxpr

    assert largest_intermediate(traced(2**26)) == batch * length * vocab  # the measure measures
    assert largest_intermediate(traced(batch * 4 * vocab)) == batch * 4 * vocab


def test_matmuls_run_in_the_compute_dtype_and_accumulate_in_float32(case):
    """All four of them: the draw's, the forward's and both of the backward."""
    hidden, head, _, weights = case

    def loss(hidden, kernel):
        samples, _ = draw(hidden, Head(kernel), jnp.full((B, T, K, num_choices(V)), 0.5))
        return jnp.sum(token_log_probs(hidden, Head(kernel), samples) * weights)

    lowered = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(
        hidden.astype(jnp.bfloat16), head.kernel
    )
    dots = [line for line in lowered.as_text().splitlines() if "dot_general" in line]
    assert len(dots) == 5  # draw, forward, forward again, towards hidden, towards the kernel
    for line in dots:
        operands, result = line.rsplit(" : ", 1)[1].split(" -> ")
        assert operands.count("bf16") == 2, line
        # Only the gradient handed on to the layers below leaves in bfloat16.
        assert "f32" in result.replace("bf16", "") or f"{D}xbf16" in result, line


def test_bfloat16_gradients_are_close_to_float32_ones(case):
    hidden, head, tokens, weights = case

    def loss(hidden, kernel):
        return jnp.sum(token_log_probs(hidden, Head(kernel), tokens) * weights)

    wanted = jax.grad(loss, argnums=1)(hidden, head.kernel)
    got = jax.grad(loss, argnums=1)(hidden.astype(jnp.bfloat16), head.kernel)
    assert got.dtype == jnp.float32
    assert_close_in_norm(got, wanted, 0.02)


@pytest.mark.parametrize(
    "batch, length, vocab, limit, want",
    [(32, 576, 16384, 2**26, 96), (1, 576, 16384, 2**26, 576), (128, 256, 16384, 2**26, 32),
     (10, 7, 10, 1, 1), (1, 12, 10, 50, 4)],
)  # fmt: skip
def test_blocks_divide_the_positions(batch, length, vocab, limit, want):
    assert block_length(batch, length, vocab, limit) == want
