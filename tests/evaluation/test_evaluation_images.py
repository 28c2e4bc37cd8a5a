"""Sets of images to evaluate: folders and .npz files, read lazily, with digests."""

import hashlib
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vapi_jax.evaluation import images as I
from vapi_jax.evaluation.images import (
    ImagesError,
    PixelDigest,
    check_pairs,
    holds_images,
    open_images,
)


def pixels(count=5, height=6, width=9, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), np.uint8)


def folder_of(path, array, names=None):
    path.mkdir(parents=True, exist_ok=True)
    names = [f"{i:03d}.png" for i in range(len(array))] if names is None else names
    for name, image in zip(names, array, strict=True):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path / name)
    return path


def npz_of(path, array, save=np.savez):
    save(path, array)
    return path


def digest(images, batch=2):
    found = PixelDigest(images)
    for part in images.batches(batch):
        found.update(part)
    return found.hexdigest()


@pytest.mark.parametrize("batch", [1, 2, 5, 100])
def test_a_folder_and_an_npz_give_the_same_batches_and_digest(tmp_path, batch):
    array = pixels()
    places = [
        folder_of(tmp_path / "png", array),
        npz_of(tmp_path / "a.npz", array),
        npz_of(tmp_path / "b.npz", array, np.savez_compressed),
    ]
    digests = set()
    for place in places:
        found = open_images(place)
        assert (found.count, len(found), found.height, found.width) == (5, 5, 6, 9)
        parts = list(found.batches(batch))
        assert [len(part) for part in parts[:-1]] == [batch] * (len(parts) - 1)
        assert all(part.dtype == np.uint8 for part in parts)
        np.testing.assert_array_equal(np.concatenate(parts), array)
        digests.add(digest(found, batch))
    assert len(digests) == 1
    assert open_images(places[0]).names == ("000", "001", "002", "003", "004")
    assert open_images(places[1]).names is None


def test_the_digest_is_that_of_shape_and_pixels(tmp_path):
    array = np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3)
    found = digest(open_images(npz_of(tmp_path / "a.npz", array)))
    assert found == hashlib.sha256(b"uint8 2 2 2 3\n" + bytes(range(24))).hexdigest()
    assert found == "709edbb022ed252ab5139c03d5e4fe510d780992fe48b8fb1022bd60d6692e93"
    others = [array[::-1], array.reshape(2, 1, 4, 3), array[:1], array ^ np.uint8(1)]
    digests = {
        digest(open_images(npz_of(tmp_path / f"{i}.npz", other))) for i, other in enumerate(others)
    }
    assert len(digests | {found}) == 5


def test_files_are_sorted_by_their_path_in_all_sub_folders(tmp_path):
    names = ["b/0.png", "a/2.png", "a/10.png", "a-b/0.png", "a.PNG"]
    array = pixels(5)
    folder = folder_of(tmp_path / "x", array, names)
    (folder / "notes.txt").write_text("no image")
    (folder / "._a.png").write_bytes(b"left by a file manager")
    found = open_images(folder)
    assert found.names == ("a/10", "a/2", "a-b/0", "a", "b/0")
    np.testing.assert_array_equal(next(found.batches(9)), array[[2, 1, 3, 4, 0]])


def test_grey_palette_and_transparent_files_become_rgb(tmp_path):
    array = pixels(1)[0]
    colour, grey = Image.fromarray(array), Image.fromarray(array[..., 0])
    colour.save(tmp_path / "0.png")
    grey.save(tmp_path / "1.png")
    alpha = colour.copy()
    alpha.putalpha(grey)
    alpha.save(tmp_path / "2.png")
    few = Image.fromarray(array // 128 * 128).convert("P", palette=Image.Palette.ADAPTIVE)
    few.save(tmp_path / "3.png")
    found = next(open_images(tmp_path).batches(4))
    np.testing.assert_array_equal(found[0], array)
    np.testing.assert_array_equal(found[1], np.repeat(array[..., :1], 3, axis=-1))
    np.testing.assert_array_equal(found[2], array)
    np.testing.assert_array_equal(found[3], array // 128 * 128)


def test_jpeg_and_webp_are_read(tmp_path):
    smooth = np.add.outer(np.arange(16), np.arange(16))[..., None] * np.array([8, 4, 2])
    image = Image.fromarray(smooth.astype(np.uint8))
    for name in ("0.jpg", "1.JPEG", "2.webp"):
        image.save(tmp_path / name, quality=95)
    for part in open_images(tmp_path).batches(1):
        assert np.abs(part[0].astype(int) - smooth).mean() < 4


def test_unreadable_files_are_named(tmp_path):
    folder = folder_of(tmp_path / "x", pixels(4))
    whole = (folder / "002.png").read_bytes()
    # Another format under this name: Pillow reads some of them by starting other programs.
    Image.new("RGB", (9, 6)).save(tmp_path / "x.eps")
    other = (tmp_path / "x.eps").read_bytes()
    for broken in (whole[:-30], b"", b"hello", whole[:60] + b"\xff" * 40 + whole[100:], other):
        (folder / "002.png").write_bytes(broken)
        found = open_images(folder)
        with pytest.raises(ImagesError, match=r"002\.png"):
            list(found.batches(2))
    (folder / "000.png").write_bytes(b"")
    with pytest.raises(ImagesError, match=r"000\.png"):
        open_images(folder)


def test_sizes_and_modes_that_do_not_fit_are_named(tmp_path):
    folder = folder_of(tmp_path / "x", pixels(3))
    Image.new("RGB", (6, 9)).save(folder / "001.png")
    with pytest.raises(ImagesError, match=r"001\.png.*6x9.*000\.png.*9x6"):
        list(open_images(folder).batches(2))
    Image.new("I;16", (9, 6)).save(folder / "001.png")
    with pytest.raises(ImagesError, match=r"001\.png.*I;16"):
        list(open_images(folder).batches(2))
    Image.new("L", (I.MAX_SIDE + 1, 1)).save(folder / "000.png")
    with pytest.raises(ImagesError, match=r"000\.png.*8193x1.*1.*8192"):
        open_images(folder)


def test_places_without_images_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "a.npz").write_text("no zip")
    np.savez(tmp_path / "stats.npz", mu=np.zeros(2), sigma=np.eye(2))
    for name, message in [
        ("empty", "empty"),
        ("absent", "absent"),
        ("a.txt", r"a\.txt.*\.npz"),
        ("a.npz", r"a\.npz"),
        ("stats.npz", "'arr_0'.*mu, sigma"),
    ]:
        with pytest.raises(ImagesError, match=message) as caught:
            open_images(tmp_path / name)
        assert name in str(caught.value)
    assert not holds_images(tmp_path / "stats.npz")
    assert holds_images(npz_of(tmp_path / "b.npz", pixels()))


@pytest.mark.parametrize(
    "array",
    [
        pixels().astype(np.float32),
        pixels()[..., :1],
        pixels()[0],
        pixels()[:0],
        np.zeros((1, 0, 4, 3), np.uint8),
        np.zeros((1, 1, I.MAX_SIDE + 1, 3), np.uint8),
    ],
)
def test_arrays_that_are_no_images_are_refused(tmp_path, array):
    with pytest.raises(ImagesError, match="arr_0"):
        open_images(npz_of(tmp_path / "a.npz", array))


def test_an_npz_is_streamed(tmp_path):
    place = npz_of(tmp_path / "a.npz", np.zeros((2000, 64, 64, 3), np.uint8))
    tracemalloc.start()
    try:
        found = open_images(place)
        assert sum(len(part) for part in found.batches(50)) == 2000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * 50 * 64 * 64 * 3


def test_a_set_can_be_read_again_and_left_early(tmp_path):
    array = pixels()
    for place in (folder_of(tmp_path / "x", array), npz_of(tmp_path / "a.npz", array)):
        found = open_images(place)
        stream = found.batches(2)
        next(stream)
        stream.close()
        np.testing.assert_array_equal(np.concatenate(list(found.batches(3))), array)
        with pytest.raises(ValueError, match="batch of 0"):
            found.batches(0)


def test_a_file_that_changes_in_between_is_noticed(tmp_path):
    place = npz_of(tmp_path / "a.npz", pixels(5))
    found = open_images(place)
    npz_of(place, pixels(4))
    with pytest.raises(ImagesError, match="has changed"):
        list(found.batches(2))


@settings(max_examples=60)
@given(position=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255), png=st.booleans())
def test_damage_is_named_or_harmless(tmp_path_factory, position, value, png):
    base, array = tmp_path_factory.getbasetemp() / "damage", pixels(2, 8, 8)
    place = folder_of(base, array) if png else npz_of(base.with_suffix(".npz"), array)
    damaged = base / "001.png" if png else place
    data = bytearray(damaged.read_bytes())
    data[int(position * len(data))] = value
    damaged.write_bytes(data)
    found, problem = [], damaged.name
    try:
        found = list(open_images(place).batches(1))
    except ImagesError as error:
        problem = str(error)
    assert damaged.name in problem
    assert all(part.shape == (1, 8, 8, 3) for part in found)
    if found and not png:  # zip has a checksum that is always looked at
        np.testing.assert_array_equal(np.concatenate(found), array)


def test_pairs_go_by_name_between_folders_and_by_order_otherwise(tmp_path):
    array = pixels(3)
    a = open_images(folder_of(tmp_path / "a", array, ["x/0.png", "x/1.png", "y.png"]))
    b = open_images(folder_of(tmp_path / "b", array, ["x/0.jpg", "x/1.webp", "y.png"]))
    other = open_images(folder_of(tmp_path / "c", array, ["x/0.png", "x/2.png", "y.png"]))
    fewer = open_images(folder_of(tmp_path / "d", array[:2], ["x/0.png", "x/1.png"]))
    small = open_images(folder_of(tmp_path / "e", array[:, :5], ["x/0.png", "x/1.png", "y.png"]))
    archive = open_images(npz_of(tmp_path / "f.npz", array))
    check_pairs(a, b)
    check_pairs(other, archive)
    for one, message in [
        (other, "x/1.*x/2"),
        (fewer, r"\by\b.*nothing"),
        (small, "9x6.*9x5"),
        (open_images(npz_of(tmp_path / "g.npz", array[:2])), "3.*2"),
    ]:
        with pytest.raises(ImagesError, match=message):
            check_pairs(a, one)
