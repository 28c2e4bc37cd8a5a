"""LlamaGen's transformer against the reference's numbers: class and text conditioning."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.compare import assert_close
from tests.helpers.golden import KINDS, make_generator, read_condition
from vapi_jax.models import llama
from vapi_jax.models.attention import causal_mask
from vapi_jax.weights import names as weights


@pytest.fixture(scope="module", params=sorted(KINDS))
def case(request, golden):
    arrays = golden.npz(request.param)
    policy, params = make_generator(golden, request.param)
    return request.param, policy, params, arrays


def test_logits_and_hidden_states(case):
    name, policy, params, arrays = case
    given = read_condition(name, arrays)
    without = policy.unconditional(given)
    forward = jax.jit(
        lambda params, condition, context: llama.Llama(policy.config).apply(
            {"params": params}, condition, context, mutable=["intermediates"]
        )
    )
    contexts = {
        "clean": jnp.asarray(arrays["tokens"][:, :-1], jnp.int32),
        "noisy": jnp.asarray(arrays["noisy_context"], jnp.int32),
    }
    checked = 0
    for kind, context in contexts.items():
        for prefix, condition in (("", given), ("uncond_", without)):
            logits, state = forward(params, condition, context)
            assert logits.dtype == jnp.float32
            if f"logits_{prefix}{kind}" not in arrays:
                continue
            want = arrays[f"logits_{prefix}{kind}"]
            assert_close(logits, want, 1e-5)
            checked += 1
            if (prefix, kind) == ("", "clean"):
                hidden = state["intermediates"]["layers"]["hidden"][0]
                seen = {f"hidden_layer{i}": h for i, h in enumerate(hidden)}
                seen["hidden_norm"] = state["intermediates"]["hidden_norm"][0]
                for key in seen.keys() & arrays.keys():
                    want = arrays[key][:, -seen[key].shape[1] :]  # the norm: where logits are read
                    assert_close(seen[key], want, 1e-5)
    assert checked >= 2


def test_rotation_table(case):
    _, policy, _, arrays = case
    if "freqs_cis" not in arrays:
        pytest.skip("this golden set has no freqs_cis")
    table = llama.rope_table(policy.config)
    assert_close(table, arrays["freqs_cis"], 1e-6)
    assert not np.any(table[: policy.config.cls_token_num])


def test_mask_is_the_reference_mask(golden):
    arrays = golden.npz("gpt_t2i")
    if "attn_mask_full" not in arrays:
        pytest.skip("this golden set has no attn_mask_full")
    want = arrays["attn_mask_full"]
    got = causal_mask(jnp.asarray(arrays["emb_mask"]).astype(bool), want.shape[-1])
    np.testing.assert_array_equal(got, want)


def test_names_round_trip(case, golden):
    name, policy, params, _ = case
    ours = weights.to_reference(params, policy.name_rules)
    theirs = golden.tensors(name)
    assert ours.keys() == theirs.keys() - {"freqs_cis"}
    for key, array in ours.items():
        np.testing.assert_array_equal(array, theirs[key])


def test_bfloat16_stays_near(case):
    name, policy, params, arrays = case
    config = dataclasses.replace(policy.config, dtype="bfloat16")
    coarse = dataclasses.replace(policy, config=config)
    given = read_condition(name, arrays)
    context = jnp.asarray(arrays["tokens"][:, :-1], jnp.int32)
    got, want = jax.jit(coarse.logits)(params, given, context), arrays["logits_clean"]
    assert got.dtype == jnp.float32
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert 1e-5 < error < 0.03  # 8 bits of mantissa; below 1e-5 it would not be bfloat16 at all
