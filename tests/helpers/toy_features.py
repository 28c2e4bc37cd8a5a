"""A small extractor with all three kinds of features, for tests of what is built on extractors."""

import jax.numpy as jnp
import numpy as np
from PIL import Image

from vapi_jax.evaluation.features import Extractor, Weights


def apply(params, images):
    """Means of the colours in the four quarters, squashed; logits; four pixels."""
    x = images.astype(jnp.float32) / 255
    n, h, w, _ = x.shape
    quarters = x.reshape(n, 2, h // 2, 2, w // 2, 3).mean(axis=(2, 4)).reshape(n, 12)
    pool = jnp.tanh(quarters @ params["w"])
    return {
        "pool": pool,
        "logits": 20 * pool @ params["head"],
        "spatial": x[:, :2, :2, 0].reshape(n, 4),
    }


def load(file, any_weights):
    """Fixed random weights; published ones if the file is so called."""
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(12, 5)), "head": rng.normal(size=(5, 7))}
    params = {name: value.astype(np.float32) for name, value in params.items()}
    return Weights(params, file or "", "ab" * 32 if file else "", published=file == "published")


TOY = Extractor("toy", load, apply)
# The same numbers under other names: weights that come in a file.
FROM_FILE = Extractor("toy", load, apply, needs_file=True)


def pixels(count=30, seed=0, side=8):
    """Images with a pattern that depends on the seed, uint8 [N, side, side, 3]."""
    rng = np.random.default_rng(seed)
    flat = rng.normal(loc=120 + 10 * (seed % 3), scale=40, size=(count, 2, 2, 3))
    images = flat.repeat(side // 2, 1).repeat(side // 2, 2) + rng.normal(
        scale=15, size=(count, side, side, 3)
    )
    return np.clip(images, 0, 255).astype(np.uint8)


def folder(path, images):
    """The images as PNG files."""
    path.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(path / f"{i:04d}.png")
    return path


def blobs(count=60, dim=8, apart=12.0):
    """Three Gaussian clouds on the corners of a triangle, in order."""
    rng = np.random.default_rng(0)
    centres = apart * np.eye(3, dim)
    return {
        name: (rng.normal(size=(count, dim)) + centre).astype(np.float32)
        for name, centre in zip(("real", "base", "after"), centres, strict=True)
    }
