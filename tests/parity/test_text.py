"""Captions, tokens and T5 features are the reference's."""

import json

import numpy as np
import pytest

from tests.helpers.compare import assert_close_in_norm
from vapi_jax.models.caption_text import clean_caption
from vapi_jax.models.text_encoder import TextEncoder
from vapi_jax.parallel.sharding import make_mesh


def read_pairs(golden, name):
    path = golden.directory / name
    if not path.exists():
        pytest.skip(f"this golden set has no {name}")
    return json.loads(path.read_text(encoding="utf-8"))


def test_captions_are_cleaned_to_the_letter(golden):
    pairs = read_pairs(golden, "captions.json")
    assert {text: clean_caption(text) for text, _ in pairs} == dict(pairs)


@pytest.mark.parametrize("dtype, mesh", [("float32", (2, 4)), ("bfloat16", (1, 8))])
def test_ids_and_features_of_captions(golden, dtype, mesh):
    arrays, texts = golden.npz("t5"), read_pairs(golden, "t5_captions.json")
    encoder = TextEncoder(
        golden.directory / "t5", make_mesh(*mesh), dtype=dtype, length=arrays["ids"].shape[1]
    )
    got = encoder(texts["captions"])
    assert list(got.cleaned) == texts["cleaned"]
    np.testing.assert_array_equal(got.ids, arrays["ids"])
    np.testing.assert_array_equal(got.mask, arrays["mask"] > 0)
    np.testing.assert_array_equal(got.left_mask, arrays["left_mask"] > 0)
    assert not got.features[~got.left_mask].any()
    if dtype == "float32":
        assert_close_in_norm(got.features, arrays["left_features"], 2e-4)
        return
    ours, theirs = got.features[got.left_mask], arrays["features_bf16"][got.mask]
    norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    assert ((ours * theirs).sum(axis=1) / norms).min() > 0.999
