"""Digests of parameters."""

import jax.numpy as jnp
import numpy as np

from vapi_jax.common.digests import params_digest


def test_the_digest_of_parameters_sees_names_types_shapes_and_values():
    base = {"a": {"b": np.arange(6, dtype=np.float32)}, "c": np.float32(1)}
    same = {"c": jnp.float32(1), "a": {"b": jnp.arange(6, dtype=jnp.float32)}}
    digest = params_digest(base)
    assert digest == params_digest(same)
    others = [
        {**base, "c": np.float32(2)},
        {**base, "c": np.int32(1)},
        {"a": {"x": base["a"]["b"]}, "c": base["c"]},
        {"a": {"b": base["a"]["b"].reshape(2, 3)}, "c": base["c"]},
        {"a": {"b": base["a"]["b"].astype(np.float64)}, "c": base["c"]},
    ]
    assert len({digest, *map(params_digest, others)}) == 6
