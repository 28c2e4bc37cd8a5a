"""Real images written for an evaluation are those that training evaluates on."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from vapi_jax.common.files import FolderExistsError
from vapi_jax.common.images import to_uint8
from vapi_jax.data import DataConfig, DataError, fixed_batch
from vapi_jax.data.real_images import write_images

DATA = DataConfig(name="photos", image_size=16)


def test_the_files_are_the_held_out_batch_in_its_order(tmp_path):
    write_images(DATA, "test", 14, 3, tmp_path / "real")
    written = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "real").iterdir())]
    assert np.array_equal(written, to_uint8(fixed_batch(DATA, "test", 14, 3)["image"]))
    assert [path.name for path in tmp_path.iterdir()] == ["real"]


def test_8_bit_images_come_through_unchanged(tmp_path):
    """float32 pixels of the pipeline are x / 127.5 - 1."""
    pixels = np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)
    folder = tmp_path / "data" / "a"
    folder.mkdir(parents=True)
    for number in range(4):
        Image.fromarray(pixels).save(folder / f"{number}.png")
    data = dataclasses.replace(DATA, name="image_folder", path=str(folder.parent), flip=False)
    write_images(data, "train", 2, 0, tmp_path / "real")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "real" / "000001.png")), pixels)


def test_what_is_there_is_not_overwritten_and_what_is_half_there_is(tmp_path):
    out = tmp_path / "real"
    with pytest.raises(DataError, match="n must be in"):
        write_images(DATA, "test", 10**9, 0, out)
    assert list(tmp_path.iterdir()) == []
    half = tmp_path / "real.partial"
    half.mkdir()
    (half / "999999.png").write_bytes(b"")
    write_images(DATA, "test", 2, 0, out)
    assert sorted(path.name for path in out.iterdir()) == ["000000.png", "000001.png"]
    with pytest.raises(FolderExistsError, match="exists"):
        write_images(DATA, "test", 2, 0, out)
