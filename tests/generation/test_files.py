"""Samples on disk: nothing lost, nothing half, nothing of another recipe, whatever is interrupted."""

import hashlib
import json
import multiprocessing
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vapi_jax.common import files as common_files
from vapi_jax.common.locks import LockedError
from vapi_jax.generation import files as sample_files
from vapi_jax.generation.files import (
    SampleFiles,
    SampleFilesError,
    differences,
    map_npz_array,
    settle_recipe,
)

LABELS = np.arange(7, dtype=np.int64) % 3


def picture(sample, size=4):
    return np.random.default_rng(sample).integers(0, 256, (size, size, 3), np.uint8)


def pictures(samples, size=4):
    return np.stack([picture(sample, size) for sample in samples])


def draw_all(files, labels=LABELS):
    """What the command does, with images that cost nothing."""
    for chunk in files.todo():
        files.write(chunk, pictures(files.ids(chunk), files.size))
    files.finish(labels)


def contents(directory):
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("form", sample_files.FORMATS)
def test_what_is_written_is_what_was_drawn(tmp_path, form):
    files = SampleFiles(tmp_path, 7, 3, 4, form)
    draw_all(files)
    assert files.todo() == []
    if form != "npz":
        found = [np.asarray(Image.open(tmp_path / "images" / f"00000{i}.png")) for i in range(7)]
        np.testing.assert_array_equal(found, pictures(range(7)))
    if form != "png":
        with np.load(tmp_path / "samples.npz", allow_pickle=False) as archive:
            assert archive.files == ["arr_0", "arr_1"]
            assert (archive["arr_0"].dtype, archive["arr_1"].dtype) == (np.uint8, np.int64)
            np.testing.assert_array_equal(archive["arr_0"], pictures(range(7)))
            np.testing.assert_array_equal(archive["arr_1"], LABELS)
    np.testing.assert_array_equal(files.read([5, 0, 6]), pictures([5, 0, 6]))
    assert (tmp_path / "labels.txt").read_text() == "0\n1\n2\n0\n1\n2\n0\n"
    names = {"png": {"images"}, "npz": {"samples.npz"}, "both": {"images", "samples.npz"}}[form]
    assert {path.name for path in tmp_path.iterdir()} == names | {"labels.txt"}


def test_the_archive_is_read_by_the_evaluators_own_steps(tmp_path):
    """ADM's evaluator takes arr_0.npy out of the zip, wants .npy 1.0 or 2.0 and C order."""
    draw_all(SampleFiles(tmp_path, 7, 3, 4, "npz"))
    with zipfile.ZipFile(tmp_path / "samples.npz") as archive:
        assert archive.testzip() is None
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        with archive.open("arr_0.npy") as file:
            assert np.lib.format.read_magic(file) == (1, 0)
            header = np.lib.format.read_array_header_1_0(file)
            assert header == ((7, 4, 4, 3), False, np.dtype("uint8"))
            assert file.read(48) == picture(0).tobytes()


def test_samples_without_labels_have_no_second_array(tmp_path):
    draw_all(SampleFiles(tmp_path, 7, 3, 4, "npz"), labels=None)
    assert {path.name for path in tmp_path.iterdir()} == {"samples.npz"}
    assert np.load(tmp_path / "samples.npz").files == ["arr_0"]


class Killed(BaseException):
    """As sudden as a signal: nothing catches it."""


@pytest.mark.parametrize("form", sample_files.FORMATS)
def test_a_run_killed_at_any_step_ends_like_one_that_was_not(tmp_path, monkeypatch, form):
    """Stopped before and in the middle of every single write, rename and removal, in turn."""
    whole = SampleFiles(tmp_path / "whole", 7, 3, 4, form)
    draw_all(whole)
    want = contents(whole.directory)
    originals = {name: getattr(Path, name) for name in ("replace", "unlink")}
    write_all, rmtree, drawn = common_files.write_all, sample_files.shutil.rmtree, []
    left = 10**9

    def step():
        """The dead do nothing more, so that nobody tidies up behind them."""
        nonlocal left
        left -= 1
        if left <= 0:
            raise Killed

    def spoil(file, data, path):
        if left == 1:
            write_all(file, data[: len(data) // 2], path)
        step()
        write_all(file, data, path)

    def before(name):
        return lambda path, *args, **how: (step(), originals[name](path, *args, **how))[1]

    class Counted(SampleFiles):
        def write(self, chunk, images):
            super().write(chunk, images)
            drawn.append(chunk)

    monkeypatch.setattr(common_files, "write_all", spoil)
    monkeypatch.setattr(Path, "replace", before("replace"))
    monkeypatch.setattr(Path, "unlink", before("unlink"))
    monkeypatch.setattr(sample_files.shutil, "rmtree", lambda path: (step(), rmtree(path)))
    stops = 0
    for moment in range(1, 100):
        files = Counted(tmp_path / str(moment), 7, 3, 4, form)
        left, drawn[:] = moment, []
        try:
            draw_all(files)
        except Killed:
            stops += 1
            left = 10**9
            draw_all(files)
            assert sorted(drawn) == [0, 1, 2], "a finished chunk was drawn again, or one is missing"
        else:
            break
        finally:
            left = 10**9
        assert contents(files.directory) == want, f"killed at step {moment}"
    assert stops == {"png": 24, "npz": 15, "both": 36}[form]


def test_files_that_lost_their_end_are_drawn_again(tmp_path):
    """What a power cut leaves of files whose names had been written already."""
    files = SampleFiles(tmp_path, 7, 3, 4, "both")
    for chunk in range(3):
        files.write(chunk, pictures(files.ids(chunk)))
    files.picture(1).write_bytes(files.picture(1).read_bytes()[:-3])
    last = tmp_path / "chunks" / "00000006-00000007.npy"
    last.write_bytes(last.read_bytes()[:-1])
    (tmp_path / "chunks" / "00000003-00000006.npy.partial").write_bytes(b"half")
    assert files.todo() == [0, 2]
    assert not list(tmp_path.rglob("*.partial"))
    files.picture(4).unlink()
    assert files.todo() == [0, 1, 2]


def test_an_archive_that_lost_its_end_is_drawn_again(tmp_path):
    files = SampleFiles(tmp_path, 7, 3, 4, "npz")
    draw_all(files)
    want = contents(tmp_path)
    files.npz.write_bytes(files.npz.read_bytes()[:-30])
    files.grow()
    assert files.todo() == [0, 1, 2]
    draw_all(files)
    assert contents(tmp_path) == want


def test_images_are_on_the_disk_before_what_they_were_put_together_from_goes(tmp_path, monkeypatch):
    synced = []

    def fsync(number):
        synced.append(sorted(path.name for path in tmp_path.rglob("*") if path.is_file()))

    monkeypatch.setattr(sample_files.os, "fsync", fsync)
    draw_all(SampleFiles(tmp_path, 2, 2, 4, "npz"), labels=None)
    assert synced == [["00000000-00000002.npy", "samples.npz.partial"]]
    SampleFiles(tmp_path, 3, 2, 4, "npz").grow()
    assert synced[1:] == [["00000000-00000002.npy.partial", "samples.npz"]]


@pytest.mark.parametrize("form", sample_files.FORMATS)
@pytest.mark.parametrize(("before", "finished"), [((5, 3), True), ((7, 5), False), ((7, 2), False)])
def test_another_batch_and_more_samples_go_on_from_what_is_there(
    tmp_path, form, before, finished, monkeypatch
):
    """Batches of 5, 2 and 3, more samples, and folders where there were none."""
    monkeypatch.setattr(sample_files, "PER_FOLDER", 6)
    old = SampleFiles(tmp_path / "a", *before, 4, form)
    if finished:
        draw_all(old, LABELS[: old.count])
    else:
        old.write(0, pictures(old.ids(0)))
    new = SampleFiles(tmp_path / "a", 7, 3, 4, form)
    for _ in range(2):  # as after a kill
        new.grow()
    assert new.todo() == list(range(len(old.ids(0)) // 3 if not finished else 1, 3))
    draw_all(new)
    draw_all(SampleFiles(tmp_path / "b", 7, 3, 4, form))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_samples_on_a_disk_that_is_not_shared_are_missed(tmp_path):
    with pytest.raises(SampleFilesError, match=r"8 samples .* share"):
        SampleFiles(tmp_path, 8, 4, 4).await_all(patience=0.0)


def test_many_samples_go_to_folders_of_ten_thousand():
    few, many = (SampleFiles(Path("d"), count, 64, 4) for count in (10_000, 10_001))
    assert str(few.picture(9_999)) == "d/images/009999.png"
    assert [str(many.picture(i)) for i in (0, 9_999, 10_000)] == [
        "d/images/00/000000.png",
        "d/images/00/009999.png",
        "d/images/01/010000.png",
    ]
    huge = SampleFiles(Path("d"), 2_000_001, 64, 4)
    assert str(huge.picture(2_000_000)) == "d/images/200/2000000.png"
    assert str(huge.picture(7)) == "d/images/000/0000007.png"


def test_a_chunk_over_the_edge_of_a_folder_is_written_to_both(tmp_path, monkeypatch):
    monkeypatch.setattr(sample_files, "PER_FOLDER", 4)
    draw_all(SampleFiles(tmp_path, 7, 3, 4))
    assert sorted(str(p.relative_to(tmp_path / "images")) for p in tmp_path.rglob("*.png")) == [
        *(f"00/{i:06d}.png" for i in range(4)),
        *(f"01/{i:06d}.png" for i in range(4, 7)),
    ]


def test_memory_stays_that_of_a_chunk(tmp_path):
    """48 MB of images in chunks of 1.5 MB."""
    files = SampleFiles(tmp_path, 128, 4, 354, "npz")
    labels, blank = np.zeros(128, np.int64), np.zeros((4, 354, 354, 3), np.uint8)
    tracemalloc.start()
    for chunk in files.todo():
        files.write(chunk, blank)
    files.finish(labels)
    shown = files.read([3, 100])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert files.npz.stat().st_size > 48e6
    assert shown.shape == (2, 354, 354, 3)
    assert peak < 6e6


@pytest.mark.parametrize(
    "images", [np.zeros((3, 4, 4, 3)), np.zeros((2, 4, 4, 3), np.uint8), np.zeros((3, 4, 5, 3), np.uint8)]
)  # fmt: skip
def test_images_of_another_shape_or_type_are_not_written(tmp_path, images):
    with pytest.raises(ValueError, match="uint8 \\(3, 4, 4, 3\\)"):
        SampleFiles(tmp_path, 7, 3, 4).write(0, images)
    assert not list(tmp_path.iterdir())


def _hold(directory, ready, done):
    with SampleFiles(directory, 7, 3, 4).locked():
        ready.set()
        done.wait(30)


def test_two_processes_do_not_write_to_one_directory(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path, ready, done))
    other.start()
    try:
        assert ready.wait(30)
        with (
            pytest.raises(LockedError, match=rf"{other.pid}.*--out"),
            SampleFiles(tmp_path, 7, 3, 4).locked(),
        ):
            pass
    finally:
        other.kill()
        other.join()
    with SampleFiles(tmp_path, 7, 3, 4).locked():
        settle_recipe(tmp_path, RECIPE)  # the lock is no foreign file


# --- recipe ---------------------------------------------------------------------------------------

RECIPE = {
    "checkpoint": {"path": "runs/a", "sha256": {"policy": {"p": "00"}}},
    "sampling": {"temperature": 1.0, "top_k": 0},
    "seed": 0,
    "started": "2026-01-01T00:00:00+00:00",
    "versions": {"jax": "1"},
    "devices": {"kind": "cpu", "count": 1},
}


def test_a_recipe_comes_first_and_holds(tmp_path):
    directory = tmp_path / "new" / "samples"
    assert settle_recipe(directory, RECIPE) == RECIPE
    assert json.loads((directory / "recipe.json").read_text()) == RECIPE
    later = {**RECIPE, "started": "later", "versions": {"jax": "2"}, "devices": {}, "resumed": [1]}
    later["checkpoint"] = {**RECIPE["checkpoint"], "path": "/home/me/runs/a"}
    assert settle_recipe(directory, later) == RECIPE
    assert json.loads((directory / "recipe.json").read_text()) == RECIPE


def test_another_recipe_is_refused_with_every_difference(tmp_path):
    settle_recipe(tmp_path, RECIPE)
    other = {**RECIPE, "sampling": {"temperature": 0.9}, "seed": 1, "resize": None}
    other["checkpoint"] = {"path": "runs/a", "sha256": {"policy": {"p": "11"}}}
    with pytest.raises(SampleFilesError) as caught:
        settle_recipe(tmp_path, other)
    head, *lines = str(caught.value).splitlines()
    assert head.endswith(
        "holds samples of another recipe; give another --out, or ask for the same:"
    )
    assert lines == [
        '  checkpoint.sha256.policy.p: "00" there, "11" asked for',
        "  resize: nothing there, null asked for",
        "  sampling.temperature: 1.0 there, 0.9 asked for",
        "  sampling.top_k: 0 there, nothing asked for",
        "  seed: 0 there, 1 asked for",
    ]
    assert differences(RECIPE, RECIPE) == []


def test_more_samples_of_the_same_recipe_are_no_other_recipe(tmp_path):
    def asked(count, batch=8, seed=0):
        return {**RECIPE, "count": count, "batch": batch, "seed": seed, "labels": {"of": count}}

    settle_recipe(tmp_path, asked(7))
    grown = []
    with pytest.raises(SampleFilesError, match="seed: 0 there, 1 asked for"):
        settle_recipe(tmp_path, asked(9, seed=1), lambda n: asked(n, seed=1))
    held = settle_recipe(tmp_path, asked(9, 4), lambda n: asked(n, 4), lambda: grown.append(1))
    assert held == json.loads((tmp_path / "recipe.json").read_text()) == asked(9, 8)
    assert grown == [1]
    with pytest.raises(SampleFilesError, match="count: 9 there, 7 asked for"):
        settle_recipe(tmp_path, asked(7), asked)


def test_other_peoples_files_are_not_mixed_with_samples(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(SampleFilesError, match="thesis.tex.*recipe.json"):
        settle_recipe(tmp_path, RECIPE)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_start_that_was_killed_leaves_no_obstacle(tmp_path):
    (tmp_path / "recipe.json.partial").write_text("{")
    assert settle_recipe(tmp_path, RECIPE) == RECIPE


@pytest.mark.parametrize("text", ["{", "[]", "\x00"])
def test_a_damaged_recipe_is_named(tmp_path, text):
    (tmp_path / "recipe.json").write_text(text)
    with pytest.raises(SampleFilesError, match="recipe.json .*JSON"):
        settle_recipe(tmp_path, RECIPE)


# --- arrays of an archive -------------------------------------------------------------------------


def test_a_mapped_array_is_numpys_own(tmp_path):
    arrays = {
        "features": np.random.default_rng(0).normal(size=(5, 3, 2)).astype(np.float16),
        "mask": np.eye(3, dtype=bool),
        "none": np.zeros((0, 4)),
    }
    np.savez(tmp_path / "a.npz", **arrays)
    for name, want in arrays.items():
        got = map_npz_array(tmp_path / "a.npz", name)
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)
    with pytest.raises(ValueError, match="read-only"):
        map_npz_array(tmp_path / "a.npz", "mask")[0] = False


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "no file"),
        (lambda path: path.write_bytes(b"no zip"), r"a\.npz"),
        (lambda path: np.savez(path, other=np.zeros(3)), "'a'.*other"),
        (lambda path: np.savez_compressed(path, a=np.zeros(99)), "compressed.*numpy"),
        (lambda path: np.savez(path, a=np.array([{}])), "Python objects"),
    ],
)
def test_an_archive_that_cannot_be_mapped_is_named(tmp_path, write, message):
    write(tmp_path / "a.npz")
    with pytest.raises(SampleFilesError, match=message):
        map_npz_array(tmp_path / "a.npz", "a")


def test_no_two_archives_of_the_same_samples_differ(tmp_path, monkeypatch):
    digests = []
    for name, now in (("a", 1e9), ("b", 1.7e9)):
        monkeypatch.setattr("time.time", lambda now=now: now)
        draw_all(SampleFiles(tmp_path / name, 7, 3, 4, "npz"))
        digests.append(hashlib.sha256((tmp_path / name / "samples.npz").read_bytes()).hexdigest())
    assert digests[0] == digests[1]
