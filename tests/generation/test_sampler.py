"""The sampler: whole narrow weights instead of split ones, and what it hands on."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.policies import BATCH, CASES, draw_weights, make_condition
from tests.helpers.tiny import make_tiny_method, with_random_head
from vapi_jax.bench import hlo
from vapi_jax.bench.batches import Compilations
from vapi_jax.common.images import to_uint8
from vapi_jax.generation import sampler
from vapi_jax.generation.sampler import (
    BrokenSamplesError,
    Sampler,
    decode,
    in_batches,
    most_at_once,
)
from vapi_jax.models import sampling
from vapi_jax.models.policies import make_policy
from vapi_jax.parallel.sharding import make_mesh, replicated, shard_whole, tree_shardings
from vapi_jax.training.train import load_frozen

LABELS = np.arange(30, dtype=np.int32) % 12


def conditions(ids):
    return LABELS[ids]


def parts(mesh, **changes):
    method = make_tiny_method("base", mesh, **changes)
    params = with_random_head(jax.jit(method.init)(jax.random.key(0)), 1)
    params = jax.device_put(params, tree_shardings(params, mesh))
    return method, params, load_frozen(method)


@pytest.fixture(scope="module")
def split():
    """A policy, its parameters split over four devices, and a tokenizer."""
    return parts(make_mesh(2, 4))


def sampler_of(method, frozen, batch=16, **options):
    return Sampler(method.policy, method.pixels, frozen, batch, **options)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["class", "text", "janus"])
def test_tokens_of_narrow_weights_are_those_of_float32_weights_to_the_bit(name, dtype):
    kind, options = CASES[name]
    policy = make_policy(kind, **{**options, "dtype": dtype})
    params = draw_weights(jax.eval_shape(policy.init, jax.random.key(0)))
    narrow = policy.narrowed(params)
    size, whole = (sum(leaf.nbytes for leaf in jax.tree.leaves(x)) for x in (narrow, params))
    assert size == whole if dtype == "float32" else size < 0.6 * whole
    condition = make_condition(kind, np.random.default_rng(0))
    context = jnp.zeros((BATCH, policy.context_length), jnp.int32)
    logits = [jax.jit(policy.logits)(x, condition, context) for x in (params, narrow)]
    np.testing.assert_array_equal(*logits)
    guided = {"cfg_scale": 1.5, "return_entropy": True}
    drawn = [sampling.generate(policy, x, condition, jax.random.key(3), **guided)
             for x in (params, policy.unstacked(narrow))]  # fmt: skip
    for one, other in zip(*drawn, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_kind_that_does_not_say_what_it_casts_or_unstacks_keeps_what_it_has(split):
    from vapi_jax.models.policy import Policy

    _, params, _ = split
    assert Policy.narrowed(None, params) is params
    assert Policy.unstacked(None, params) is params


def program(policy, weights, mesh):
    """The compiled loop over tokens for 16 samples."""
    batch = shard_whole({"labels": LABELS[:16], "ids": np.arange(16, dtype=np.uint32)}, mesh)
    whole = replicated(mesh)
    lowered = jax.jit(sampling._generate, static_argnames=sampling._STATIC).lower(
        policy, weights, batch["labels"], jax.device_put(jax.random.key(0), whole), batch["ids"],
        jax.device_put(np.float32(1), whole), jax.device_put(np.ones(16, np.float32), whole),
        top_k=0, top_p=1.0, guided=0, greedy=False, with_entropy=True,
    )  # fmt: skip
    return lowered.compile().as_text()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_is_gathered_while_tokens_are_drawn(dtype):
    mesh = make_mesh(2, 4)
    method, params, frozen = parts(mesh, policy={"dtype": dtype})
    sampler = sampler_of(method, frozen)
    assert any(not leaf.is_fully_replicated for leaf in jax.tree.leaves(params))
    assert re.search(r"all-gather|all-reduce", program(method.policy, params, mesh))
    weights = sampler.weights(params)
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(weights))
    text = program(method.policy, weights, mesh)
    assert hlo.totals(hlo.collectives(text)) == {}
    # Nor cast, nor taken out of a stack: the loop finds its matrices as it multiplies them.
    kernel = weights["layers"][0]["attention"]["wqkv"]["kernel"]
    assert (str(kernel.dtype), kernel.ndim, len(weights["layers"])) == (
        dtype,
        2,
        method.policy.config.n_layer,
    )


def test_batches_hold_the_samples_of_their_numbers_and_their_entropies(split):
    method, params, frozen = split
    sampler = sampler_of(method, frozen)
    drawn = list(sampler(params, conditions, in_batches(30, 16), 3, temperature=0.9))
    assert [batch.samples for batch in drawn] == [range(16), range(16, 30)]
    assert all(batch.images.dtype == np.uint8 for batch in drawn)
    tokens, entropies = sampling.generate(
        method.policy, params, LABELS, jax.random.key(3), temperature=0.9, return_entropy=True
    )
    padded = np.pad(np.asarray(tokens), ((0, 2), (0, 0)))
    images = to_uint8(decode(method.pixels, frozen, shard_whole(padded, method.mesh)))[:30]
    got = np.concatenate([batch.images for batch in drawn])
    assert np.abs(got.astype(int) - images).max() <= 1  # another batch may round otherwise
    assert np.mean(got != images) < 1e-3
    got = np.concatenate([batch.entropies for batch in drawn])
    np.testing.assert_allclose(got, entropies, rtol=1e-5, atol=1e-6)


def test_another_temperature_or_other_weights_compile_nothing_and_no_temperature_no_entropy(split):
    method, params, frozen = split
    sampler = sampler_of(method, frozen)
    batches = in_batches(16, 16)
    first = next(sampler(params, conditions, batches, 3, temperature=1.0))
    other = jax.tree.map(lambda x: 2 * x, params)
    with Compilations() as compiled:
        next(sampler(other, conditions, batches, 4, temperature=0.5))
    assert compiled.count == 0
    plain = next(sampler(params, conditions, batches, 3))
    assert plain.entropies is None
    np.testing.assert_array_equal(plain.images, first.images)


def test_one_batch_is_drawn_ahead_of_the_caller_and_no_more(split):
    method, params, frozen = split
    asked = []

    def noted(ids):
        asked.append(int(ids[0]))
        return conditions(ids)

    stream = sampler_of(method, frozen, 8)(params, noted, in_batches(24, 8), 0)
    next(stream)
    assert asked == [0, 8]
    assert len(list(stream)) == 2


def test_values_that_are_no_number_name_their_samples(split):
    method, params, frozen = split
    broken = jax.tree.map(lambda x: x * np.nan, frozen["tokenizer"])
    sampler = sampler_of(method, {"tokenizer": broken}, 8)
    with pytest.raises(BrokenSamplesError, match="samples 0 to 4 "):
        list(sampler(params, conditions, in_batches(5, 8), 0))


def test_as_many_are_drawn_at_once_as_their_keys_and_values_leave_room_for(monkeypatch):
    """XXL at 384 px: 48 layers, 575 tokens and a label, keys and values of 1536 in bfloat16."""
    xxl = make_policy("class", size="GPT-XXL", block_size=576, dtype="bfloat16")
    row = 48 * 2 * 576 * 1536 * 2 + 576 + 4  # and which positions are filled, and how many
    monkeypatch.setattr(sampler, "CACHE_BYTES", 100 * row)
    device = jax.devices()[0]
    assert most_at_once(xxl, False, device) == 100
    assert most_at_once(xxl, True, device) == 50
    monkeypatch.setattr(sampler, "CACHE_BYTES", row // 2)
    assert most_at_once(xxl, False, device) == 1
    # Of a device whose memory is known a quarter.
    monkeypatch.setattr(sampler, "memory_of", lambda _: 4 * 10 * row)
    monkeypatch.setattr(sampler, "CACHE_BYTES", 100 * row)
    assert most_at_once(xxl, False, device) == 10


def test_a_sampler_needs_devices(split):
    method, _, frozen = split
    inside = dataclasses.replace(method.pixels, mesh=None)
    with pytest.raises(AssertionError, match="devices"):
        Sampler(method.policy, inside, frozen, 8)
