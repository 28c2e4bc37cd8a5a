"""Files and folders that are whole or not there, with the user's mode; objects from JSON."""

import json
import os
import shutil
import stat
import types
from pathlib import Path

import numpy as np
import pytest

from vapi_jax.common import files
from vapi_jax.common.errors import ExpectedError, disk_trouble
from vapi_jax.common.files import (
    FolderExistsError,
    OutputError,
    make_folder,
    make_room,
    new_file,
    new_folder,
    read_json,
    read_text,
    require_space,
    write_all,
    write_atomically,
)
from vapi_jax.weights.store import save_safetensors


def test_a_file_that_is_not_finished_leaves_the_old_one_and_nothing_else(tmp_path):
    path = tmp_path / "a"
    write_atomically(path, "old")
    with pytest.raises(KeyboardInterrupt), new_file(path) as partial:  # noqa: PT012
        partial.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    with new_file(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_text_is_utf8_and_bytes_stay_as_they_are(tmp_path):
    write_atomically(tmp_path / "a", "π")
    write_atomically(tmp_path / "b", b"\xff\x00", sync=False)
    assert (tmp_path / "a").read_bytes() == "π".encode()
    assert (tmp_path / "b").read_bytes() == b"\xff\x00"


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_files_have_the_mode_that_the_umask_gives(mask, tmp_path):
    """safetensors itself gives 0600, which locks out the people that weights are shared with."""
    (tmp_path / "weights.safetensors.partial").touch(mode=0o600)  # of an interrupted call
    before = os.umask(mask)
    try:
        save_safetensors(tmp_path / "weights.safetensors", {"a": np.zeros(2, np.float32)})
        write_atomically(tmp_path / "text", "a")
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {0o666 & ~mask}


def test_a_name_of_bytes_that_are_no_text_is_written_and_read_back(tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    write_atomically(tmp_path / "a.json", json.dumps({"path": name, "π": 1}, ensure_ascii=False))
    assert read_json(tmp_path / "a.json", ExpectedError) == {"path": name, "π": 1}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_texts_of_windows_editors_are_read(encoding, tmp_path):
    path = tmp_path / "a"
    path.write_bytes('{"π": 1}'.encode(encoding))
    assert read_text(path) == '{"π": 1}'
    assert read_json(path, ExpectedError) == {"π": 1}


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    if not Path("/proc/self").exists():
        pytest.skip("no /proc here")
    with pytest.raises(PermissionError) as error:
        make_folder(Path("/proc/a/b"))
    assert "/proc/a/b" in disk_trouble(error.value)


def test_room_is_made_for_what_is_written_unless_it_is_read(tmp_path):
    out, source = tmp_path / "a" / "b" / "out.json", tmp_path / "in.json"
    source.touch()
    make_room((out,), (source, None))
    assert out.parent.is_dir() and not out.exists()
    (tmp_path / "link.json").symlink_to(source)
    for wrong, message in (
        (tmp_path / "a" / ".." / "in.json", "in.json is read"),
        (tmp_path / "link.json", "link.json is read"),
        (tmp_path / "a", "is a folder"),
        (source / "out.json", "in.json is a file"),
    ):
        with pytest.raises(OutputError, match=message):
            make_room((out, wrong), (source,))


def test_a_folder_appears_when_it_is_complete(tmp_path):
    out = tmp_path / "out"
    files.partial_of(out).mkdir()
    (files.partial_of(out) / "left").touch()
    with new_folder(out) as folder:
        (folder / "a").touch()
        assert not out.exists()
    assert [p.name for p in out.iterdir()] == ["a"]
    with pytest.raises(FolderExistsError, match=str(out)), new_folder(out):
        pass
    with pytest.raises(KeyboardInterrupt), new_folder(out, replace=True):
        raise KeyboardInterrupt
    assert [p.name for p in out.iterdir()] == ["a"]
    with new_folder(out, replace=True) as folder:
        (folder / "b").touch()
    assert [p.name for p in out.iterdir()] == ["b"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_was_to_be_replaced_is_back_after_a_kill_between_two_names(tmp_path):
    out = tmp_path / "out"
    (tmp_path / "out.replaced").mkdir()
    (tmp_path / "out.replaced" / "a").touch()
    files.partial_of(out).mkdir()
    with pytest.raises(KeyboardInterrupt), new_folder(out, replace=True):
        raise KeyboardInterrupt
    assert [p.name for p in out.iterdir()] == ["a"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_folder_behind_a_link_is_replaced_where_it_is(tmp_path):
    (tmp_path / "disk" / "there").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "there")
    with new_folder(tmp_path / "link", replace=True) as folder:
        (folder / "a").touch()
    assert (tmp_path / "link").is_symlink()
    assert [p.name for p in (tmp_path / "link").iterdir()] == ["a"]
    assert [p.name for p in (tmp_path / "disk").iterdir()] == ["there"]


class OurError(ExpectedError):
    pass


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b'{"a": NaN}', b'{"a": Infinity}', b"\xff", b"[" * 100_000]
)
def test_what_is_no_json_object_is_refused_with_its_name(content, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(OurError, match=str(path)):
        read_json(path, OurError)


def test_json_that_is_absent_or_too_large_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    with pytest.raises(OurError, match=f"{path}"):
        read_json(path, OurError)
    path.write_text('{"a": 1}')
    assert read_json(path, OurError) == {"a": 1}
    monkeypatch.setattr(files, "LARGEST_JSON", 7)
    with pytest.raises(OurError, match="7 bytes"):
        read_json(path, OurError)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_said_with_the_name_of_the_file():
    path = Path("/dev/full")
    with (
        path.open("wb", buffering=0) as file,
        pytest.raises(OSError, match="No space left") as error,
    ):
        write_all(file, b"row", path)
    assert disk_trouble(error.value) == (
        "the disk is full at /dev/full (No space left on device). Nothing saved before is lost: put "
        "this right and run the same command again"
    )
    assert disk_trouble(FileNotFoundError(2, "No such file")) is None


def test_what_cannot_fit_is_refused_before_it_is_begun(tmp_path, monkeypatch):
    asked = []

    def usage(place):
        asked.append(place)
        return types.SimpleNamespace(free=5_000_000_000)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    require_space(tmp_path / "not" / "there", 5_000_000_000, "features")
    with pytest.raises(OutputError, match=r"features take about 6\.0 GB, and 5\.0 GB are free"):
        require_space(tmp_path / "not" / "there", 6_000_000_000, "features")
    assert asked == [tmp_path, tmp_path]
