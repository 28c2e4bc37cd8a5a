"""Images with captions: the same pairs from every layout, what is left out, and damage."""

import contextlib
import io
import itertools
import json
import sys
import tarfile
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.image_folders import numbers, take
from tests.helpers.image_text import (
    COUNT,
    FIELDS,
    LAYOUTS,
    config,
    fresh,
    members,
    pairs,
    png,
    write,
    write_parquet,
    write_tar,
)
from vapi_jax.data import DataConfig, DataError, SkippedImages, fixed_batch, make_dataset
from vapi_jax.data.image_text.captions import CaptionFields, Where, text_of
from vapi_jax.data.image_text.layouts import JsonLines, TabLines, TarShards
from vapi_jax.data.image_text.parquet import Parquet
from vapi_jax.data.images import UnreadableImage
from vapi_jax.data.pipeline import make_source


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """No index of a test lands in the home folder."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "vapi_jax" / "image_text"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_each_image_with_its_caption(layout, tmp_path, cache):
    asked = config(write(layout, tmp_path / "data"), FIELDS[layout], folder_holdout=0.5)
    seen = {}
    for split in ("train", "val", "test"):
        opened = make_source(asked, split)
        batch = fixed_batch(asked, split, len(opened), seed=1)
        for number, caption in zip(numbers(batch), batch["condition"], strict=True):
            assert caption == f"picture {number}"
            assert number not in seen
            seen[number] = split
    assert len(seen) == COUNT
    assert [text.rpartition(": ")[2] for text in opened.notes] == [f"picture {n}" for n in range(3)]
    assert len(list(cache.glob("*.npz"))) == 1


@pytest.mark.parametrize("layout", ["tar", "parquet"])
def test_order_resume_and_shares_are_exact(layout, tmp_path):
    asked = config(write(layout, tmp_path / "data"), "json:top_caption", crop="random")
    whole = take(make_dataset(asked, "train", 4, seed=5), 6)
    assert whole[0]["condition"][0].startswith("BLIP: picture ")
    iterator = iter(make_dataset(asked, "train", 4, seed=5))
    for _ in range(3):
        next(iterator)
    state = iterator.get_state()
    again = iter(make_dataset(asked, "train", 4, seed=5))
    again.set_state(state)
    for batch in whole[3:]:
        got = next(again)
        np.testing.assert_array_equal(got["image"], batch["image"])
        assert got["condition"].tolist() == batch["condition"].tolist()
    halves = [take(make_dataset(asked, "train", 2, 5, process, 2), 6) for process in (0, 1)]
    dealt = [part["condition"].tolist() for pair in zip(*halves, strict=True) for part in pair]
    assert [c for part in dealt for c in part] == [
        c for batch in whole for c in batch["condition"].tolist()
    ]


def test_the_index_is_built_once_and_again_when_files_change(tmp_path, cache):
    root = write("tar", tmp_path / "data")
    make_source(config(root, "txt"), "train")
    (kept,) = cache.glob("*.npz")
    stamp = kept.stat().st_mtime_ns
    fresh(config(root, "txt"))
    assert kept.stat().st_mtime_ns == stamp
    kept.write_bytes(kept.read_bytes()[:-50])  # a damaged index is none
    assert len(fresh(config(root, "txt", folder_holdout=0.01))) > COUNT // 2
    assert kept.stat().st_mtime_ns != stamp
    write_tar(root / "00002.tar", members(pairs(6, 100)))
    assert len(fresh(config(root, "txt"))._index) == COUNT + 6
    assert len(list(cache.glob("*.npz"))) == 2


def test_what_is_left_out_is_counted(tmp_path):
    found = [("a", png(1), "one"), ("b", png(2), " "), ("c", png(3), "three"), ("d", png(4), "")]
    shard = [
        *members(found[:2], score=7),
        *members(found[2:3], score=5),
        *members(found[3:], score=8),
        ("e.txt", b"no image"),
        ("f.png", png(5)),
        ("g.png", png(6)),
        ("g.json", b"{broken"),
        ("h.png", png(7, (3, 50))),
        ("h.json", json.dumps({"width": 3, "height": 50, "score": 9}).encode()),
        ("h.txt", b"narrow"),
        ("i.png", png(8)),
        ("i.txt", b"no score"),
    ]
    root = tmp_path / "data"
    root.mkdir()
    write_tar(root / "0.tar", shard)
    found = make_source(config(root, "txt", where="score>=6", folder_holdout=1e-9), "train")
    assert [found.name(i) for i in range(len(found))] == ["0.tar:a"]
    for words in (
        "3 image(s) without a caption", "1 record(s) not score>=6", "1 key(s) without an image",
        "1 record(s) that cannot be read", "below 4 pixels", "1 record(s) without a number score",
    ):  # fmt: skip
        assert words in found.left_out


def test_images_that_cannot_be_used_are_listed_and_never_black(tmp_path):
    found = [*pairs(30), ("broken", png(1)[:40], "broken"), ("small", png(2, (40, 3)), "small")]
    asked = config(write("folder", tmp_path / "data", found), folder_holdout=1e-9)
    asked = DataConfig(**{**vars(asked), "max_unreadable": 0.5})
    skipped = SkippedImages()
    for batch in take(make_dataset(asked, "train", 8, seed=0, skipped=skipped), 8):
        assert (batch["image"][:, 0, 0, 1] > -0.3).all()
        assert not {"broken", "small"} & set(batch["condition"].tolist())
    # What stands in for an image is drawn next, and must not depend on how often it has failed.
    opened, rng = make_source(asked, "train"), np.random.default_rng(3)
    (place,) = (i for i in range(len(opened)) if opened.name(i) == "broken.png")
    with pytest.raises(UnreadableImage):
        opened.sample(place, rng)
    assert rng.bit_generator.state == np.random.default_rng(3).bit_generator.state
    reasons = dict(skipped.items())
    assert set(reasons) == {"broken.png", "small.png"}
    assert "40x3" in reasons["small.png"]


def test_folders_for_splits(tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    write("folder", root / "train", pairs(6))
    write("folder", root / "held", pairs(4, 50))
    assert len(make_source(config(root), "train")) == 6
    assert len(make_source(config(root, val_split="held"), "val")) == 4
    with pytest.raises(DataError, match="val_split"):
        make_source(config(root), "val")


# --- captions -------------------------------------------------------------------------------------


def test_captions_are_chosen_by_their_shares_among_those_that_are_there():
    fields = CaptionFields.parse("blip:0.75, llava:0.25")
    record = {"text": ["short", " a long one "]}
    rng = np.random.default_rng(0)
    drawn = [fields.choose(record, rng) for _ in range(2000)]
    assert set(drawn) == {"short", "a long one"}
    assert drawn.count("short") / 2000 == pytest.approx(0.75, abs=0.04)
    assert {fields.choose({"text": ["", "x"]}, rng) for _ in range(9)} == {"x"}
    assert fields.choose({"text": "no list"}, rng) == ""
    record = {"top_caption": "a", "all_captions": ["b", "c"], "n": 3, "blip": "own"}
    asked = ("json:top_caption", "top_caption", "all_captions[1]", "n", "all_captions[7]", "blip")
    assert [text_of(record, name) for name in asked] == ["a", "a", "c", "", "", "own"]
    assert CaptionFields.parse("json:top_caption").names == ("json:top_caption",)
    assert CaptionFields.parse("json:a:0.5,txt:0.5").names == ("json:a", "txt")


@pytest.mark.parametrize(
    "text", ["a,b", "a:0.5,b", "a:0.5,b:0.6", "a:0.5,b:-0.5", ":1", "a:nan", ","]
)
def test_shares_that_make_no_sense_are_refused(text):
    with pytest.raises(DataError, match="caption_field"):
        CaptionFields.parse(text)


def test_filters_compare_numbers():
    (clear, safe) = Where.parse("score>=6, punsafe<0.5")
    assert clear.fails({"score": 6}) == "" and "score>=6" in clear.fails({"score": 5.9})
    assert safe.fails({"punsafe": "0.1"}) == ""  # a column of a list
    for value in (None, "many", [1], float("nan"), 10**400):
        assert "without a number" in safe.fails({"punsafe": value})
    for wrong in ("score", "score>high", "score=>6", "a>1>2"):
        with pytest.raises(DataError, match="where"):
            Where.parse(wrong)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layout, field, options, message",
    [
        ("tar", "", {}, "caption_field.*json:top_caption = BLIP.*txt = picture 0"),
        ("jsonl", "", {}, r"caption_field.*json:text\[0\] = picture 0"),
        ("tar", "json:alt", {}, "json:alt.*24 image.*without a caption.*json:top_caption"),
        ("tar", "txt", {"where": "score>6"}, "24 record.*without a number score"),
        ("tar", "txt", {"layout": "jsonl"}, "neither shards.*tar"),
        ("parquet", "", {}, "caption_field.*json:caption = picture 0"),
        ("parquet", "alt", {}, "no column alt.*it has caption, top_caption, score"),
        ("parquet", "caption", {"where": "clear>=6"}, "no column clear"),
        ("folder", "", {"min_side": -1}, "data.options.min_side=-1"),
        ("folder", "", {"caption": "txt"}, "data.options.caption: nothing reads.*caption_field"),
    ],
)
def test_options_that_make_no_sense_are_named(layout, field, options, message, tmp_path):
    root = write(layout, tmp_path / "data")
    with pytest.raises(DataError, match=message):
        make_source(config(root, field, **options), "train")


@pytest.mark.parametrize("layout", ["auto", "parquet"])
def test_without_the_library_of_parquet_its_name_is_said(layout, tmp_path, monkeypatch):
    (tmp_path / "00000.parquet").write_bytes(b"PAR1")
    for name in ("pyarrow", "pyarrow.parquet", "pyarrow.types"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DataError, match="read by the library pyarrow"):
        make_source(config(tmp_path, "", layout=layout), "train")


def test_places_without_pairs_are_refused(tmp_path):
    with pytest.raises(DataError, match="nothing at"):
        make_source(config(tmp_path / "absent"), "train")
    with pytest.raises(DataError, match="files ending in nothing"):
        make_source(config(tmp_path), "train")
    (tmp_path / "a.parquet").touch()
    with pytest.raises(DataError, match="a.parquet is damaged, or no parquet file"):
        make_source(config(tmp_path), "train")
    (tmp_path / "a.parquet").unlink()
    write("tar", tmp_path / "tar")
    write("tsv", tmp_path / "tsv")
    with pytest.raises(DataError, match="tar and tsv: choose with data.options.layout"):
        make_source(config(tmp_path), "train")
    with pytest.raises(DataError, match="flip"):
        make_source(DataConfig(name="image_text", path=str(tmp_path)), "train")


def test_a_shard_that_is_cut_off_is_named(tmp_path):
    root = write("tar", tmp_path / "data")
    content = (root / "00001.tar").read_bytes()
    for length in (len(content) // 2, 512 * 11, 700, 100):
        (root / "00001.tar").write_bytes(content[:length])
        with pytest.raises(DataError, match="00001.tar is damaged"):
            make_source(config(root, "txt"), "train")


def test_links_and_devices_in_a_shard_lead_nowhere(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE):
            info = tarfile.TarInfo(f"{kind.decode()}.png")
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
        for name, data in members(pairs(1)):
            info = tarfile.TarInfo(f"../../{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    found = make_source(config(path, "txt", folder_holdout=1e-9), "train")
    assert len(found) == 1
    assert "4 member(s)" in found.left_out
    assert found.sample(0, np.random.default_rng(0))["condition"] == "picture 0"


@settings(max_examples=60)
@given(data=st.data())
def test_any_damage_to_a_shard_is_refused_or_stays_inside_it(data, tmp_path_factory):
    path = write_tar(tmp_path_factory.mktemp("tar") / "a.tar", members(pairs(2)))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        block = data.draw(st.integers(0, 11)) * 512
        content[block + data.draw(st.integers(0, 511))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.just(len(content)) | st.integers(0, len(content)))])
    size = path.stat().st_size
    with contextlib.suppress(DataError):
        layout = TarShards(path, None, Counter())
        for entry in layout.scan():
            for _, at, length in (entry.image, entry.text, entry.record):
                assert 0 <= at <= at + length <= size


# --- parquet --------------------------------------------------------------------------------------


def test_rows_are_left_out_by_their_columns_and_other_columns_are_not_read(tmp_path):
    rows = [*pairs(6), ("none", None, "no image"), ("empty", png(9), None)]
    root = tmp_path / "data"
    root.mkdir()
    write_parquet(root / "0.parquet", rows, width=[3, *[12] * 7], height=[9] * 8)
    write_parquet(root / "1.parquet", pairs(3, 50), height=[9] * 3, jpg=[b"not this"] * 3)
    asked = config(root, "caption", where="score>=0", folder_holdout=1e-9, max_unreadable=0.5)
    found = make_source(asked, "train")
    names = [found.name(i) for i in range(len(found))]
    assert names == [
        *(f"0.parquet:{i}" for i in range(1, 7)),
        *(f"1.parquet:{i}" for i in range(3)),
    ]
    assert "1 image(s) without a caption" in found.left_out and "below 4 pixels" in found.left_out
    assert found._layout.record(found._index.entry(7)) == {
        "caption": "picture 51", "score": 1, "height": 9
    }  # fmt: skip
    with pytest.raises(UnreadableImage, match="no bytes"):
        found.sample(5, np.random.default_rng(0))
    order = [8, 0, 4, 1, 6]
    seen = numbers({"image": np.stack([sampled(found, i)["image"] for i in order])})
    assert list(seen) == [52, 1, 5, 2, 50]


def sampled(found, index):
    return found.sample(index, np.random.default_rng(0))


def test_lists_of_downloads_in_parquet_are_no_images(tmp_path):
    """img2dataset writes them beside its shards and its folders."""
    for layout in ("tar", "folder"):
        root = write(layout, tmp_path / layout)
        pq.write_table(pa.table({"url": ["x"], "key": ["0"]}), root / "00000.parquet")
        assert len(make_source(config(root, FIELDS[layout]), "train"))
    with pytest.raises(DataError, match="without a column of images|no image has a caption"):
        make_source(config(root, "url", layout="parquet"), "train")


@pytest.mark.parametrize(
    "layout, field, names",
    [
        ("parquet", "caption", ["train-00000-of-00001.parquet", "test-00000-of-00001.parquet"]),
        ("parquet", "caption", ["train.parquet", "test.parquet"]),
        ("jsonl", "blip", ["train.jsonl", "val.jsonl"]),
        ("tsv", "", ["my_training_set.tsv", "my_validation_set.tsv"]),
        ("tar", "txt", ["train-0000.tar", "val-0000.tar"]),
    ],
)
def test_splits_that_file_names_tell_are_not_mixed(layout, field, names, tmp_path):
    lone = min(write(layout, tmp_path / "made").glob(f"*.{layout}"))
    root = tmp_path / "data"
    root.mkdir()
    for name in names:
        (root / name).write_bytes(lone.read_bytes())
    for image in (tmp_path / "made").glob("*.png"):
        image.rename(root / image.name)
    with pytest.raises(DataError, match=f"{'.*'.join(sorted(names))}.*data.train_split"):
        make_source(config(root, field), "train")
    asked = DataConfig(**{**vars(config(root, field)), "train_split": names[0]})
    assert len(make_source(asked, "train"))


@settings(max_examples=60)
@given(data=st.data())
def test_any_damage_to_a_parquet_file_is_refused_or_gives_rows(data, tmp_path_factory):
    path = write_parquet(tmp_path_factory.mktemp("parquet") / "a.parquet", pairs(12))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        near = st.integers(0, len(content) - 1) | st.integers(len(content) - 1200, len(content) - 1)
        content[data.draw(near)] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.just(len(content)) | st.integers(0, len(content)))])
    with contextlib.suppress(DataError):
        layout = Parquet(path, None, Counter())
        layout.only(["caption"])
        for entry in itertools.islice(layout.scan(), 100):
            assert isinstance(layout.record(entry), dict)
            with contextlib.suppress(UnreadableImage):
                assert layout.image(entry).read() is not None


LINES = st.lists(
    st.binary(max_size=30)
    | st.sampled_from(
        [b'{"image_path": "x.png"}', b'{"image": 3}', b"[1]", b"path\tcaption", b"a\tb"]
    )
    | st.text(max_size=20).map(lambda text: json.dumps({"path": text, "text": [text]}).encode()),
    max_size=6,
)


@pytest.mark.parametrize("kind", [JsonLines, TabLines])
@settings(max_examples=60)
@given(lines=LINES)
def test_any_list_is_refused_or_gives_images_that_are_there(kind, lines, tmp_path_factory):
    folder = tmp_path_factory.mktemp("list")
    (folder / "x.png").write_bytes(png(1))
    (folder / f"a.{'jsonl' if kind is JsonLines else 'tsv'}").write_bytes(b"\n".join(lines))
    with contextlib.suppress(DataError):
        layout = kind(folder, None, Counter())
        for entry in layout.scan():
            assert layout.image(entry).exists()
            assert isinstance(layout.record(entry), dict)
