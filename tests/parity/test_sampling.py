"""Filters and greedy generation against the reference's, tokens exactly."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.compare import assert_close
from tests.helpers.golden import make_generator, read_condition
from vapi_jax.models.sampling import filter_logits, generate


def test_filters(golden):
    arrays = golden.npz("filter")
    checked = 0
    for key, want in arrays.items():
        found = re.fullmatch(r"out_(unstable_)?(\w+?)_k(\d+)_p([\d.]+)", key)
        if not found:
            continue
        unstable, name, top_k, top_p = found.groups()
        logits = arrays[f"logits_{name}"]
        got = np.asarray(filter_logits(jnp.asarray(logits), int(top_k), float(top_p)))
        kept, kept_there = got > -np.inf, want > -np.inf
        np.testing.assert_array_equal(got[kept], logits[kept], err_msg=key)
        if unstable:  # which of several tied tokens stays is the sort's choice, how many is not
            np.testing.assert_array_equal(kept.sum(-1), kept_there.sum(-1), err_msg=key)
            weights = np.exp(logits)
            assert_close((weights * kept).sum(-1), (weights * kept_there).sum(-1), 1e-6)
        else:
            np.testing.assert_array_equal(kept, kept_there, err_msg=key)
        checked += 1
    assert checked >= 3


@pytest.mark.parametrize("task", ["c2i", "t2i"])
def test_greedy_tokens(golden, task):
    arrays = golden.npz(f"generate_{task}")
    policy, params = make_generator(golden, f"gpt_{task}")
    condition = read_condition(f"gpt_{task}", arrays)
    checked = 0
    for key, want in arrays.items():
        found = re.fullmatch(r"tokens_cfg([\d.]+)(?:_interval(\d+))?", key)
        if not found:
            continue
        scale, interval = found.groups()
        options = {"cfg_scale": float(scale), "cfg_interval": int(interval or -1)}
        rng = jax.random.key(0)
        got = generate(policy, params, condition, rng, greedy=True, **options)
        np.testing.assert_array_equal(got, want, err_msg=key)
        if not checked:  # top_k=1 is greedy by another road; once is enough to see it
            got = generate(policy, params, condition, rng, top_k=1, **options)
            np.testing.assert_array_equal(got, want, err_msg=key)
        checked += 1
    assert checked
