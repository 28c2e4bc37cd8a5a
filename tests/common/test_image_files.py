"""One list of endings for all commands, and nothing that is left out goes unmentioned."""

import io
import logging

import numpy as np
import pytest
from PIL import Image, features

from tests.helpers.image_folders import folder_config, write_images
from tests.helpers.messages import assert_mentions
from vapi_jax.common.image_files import EXTENSIONS, FORMATS, find_images, in_words
from vapi_jax.data.images import read_rgb
from vapi_jax.data.pipeline import make_source
from vapi_jax.evaluation.images import open_images

OTHERS = {
    "notes.TXT": "1 file(s) ending in .txt",
    "a.heic": "1 file(s) ending in .heic",
    "README": "1 file(s) ending in nothing",
    ".DS_Store": "2 hidden file(s)",
    "._000.jpg": "2 hidden file(s)",
    "@eaDir/000.jpg": "1 folder(s) @eaDir",
    "__MACOSX/000.jpg": "1 folder(s) __MACOSX",
    ".thumbnails/000.jpg": "2 hidden folder(s)",
    ".ipynb_checkpoints/000.png": "2 hidden folder(s)",
}


@pytest.fixture
def folder(tmp_path):
    """Three images in a class, one in a linked folder below it, and what people have beside them."""
    root = tmp_path / "data"
    write_images(root / "ant", 2)
    write_images(tmp_path / "elsewhere", 1, first=7)
    (root / "ant" / "more").symlink_to(tmp_path / "elsewhere")
    (root / "ant" / "again").symlink_to(root / "ant")
    for name in OTHERS:
        (root / "ant" / name).parent.mkdir(exist_ok=True)
        (root / "ant" / name).write_bytes(b"x")
    return root


def test_linked_folders_are_read_once_and_the_rest_is_counted(folder):
    found = find_images(folder / "ant")
    names = [path[len(str(folder)) :] for path in found.files]
    assert names == ["/ant/000.png", "/ant/001.png", "/ant/more/007.png"]
    told = in_words(found.left_out)
    assert_mentions(told, *OTHERS.values(), "1 folder(s) that links lead to a second time")


def test_training_and_evaluation_see_the_same_images(folder, caplog):
    (folder / "@eaDir").mkdir()
    (folder / "loose.png").write_bytes(b"x")
    config = folder_config(folder, folder_holdout=0.01)
    source = make_source(config, "train")
    assert source.class_names == ("ant",), "a file server's folder is no class"
    assert len(source) == 3
    assert_mentions(source.left_out, "1 image(s) beside the class folders", "2 folder(s) @eaDir")
    with caplog.at_level(logging.WARNING):
        assert len(open_images(folder / "ant")) == 3
    assert len(caplog.records) == 1
    assert_mentions(caplog.text, *OTHERS.values())


def test_what_is_left_out_is_told_in_one_line():
    many = {f"file(s) ending in .{i}": i + 1 for i in range(14)}
    assert in_words(many).startswith("14 file(s) ending in .13, 13 file(s)")
    assert in_words(many).endswith(", 3 others")
    assert in_words({}) == ""


@pytest.mark.parametrize("ending", sorted(EXTENSIONS))
def test_every_ending_is_one_that_is_read_by_all(tmp_path, ending):
    kind = Image.registered_extensions()[ending]
    assert kind in FORMATS
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    buffer = io.BytesIO()
    Image.new("RGB", (12, 9), (200, 100, 0)).save(buffer, kind)
    (tmp_path / f"image{ending.upper()}").write_bytes(buffer.getvalue())
    (path,) = find_images(tmp_path).files
    assert read_rgb(path, 10_000).size == (12, 9)
    (batch,) = open_images(tmp_path).batches(1)
    assert np.abs(batch[0, 4, 4].astype(int) - (200, 100, 0)).max() < 12


def test_a_folder_without_images_says_what_it_has(tmp_path):
    (tmp_path / "a.heic").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"1 file\(s\) ending in \.heic"):
        open_images(tmp_path)
