"""What becomes of strange and broken images in a run's data; seen here, and told in docs/reliability.md."""

import shutil
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from tests.helpers.image_folders import folder_config, numbers, take, write_images
from tests.helpers.observations import observe
from vapi_jax.data import DataError, SkippedImages, make_dataset

COUNT, PLACE = 20, 7


def plain(mode="RGB", size=(12, 9)):
    return Image.new("RGB", size, (PLACE, 100, 0)).convert(mode)


def bomb(path):
    """A header that promises 3.6 billion pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = b"".join(
        struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
        for body in (header, b"IDAT" + zlib.compress(b""), b"IEND")
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)


def noisy():
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    return Image.fromarray(pixels)


def cut(path):
    noisy().save(path)
    path.write_bytes(path.read_bytes()[:-500])


def sixteen_bits(path):
    Image.fromarray(np.full((9, 12), PLACE * 257, np.uint16)).save(path, "PNG")


def animated(path):
    frames = [plain(), Image.new("RGB", (12, 9), "white")]
    frames[0].save(path, "PNG", save_all=True, append_images=frames[1:])


def dangling(path):
    path.unlink()
    path.symlink_to("nowhere")


USED = {
    "a PNG named .jpg": lambda path: plain().save(path, "PNG"),
    "a CMYK image": lambda path: plain("CMYK").save(path, "TIFF"),
    "an image of 16 bits": sixteen_bits,
    "a palette image": lambda path: plain("P").save(path, "PNG"),
    "a transparent image": lambda path: plain("RGBA").save(path, "PNG"),
    "an animated image": animated,
    "an image of 1x1 pixel": lambda path: plain(size=(1, 1)).save(path, "PNG"),
}
LEFT_OUT = {
    "a truncated image": cut,
    "an empty file": lambda path: path.write_bytes(b""),
    "a text file named .jpg": lambda path: path.write_text("no image"),
    "a decompression bomb": bomb,
    "an image of 1x60000 pixels": lambda path: plain(size=(1, 60_000)).save(path, "PNG"),
    "an image that is a dangling link": dangling,
}


@pytest.mark.parametrize("fault", [*USED, *LEFT_OUT])
def test_a_strange_image_is_used_and_a_broken_one_replaced(tmp_path, fault):
    write_images(tmp_path / "train" / "a", COUNT, suffix=".jpg")
    for path in (tmp_path / "train" / "a").iterdir():  # not lossy, so that a colour tells the file
        Image.new("RGB", (12, 9), (int(path.stem), 100, 0)).save(path, "PNG")
    options = {"max_unreadable": 1 / COUNT, "max_image_pixels": 10**5, "crop": "random"}
    config = folder_config(tmp_path, **options)
    (before,) = take(make_dataset(config, "train", COUNT, seed=0), 1)
    (USED | LEFT_OUT)[fault](tmp_path / "train" / "a" / f"{PLACE:03d}.jpg")
    skipped = SkippedImages()
    (after,) = take(make_dataset(config, "train", COUNT, 0, skipped=skipped), 1)
    place = numbers(before).index(PLACE)
    others = np.arange(COUNT) != place
    np.testing.assert_array_equal(after["image"][others], before["image"][others])
    if not len(skipped):
        assert abs(numbers(after)[place] - PLACE) <= 10  # palettes and inks round
        happened = "used"
    else:
        assert numbers(after)[place] in set(range(COUNT)) - {PLACE}
        ((name, reason),) = skipped.items()
        assert name.endswith(f"{PLACE:03d}.jpg")
        happened = f"left out and listed ({reason}); another image stands in, no other sample moves"
    assert (happened == "used") == (fault in USED)
    observe(f"data: {fault}", happened)


def test_too_many_broken_images_stop_the_run(tmp_path):
    write_images(tmp_path / "train" / "a", COUNT)
    for path in sorted((tmp_path / "train" / "a").iterdir())[:3]:
        path.write_bytes(b"")
    with pytest.raises(DataError) as error:
        take(make_dataset(folder_config(tmp_path, max_unreadable=0.1), "train", COUNT, seed=0), 1)
    assert str(error.value).startswith("3 of ")
    assert str(error.value).count(f"\n  {tmp_path}") == 3
    observe("data: more broken images than `data.max_unreadable`", "an error that names the first")


@pytest.mark.parametrize("emptied", ["root", "class", "split"])
def test_an_empty_dataset_is_refused_at_the_start(tmp_path, emptied):
    for name in ("a", "b"):
        write_images(tmp_path / "train" / name, 3)
    folder = {"root": tmp_path, "class": tmp_path / "train" / "b", "split": tmp_path / "train"}
    shutil.rmtree(folder[emptied])
    folder[emptied].mkdir()
    with pytest.raises(DataError) as error:
        make_dataset(folder_config(tmp_path), "train", 1, seed=0)
    assert str(folder[emptied]) in str(error.value) or "b (holds nothing)" in str(error.value)
    observe(f"data: an empty {emptied} folder", "refused at the start, with what was found there")
