"""CLIP against PyTorch: transformers' layout and open_clip's, pixels included."""

import jax
import numpy as np
import pytest

from tests.helpers.compare import assert_close, assert_close_in_norm
from vapi_jax.models import clip
from vapi_jax.models.clip_files import open_clip


@pytest.fixture(scope="module", params=["clip_hf", "clip_open"])
def model(request, golden, tmp_path_factory):
    """(arrays, configuration, weights) of a golden model."""
    arrays = golden.npz(request.param)
    path = golden.directory / request.param
    if request.param == "clip_open":
        path = golden.with_open_clip_config(tmp_path_factory.mktemp("clip"))
    with open_clip(path) as file:
        file.check()
        weights = {}
        for part in ("vision", "text", "logit_scale"):
            weights |= file.read(part, np.float32)
        return arrays, file.config, weights


def test_pixels(model):
    arrays, config, _ = model
    if "image0" not in arrays:
        pytest.skip(
            "this golden file has pixels as they go in, and no images that they were made of"
        )
    for i, want in enumerate(arrays["pixel_values"]):
        image = arrays[f"image{i}"][None]
        got = jax.jit(clip.preprocess, static_argnums=(1, 2))(image, config.image, "crop_floor")
        assert_close(got[0], want.transpose(1, 2, 0), 1e-6)


def test_embeddings(model):
    arrays, config, weights = model
    pixels = arrays["pixel_values"].transpose(0, 2, 3, 1)
    ids = arrays["ids"].astype(np.int32)

    @jax.jit
    def run(weights, pixels, ids):
        return clip.embed_images(weights, pixels, config), clip.embed_texts(weights, ids, config)

    images, texts = run(weights, pixels, ids)
    if "cosine" in arrays:
        images, texts = clip.unit(images), clip.unit(texts)
        assert_close(images @ texts.T, arrays["cosine"], 2e-5)
    else:
        assert weights["logit_scale"] == arrays["logit_scale"]
    assert_close_in_norm(images, arrays["image_embeds"], 2e-5)
    assert_close_in_norm(texts, arrays["text_embeds"], 2e-5)
