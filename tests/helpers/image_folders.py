"""Folders of plain images, and batches made of them."""

import itertools

import numpy as np
from PIL import Image

from vapi_jax.data import DataConfig


def write_images(folder, count, first=0, mode="RGB", suffix=".png"):
    """Plain images whose red value is their number, so that a crop tells the file."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        Image.new("RGB", (12, 9), (number, 100, 0)).convert(mode).save(
            folder / f"{number:03d}{suffix}"
        )


def numbers(batch):
    return np.rint((batch["image"][:, 0, 0, 0] + 1) * 127.5).astype(int).tolist()


def folder_config(path, **options):
    return DataConfig(name="image_folder", path=str(path), image_size=4, num_threads=0, **options)


def take(dataset, n):
    return list(itertools.islice(iter(dataset), n))


def assert_same(a, b):
    assert len(a) == len(b)
    for left, right in zip(a, b, strict=True):
        for key in ("image", "condition"):
            np.testing.assert_array_equal(left[key], right[key])
