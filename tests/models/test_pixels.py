"""Images to tokens and back, in chunks that are counted in decoded images everywhere."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from tests.helpers.tiny import SIDE, TOKENIZER
from vapi_jax.models.pixels import CHUNK_BYTES, MAPS, PixelSpace, fitting_chunk
from vapi_jax.models.vq import VQ_PRESETS, VQConfig, VQModel
from vapi_jax.parallel.sharding import make_mesh

B, G, T = 8, 4, (SIDE // 2) ** 2


@pytest.fixture(scope="module")
def setup():
    model = VQModel(VQConfig(**TOKENIZER))
    images = jax.random.uniform(jax.random.key(0), (B, SIDE, SIDE, 3), minval=-1.0)
    params = jax.jit(model.init)(jax.random.key(1), images[:1])["params"]
    samples = jax.random.randint(jax.random.key(2), (B, G, T), 0, TOKENIZER["codebook_size"])
    return PixelSpace(model, None), {"tokenizer": params}, images, samples


@pytest.fixture(scope="module")
def whole(setup):
    """(tokens, images of all samples, rewards) without chunks."""
    pixels, frozen, images, samples = setup
    decoded = jax.jit(pixels.decode)(frozen, samples.reshape(B * G, T))
    return jax.jit(pixels.encode)(frozen, images), decoded, rewards_of(*setup)


def judge(frozen, pixels, batch):
    assert pixels.shape[:2] == batch["samples"].shape[:2]
    return jnp.abs(pixels - batch["image"][:, None]).mean((2, 3, 4))


def rewards_of(pixels, frozen, images, samples):
    return jax.jit(lambda *args: pixels.judge(*args, {"l1": judge})["l1"])(
        frozen, samples, {"image": images}
    )


@pytest.mark.parametrize("chunk", [1, 3, G, 2 * G, 100])
def test_chunks_change_nothing(setup, whole, chunk):
    pixels, *given = setup
    frozen, images, samples = given
    tokens, decoded, rewards = whole
    cut = dataclasses.replace(pixels, chunk=chunk)
    np.testing.assert_array_equal(jax.jit(cut.encode)(frozen, images), tokens)
    found = jax.jit(cut.decode)(frozen, samples[:, 0])
    np.testing.assert_allclose(found, decoded[::G], atol=1e-5)
    found = rewards_of(cut, *given)
    np.testing.assert_allclose(found, rewards, rtol=1e-5)
    assert found.shape == (B, G)


@pytest.mark.parametrize("chunk", [1, 2, G, 2 * G])
def test_a_chunk_counts_decoded_images_in_all_three(setup, chunk):
    """The widest batch of images that any operation of the program has."""
    pixels, frozen, images, samples = setup
    pixels = dataclasses.replace(pixels, chunk=chunk)

    def widest(function, *args):
        rows = set()

        def look(jaxpr):
            for eqn in jaxpr.eqns:
                if eqn.primitive.name == "conv_general_dilated":
                    rows.add(eqn.outvars[0].aval.shape[0])
                for inner in jaxprs_in_params(eqn.params):
                    look(inner)

        look(jax.make_jaxpr(function)(*args).jaxpr)
        return max(rows)

    assert widest(pixels.encode, frozen, images) == min(chunk, B)
    assert widest(pixels.decode, frozen, samples[:, 0]) == min(chunk, B)
    judged = widest(lambda *a: pixels.judge(*a, {"l1": judge}), frozen, samples, {"image": images})
    assert judged == max(chunk // G, 1) * G  # a group is judged together


@pytest.mark.parametrize(
    ("rows", "chunk", "want"),
    [
        (8, 3, 2),
        (9, 3, 3),
        (17, 7, 6),
        (13, 12, 7),
        (128, 17, 16),
        (64, 7, 4),
        (7, 2, 2),
        (5, 1, 1),
    ],
)
def test_no_number_of_images_is_taken_one_by_one_where_more_fit(setup, whole, rows, chunk, want):
    pixels, frozen, _, samples = setup
    pixels = dataclasses.replace(pixels, chunk=chunk)
    assert pixels.at_once(rows, 1, SIDE)[0] == want
    decoded = jax.jit(pixels.decode)(frozen, jnp.resize(samples, (rows, T)))
    np.testing.assert_allclose(decoded, np.resize(whole[1], decoded.shape), atol=1e-5)


def test_the_default_chunk_follows_from_the_size_of_an_image():
    config = VQ_PRESETS["VQ-16"]
    for side in (256, 384):
        count = fitting_chunk(config, side)
        assert count * MAPS * 4 * side**2 * config.ch <= CHUNK_BYTES
        assert (count + 1) * MAPS * 4 * side**2 * config.ch > CHUNK_BYTES
    assert fitting_chunk(config, 384) >= 16
    assert fitting_chunk(config, 1 << 14) == 1
    assert fitting_chunk(config, 384, width=4 * config.ch) < fitting_chunk(config, 384)


def test_on_devices_as_on_one(setup, whole):
    alone, *given = setup
    frozen, images, _ = given
    tokens, _, rewards = whole
    split = dataclasses.replace(alone, mesh=make_mesh(2, 4))
    np.testing.assert_array_equal(jax.jit(split.encode)(frozen, images), tokens)
    np.testing.assert_allclose(rewards_of(split, *given), rewards, rtol=1e-5)
