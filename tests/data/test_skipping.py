"""Unreadable images: others take their places, nothing else moves, and too many stop the run."""

import contextlib
import dataclasses
import itertools
import json
import logging
import threading

import numpy as np
import pytest

from tests.helpers.image_folders import assert_same, folder_config, numbers, take, write_images
from vapi_jax.data import DataConfig, DataError, SkippedImages, fixed_batch, make_dataset
from vapi_jax.data.images import UnreadableImage
from vapi_jax.data.skipping import Readable, allowed
from vapi_jax.data.sources import Source

COUNT, DAMAGED = 40, (3, 11, 12, 38)
EPOCHS, BATCH = 3, 10


def damage(folder):
    """Breaks four of the images, each in another way."""
    for number, kind in zip(DAMAGED, ("empty", "truncated", "text", "gone"), strict=True):
        path = folder / "train" / "a" / f"{number:03d}.png"
        whole = path.read_bytes()
        path.unlink()
        if kind == "gone":
            path.symlink_to("nowhere.png")
        else:
            content = {"empty": b"", "truncated": whole[:-30], "text": b"no image"}[kind]
            path.write_bytes(content)


@pytest.fixture
def streams(tmp_path):
    """Three epochs of a folder before and after four of its images break, and its configuration."""
    write_images(tmp_path / "train" / "a", COUNT)
    config = folder_config(tmp_path, crop="random", max_unreadable=0.1)
    before = take(make_dataset(config, "train", BATCH, seed=0), EPOCHS * COUNT // BATCH)
    damage(tmp_path)
    after = take(make_dataset(config, "train", BATCH, seed=0), EPOCHS * COUNT // BATCH)
    return before, after, config


def seen(batches):
    return [number for batch in batches for number in numbers(batch)]


def test_no_readable_image_moves_and_another_stands_in_for_the_broken(streams):
    before, after, _ = streams
    stand_ins = []
    rows = zip(seen(before), seen(after), strict=True)
    pairs = [
        (a["image"][i], b["image"][i])
        for a, b in zip(before, after, strict=True)
        for i in range(BATCH)
    ]
    for (was, is_now), (old, new) in zip(rows, pairs, strict=True):
        if was in DAMAGED:
            assert is_now not in DAMAGED
            assert new[..., 1].mean() == pytest.approx(100 / 127.5 - 1, abs=0.01)  # not black
            stand_ins.append(is_now)
        else:
            np.testing.assert_array_equal(old, new)  # the same file, crop and flip
    assert len(stand_ins) == EPOCHS * len(DAMAGED)
    assert len(set(stand_ins)) > len(DAMAGED), "the same few images stand in every time"


def test_every_readable_image_is_seen_in_every_epoch(streams):
    _, after, _ = streams
    epochs = np.array(seen(after)).reshape(EPOCHS, COUNT)
    for epoch in epochs:
        assert set(epoch) == set(range(COUNT)) - set(DAMAGED)


@pytest.mark.parametrize("options", [{"num_threads": 3}, {}], ids=["threads", "no threads"])
@pytest.mark.parametrize("done", [1, 5, 9])
def test_an_interrupted_run_goes_on_exactly(streams, options, done):
    _, after, config = streams
    config = dataclasses.replace(config, **options)
    iterator = iter(make_dataset(config, "train", BATCH, seed=0))
    assert_same(after[:done], list(itertools.islice(iterator, done)))
    state = json.loads(json.dumps(iterator.get_state()))
    restored = iter(make_dataset(config, "train", BATCH, seed=0))
    restored.set_state(state)
    assert_same(after[done:], list(itertools.islice(restored, len(after) - done)))


@pytest.mark.parametrize("count", [2, 5])
def test_processes_share_the_same_stream(streams, count):
    _, after, config = streams
    shares = [
        take(make_dataset(config, "train", BATCH // count, 0, i, count), len(after))
        for i in range(count)
    ]
    for step, whole in enumerate(after):
        assert seen(share[step] for share in shares) == numbers(whole)


def test_held_out_images_are_the_same_every_time(streams):
    _, _, config = streams
    first = fixed_batch(config, "train", COUNT, seed=5)
    assert_same([first], [fixed_batch(config, "train", COUNT, seed=5)])
    assert set(numbers(first)) == set(range(COUNT)) - set(DAMAGED)


# The list ----------------------------------------------------------------------------------------


def test_the_list_names_every_broken_image_once_with_its_reason(streams, tmp_path, caplog):
    _, _, config = streams
    path = tmp_path / "run" / "skipped_images.jsonl"
    skipped = SkippedImages(path)
    config = dataclasses.replace(config, num_threads=2)
    with caplog.at_level(logging.WARNING, logger="vapi_jax"):
        take(make_dataset(config, "train", BATCH, seed=0, skipped=skipped), 12)
        fixed_batch(config, "train", COUNT, 0, skipped=skipped)
    names = [str(tmp_path / "train" / "a" / f"{number:03d}.png") for number in DAMAGED]
    assert sorted(name for name, _ in skipped.items()) == names
    assert len(skipped) == len(caplog.records) == 4
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["image"], row["reason"]) for row in rows] == list(skipped.items())
    reasons = dict(skipped.items())
    assert reasons[names[3]] == "No such file or directory"
    assert "truncated" in reasons[names[1]]
    assert all(name in caplog.text and reason in caplog.text for name, reason in reasons.items())


def test_a_list_goes_on_where_an_interrupted_run_left_it(tmp_path):
    path = tmp_path / "skipped_images.jsonl"
    strange = "a\nb\t\udcff é.png"  # a newline, and a byte that is no UTF-8
    first = SkippedImages(path)
    first.add(strange, "why")
    first.add("second", "because")
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:20])  # killed while it wrote
    again = SkippedImages(path)
    assert again.items() == ((strange, "why"), ("second", "because"))
    assert path.read_bytes() == whole
    again.add("second", "another reason")
    again.add("third", "new")
    assert [name for name, _ in SkippedImages(path).items()] == [strange, "second", "third"]


def test_every_process_has_a_list_of_its_own(streams, tmp_path):
    _, _, config = streams
    run = tmp_path / "run"
    for process in range(2):
        skipped = SkippedImages.of_process(run, process)
        take(make_dataset(config, "train", BATCH // 2, 0, process, 2, skipped), 6)
    names = [
        {json.loads(line)["image"] for line in (run / name).read_text().splitlines()}
        for name in ("skipped_images.jsonl", "skipped_images.1.jsonl")
    ]
    assert all(names)
    assert names[0] | names[1] == {str(tmp_path / "train" / "a" / f"{n:03d}.png") for n in DAMAGED}


def test_threads_list_an_image_once(tmp_path):
    skipped = SkippedImages(tmp_path / "list.jsonl")
    start = threading.Barrier(8)

    def work():
        start.wait()
        for number in range(200):
            skipped.add(f"image {number}", "why")

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(skipped) == 200
    assert len((tmp_path / "list.jsonl").read_text().splitlines()) == 200


def test_thousands_of_broken_images_do_not_flood_the_log(tmp_path, caplog):
    skipped = SkippedImages(tmp_path / "list.jsonl")
    with caplog.at_level(logging.WARNING, logger="vapi_jax"):
        for number in range(1000):
            skipped.add(f"image {number}", "why")
    assert len(caplog.records) == 21
    assert str(tmp_path / "list.jsonl") in caplog.records[-1].getMessage()
    assert len(skipped) == 1000


# The share ---------------------------------------------------------------------------------------


TINY = DataConfig(image_size=1)


class Fake(Source):
    """A source whose broken images are known, and that counts what is asked of it."""

    class_names = ("a",)

    def __init__(self, length, broken):
        super().__init__(TINY, "train")
        self._length, self._broken = length, broken
        self.opened = []

    def __len__(self):
        return self._length

    def name(self, index):
        return f"image {index}"

    def sample(self, index, rng):
        self.opened.append(index)
        if self._broken(index):
            raise UnreadableImage("broken")
        return {"image": np.full((1, 1, 3), index, np.float32), "condition": np.int32(0)}


def read(source, count, share):
    """Samples 0 .. count - 1; returns the source's indices."""
    readable = Readable(source, dataclasses.replace(TINY, max_unreadable=share), SkippedImages())
    rng = np.random.default_rng
    return [int(readable.sample(i, rng(i))["image"][0, 0, 0]) for i in range(count)]


def test_more_than_the_allowed_share_stops_the_run_and_names_the_first():
    with pytest.raises(DataError) as error:
        read(Fake(100, lambda i: i in (7, 40)), 100, share=0.01)
    text = str(error.value)
    assert text.startswith("2 of 42 images read cannot be decoded (the split has 100), more than")
    assert "data.max_unreadable=0.01" in text
    assert "\n  image 7 (broken)\n  image 40 (broken)\n" in text
    assert len(read(Fake(100, lambda i: i in (7, 40)), 100, share=0.02)) == 100


def test_no_share_allows_none():
    with pytest.raises(DataError, match="1 of 6"):
        read(Fake(10**6, lambda i: i == 5), 10, share=0.0)


def test_the_share_is_of_the_images_read_and_not_of_those_there_are():
    """Half of a huge dataset is broken: a short run sees few of its images, and stops all the same."""
    with pytest.raises(DataError, match=r"26 of 5\d"):
        read(Fake(10**6, lambda i: i % 2 == 1), 100, share=0.01)


def test_a_few_broken_images_at_the_start_are_no_large_share():
    source = Fake(10**5, lambda i: i < 10)
    assert not {i for i in read(source, 3000, share=0.01) if i < 10}


def test_where_nothing_can_be_read_the_run_stops_whatever_is_allowed():
    with pytest.raises(DataError, match="3 of 3"):
        read(Fake(3, lambda i: True), 3, share=1.0)


def test_a_process_judges_the_split_and_not_its_part_of_it():
    """Of an eighth of a split more may be broken than of the whole, without more being allowed."""
    total, processes, limit = 40_000, 8, 0.01
    rng = np.random.default_rng(0)
    broken = set(rng.choice(total, int(0.0095 * total), replace=False).tolist())
    parts = np.split(rng.permutation(total), processes)
    shares = []
    for part in parts:
        found = np.cumsum([index in broken for index in part.tolist()])
        shares.append(max(found[1000:] / np.arange(1000, len(part))))
        readable = Readable(
            Fake(total, broken.__contains__),
            dataclasses.replace(TINY, max_unreadable=limit),
            SkippedImages(),
        )
        for index in part.tolist():
            readable.sample(index, rng)
    assert max(shares) > 1.2 * limit  # what a process has seen, at some time


@pytest.mark.parametrize(("bad", "stops"), [(30, False), (31, True)])
def test_who_has_read_all_images_knows_the_share(bad, stops):
    source = Fake(3000, lambda i: i % 90 == 0 and i < 90 * bad)
    with pytest.raises(DataError, match="^31 of 27") if stops else contextlib.nullcontext():
        read(source, 3000, share=0.01)


@pytest.mark.parametrize("tried", [10, 1000, 5000, 10**5])
def test_what_is_allowed_is_never_more_than_the_share_of_all_images(tried):
    assert allowed(0.0, tried, 10**5) == 0.0
    assert allowed(0.01, tried, 10**5) <= 1000
    assert allowed(0.01, 10**5, 10**5) == 1000
    assert allowed(0.01, 300, 500) == 5


@pytest.mark.parametrize(
    ("image", "label", "message"),
    [
        (np.zeros((1, 1, 3), np.uint8), 0, r"uint8 \(1, 1, 3\), not float32 \(1, 1, 3\)"),
        (np.zeros((2, 2, 3), np.float32), 0, r"float32 \(2, 2, 3\), not float32 \(1, 1, 3\)"),
        (np.zeros((1, 1, 3), np.float32), 1, "label 1, and has 1 classes"),
        (np.zeros((1, 1, 3), np.float32), -1, "label -1"),
    ],
)
def test_a_sample_of_another_form_is_refused_by_name(image, label, message, monkeypatch):
    sample = {"image": image, "condition": np.int32(label)}
    monkeypatch.setattr(Fake, "sample", lambda *_: sample)
    readable = Readable(Fake(5, lambda i: False), TINY, SkippedImages())
    with pytest.raises(DataError, match=f"image 3.*{message}"):
        readable.sample(3, np.random.default_rng(0))


def test_a_broken_image_is_opened_once():
    source = Fake(50, lambda i: i == 9)
    readable = Readable(source, dataclasses.replace(TINY, max_unreadable=1.0), SkippedImages())
    first = readable.sample(9, np.random.default_rng(0))["image"]
    again = readable.sample(9, np.random.default_rng(0))["image"]
    np.testing.assert_array_equal(first, again)
    assert source.opened.count(9) == 1


def test_a_lack_of_the_process_is_no_fault_of_an_image(streams, monkeypatch):
    _, _, config = streams
    skipped = SkippedImages()

    def fail(*_, **__):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("PIL.Image.open", fail)
    with pytest.raises(OSError, match="Too many open files"):
        take(make_dataset(config, "train", BATCH, 0, skipped=skipped), 1)
    assert len(skipped) == 0
