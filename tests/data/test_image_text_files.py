"""Images with captions: which files are found, what is lost on the way, and lists with tabs."""

import csv
import io
import json

import numpy as np
import pytest

from tests.helpers.image_text import config, fresh, members, pairs, png, write_tar
from vapi_jax.data import DataError
from vapi_jax.data.caption_files import LONGEST
from vapi_jax.data.pipeline import make_source
from vapi_jax.data.tab_rows import cells, rows


@pytest.fixture(autouse=True)
def no_index_in_the_home_folder(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def opened(root, field="", **options):
    return make_source(config(root, field, folder_holdout=1e-9, **options), "train")


def captions(found):
    return [found.sample(i, np.random.default_rng(0))["condition"] for i in range(len(found))]


# --- lists and the images that they name ----------------------------------------------------------


def named(folder, *names):
    """A list of images in a folder that need not be there."""
    folder.mkdir()
    lines = [json.dumps({"image": f"{name}.png", "caption": name}) for name in names]
    (folder / "list.jsonl").write_text("\n".join(lines))
    return folder


@pytest.mark.parametrize("inner", ["", "more"])
def test_images_that_come_and_go_are_seen(inner, tmp_path):
    root = named(tmp_path / "data", "a", f"{inner}/b" if inner else "b")
    (root / "a.png").write_bytes(png(1))
    asked = config(root, "json:caption", folder_holdout=1e-9)
    found = fresh(asked)
    assert len(found) == 1 and "1 image(s) that are not there" in found.left_out
    (root / inner).mkdir(exist_ok=True)
    (root / inner / "b.png").write_bytes(png(2))
    found = fresh(asked)
    assert len(found) == 2 and "not there" not in found.left_out
    (root / "a.png").unlink()
    assert len(fresh(asked)) == 1


def test_images_of_another_folder_are_another_index(tmp_path):
    root = named(tmp_path / "data", "a", "b")
    for name, images in (("x", "a"), ("y", "ab")):
        (tmp_path / name).mkdir()
        for image in images:
            (tmp_path / name / f"{image}.png").write_bytes(png(1))
        assert len(opened(root, "json:caption", images=str(tmp_path / name))) == len(images)


# --- folders --------------------------------------------------------------------------------------


def test_shards_are_found_as_images_are(tmp_path):
    root, other = tmp_path / "data", tmp_path / "other"
    for number, folder in enumerate((root / "a", other, root / ".cache", root / "__MACOSX")):
        folder.mkdir(parents=True)
        write_tar(folder / f"{number}.TAR", members(pairs(1, number)))
    (root / "b").symlink_to(other)
    (root / "c").symlink_to(root)
    (root / "2.tar").symlink_to(tmp_path / "absent.tar")
    (root / "._0.tar").write_bytes(b"of macOS")
    (root / "statistics.txt").touch()
    found = opened(root, "txt")
    names = [found.name(i) for i in range(len(found))]
    assert names == ["a/0.TAR:000000000", "b/1.TAR:000000001"]
    for kind in (
        "1 hidden folder(s)", "1 folder(s) __MACOSX", "1 hidden file(s)",
        "1 link(s) ending in .tar that lead to no file",
        "1 folder(s) that links lead to a second time",
    ):  # fmt: skip
        assert kind in found.left_out
    assert "statistics" not in found.left_out and "ending in .txt" not in found.left_out


# --- shards ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "members, number, kind",
    [
        ([("a.png", png(1)), ("a.png", png(2))], 2, "1 member(s) of a shard that one of the same"),
        ([("a.png", png(1)), ("a.jpg", png(2))], 1, "1 image(s) after the first of their key"),
        (
            [("a.png", png(1)), ("b.v1.png", png(2)), ("b.v2.png", png(3))],
            1,
            r"2 image(s) named as KEY.WORD.png",
        ),
    ],
)
def test_images_that_a_shard_loses_are_counted(members, number, kind, tmp_path):
    path = write_tar(tmp_path / "0.tar", [("a.txt", b"one"), *members])
    found = opened(path, "txt")
    assert len(found) == 1 and kind in found.left_out
    assert "without an image" not in found.left_out
    pixels = found.sample(0, np.random.default_rng(0))["image"]
    assert round((float(pixels[0, 0, 0]) + 1) * 127.5) == number


def test_archives_that_cat_has_joined_are_refused(tmp_path):
    for number in (0, 1):
        write_tar(tmp_path / f"{number}.tar", members(pairs(1, number)))
    joined = tmp_path / "joined.tar"
    joined.write_bytes(b"".join((tmp_path / f"{n}.tar").read_bytes() for n in (0, 1)))
    with pytest.raises(DataError, match="joined.tar goes on after its end.*tar --concatenate"):
        opened(joined, "txt")


# --- captions -------------------------------------------------------------------------------------


def test_a_field_that_no_record_has_is_refused(tmp_path):
    path = write_tar(tmp_path / "0.tar", members(pairs(3)))
    with pytest.raises(DataError, match="no image in .*0.tar has json:top_captoin"):
        opened(path, "txt:0.5,json:top_captoin:0.5")
    assert len(opened(path, "txt:0.5,json:top_caption:0.5")) == 3


@pytest.mark.parametrize(
    "text, kind",
    [
        ("x" * (LONGEST + 1), f"with more than {LONGEST} letters"),
        ("a \ud800", "with half of a surrogate"),
    ],
)
def test_texts_that_can_be_no_caption_are_counted_and_never_drawn(text, kind, tmp_path):
    root = named(tmp_path / "data")
    lines = [{"image": "a.png", "text": texts} for texts in ([text, "good"], [text, ""], ["b", ""])]
    (root / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (root / "a.png").write_bytes(png(1))
    found = opened(root, "blip:0.5,llava:0.5")
    assert captions(found) == ["good", "b"]
    assert f"2 caption(s) {kind}" in found.left_out
    assert "the first of a.png" in found.left_out and "without a caption" not in found.left_out
    with pytest.raises(DataError, match="no image has a caption"):
        opened(root, "llava_first")


# --- lists with tabs ------------------------------------------------------------------------------


QUOTED = [
    'say "cheese"',
    '"all of it"',
    "two\nlines",
    "a\n\n\nb",
    "plain, with commas",
    'a "b\nc" d',
]


def test_quotes_of_pandas_and_spreadsheets_are_taken_off(tmp_path):
    root = named(tmp_path / "data")
    (root / "list.jsonl").unlink()
    (root / "a.png").write_bytes(png(1))
    encoded = io.StringIO()
    table = csv.writer(encoded, delimiter="\t", lineterminator="\n")
    table.writerow(["path", "caption", "score"])
    table.writerows(["a.png", caption, number] for number, caption in enumerate(QUOTED))
    (root / "list.tsv").write_text(encoded.getvalue())
    assert captions(opened(root, where="score>=0")) == QUOTED


@pytest.mark.parametrize(
    "lines",
    [
        ['a\t"Go" she said', "b\tyes"],
        ['a\t"never closed', "b\tyes", 'c\tand "'],
        ['a\tno "quotes" here', 'b\t"half'],
        ['"a', "b"],
        ['a\t"x"y"', "b\tc"],
    ],
)
def test_rows_that_are_not_quoted_by_the_rule_stay_as_they_are(lines):
    found = list(rows(f"{line}\n".encode() for line in lines))
    assert [cells(row.decode()) for row in found] == [line.split("\t") for line in lines]
