"""Checkpoints by torch.save are read bit for bit without torch, one tensor at a time."""

import argparse
import ast
import os
import time
import tracemalloc
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import commands
from tests.helpers.torch_files import (
    CHECKPOINTS,
    REFUSALS,
    SIX,
    Entry,
    Generated,
    assert_same,
    checkpoint,
    module,
    number,
    numbers,
    small_file,
    storage,
    tensor,
    text,
    training_checkpoint,
    write_zip,
)
from vapi_jax.weights import torch_file
from vapi_jax.weights.safe_pickle import NumpyDtype
from vapi_jax.weights.torch_file import (
    Record,
    TorchFileError,
    open_torch_file,
    reading,
    write_torch_file,
)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("layout", CHECKPOINTS)
def test_reads_what_torch_saves(layout, zipped, tmp_path):
    path = tmp_path / "model.pt"
    value = CHECKPOINTS[layout]()
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    # torch.load fails on unsigned numbers that torch.save wrote in the old format.
    unreadable = layout == "unsigned" and not zipped
    want = value if unreadable else torch.load(path, weights_only=False)
    with open_torch_file(path, legacy=not zipped) as file:
        assert_same(file.value, want)


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("layout", ["training", "views of one storage"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_reads_later_pickle_protocols(layout, protocol, zipped, tmp_path):
    path = tmp_path / "model.pt"
    saved = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": zipped}
    torch.save(CHECKPOINTS[layout](), path, **saved)
    with open_torch_file(path, legacy=not zipped) as file:
        assert_same(file.value, torch.load(path, weights_only=False))


@settings(max_examples=100)
@given(data=st.data(), zipped=st.booleans())
def test_every_strided_view_reads_as_torch_reads_it(data, zipped, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "view.pt"
    size = data.draw(st.integers(1, 40))
    base = torch.arange(size, dtype=torch.int16)
    shape = data.draw(st.lists(st.integers(0, 4), max_size=4))
    strides = [data.draw(st.integers(0, 12)) for _ in shape]
    reach = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if all(shape) else 0
    if reach >= size or np.prod(shape) > size:
        return
    offset = data.draw(st.integers(0, size - 1 - reach))
    view = base.as_strided(shape, strides, offset)
    torch.save(view, path, _use_new_zipfile_serialization=zipped)
    with open_torch_file(path, legacy=not zipped) as file:
        assert_same(file.value, view)


def test_a_handwritten_file_of_the_first_zip_layout_is_read(tmp_path):
    path = checkpoint(tmp_path / "old.pt", b"}", text("w"), tensor(), b"s")
    np.testing.assert_array_equal(torch.load(path)["w"].numpy(), SIX.reshape(2, 3))
    with open_torch_file(path) as file:
        assert file.path == path
        np.testing.assert_array_equal(file.value["w"].read(), SIX.reshape(2, 3))


def test_rebuild_functions_of_other_versions_are_read(tmp_path):
    plain = (
        b"ctorch._utils\n_rebuild_tensor\n("
        + storage()
        + number(2)
        + numbers((2, 2))
        + (numbers((2, 1)) + b"tR")
    )
    with_state = (
        b"ctorch._utils\n_rebuild_parameter_with_state\n(" + tensor() + b"\x88}}" + text("name")
        + text("x") + b"stR"
    )  # fmt: skip
    path = checkpoint(tmp_path / "old.pt", b"](", plain, with_state, tensor(more=b"}"), b"e")
    with open_torch_file(path) as file:
        first, second, third = (leaf.read() for leaf in file.value)
    np.testing.assert_array_equal(first, [[2, 3], [4, 5]])
    np.testing.assert_array_equal(second, SIX.reshape(2, 3))
    np.testing.assert_array_equal(third, SIX.reshape(2, 3))


def test_objects_are_inert_records(tmp_path):
    path = tmp_path / "args.pt"
    torch.save({"args": argparse.Namespace(lr=0.1, __reduce__="x"), "kind": np.dtype("f4")}, path)
    with open_torch_file(path) as file:
        assert file.value == {
            "args": Record("argparse.Namespace", {"lr": 0.1, "__reduce__": "x"}),
            "kind": NumpyDtype("f4", "<"),
        }


def test_only_the_tensor_asked_for_is_read_and_damage_in_it_is_found(tmp_path):
    path = write_zip(
        tmp_path / "m.pt",
        [
            Entry("m/data.pkl", b"\x80\x02]" + tensor() + b"a" + tensor(key="1") + b"a" + tensor(
                (2,), (1,), 4, key="1") + b"a."),
            Entry("m/data/0", SIX.tobytes()),
            Entry("m/data/1", SIX.tobytes(), crc=5),
        ],
    )  # fmt: skip
    with open_torch_file(path) as file:
        good, damaged, part = file.value
        np.testing.assert_array_equal(good.read(), SIX.reshape(2, 3))
        for leaf in (damaged, part):
            with pytest.raises(TorchFileError, match="data/1.*CRC-32"):
                leaf.read()


def test_files_without_checksums_are_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        small_file(tmp_path / "m.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    with zipfile.ZipFile(tmp_path / "m.pt") as archive, pytest.raises(zipfile.BadZipFile):
        archive.read("m/data/0")
    with open_torch_file(tmp_path / "m.pt") as file:
        assert_same(file.value, torch.load(tmp_path / "m.pt"))


def test_a_closed_or_shrunken_file_is_an_error(tmp_path):
    path = small_file(tmp_path / "m.pt")
    with open_torch_file(path) as file:
        os.truncate(path, 700)
        with pytest.raises(TorchFileError, match="changed while it was open"):
            file.value["model"]["w"].read()
    with pytest.raises(TorchFileError, match="before their file is closed"):
        file.value["model"]["w"].read()


def test_a_refused_file_is_closed(tmp_path, monkeypatch):
    files = []
    original = reading.File

    def remember(path):
        files.append(original(path))
        return files[-1]

    monkeypatch.setattr(reading, "File", remember)
    for path in (checkpoint(tmp_path / "x.pt", b"cos\nsystem\n"), checkpoint(tmp_path / "y.pt")):
        with pytest.raises(REFUSALS):
            open_torch_file(path)
    assert len(files) == 2 and all(file.closed for file in files)


def test_threads_may_read_one_file(tmp_path, monkeypatch):
    class Slow(reading.File):
        """Gives other threads time between seeking and reading."""

        def seek(self, *to):
            place = super().seek(*to)
            time.sleep(1e-4)
            return place

    monkeypatch.setattr(reading, "File", Slow)
    tensors = {str(i): torch.full((50_000,), i, dtype=torch.int32)[::2] for i in range(8)}
    torch.save(tensors, tmp_path / "m.pt")
    with open_torch_file(tmp_path / "m.pt") as file, ThreadPoolExecutor(8) as pool:

        def read(key):
            return all((file.value[key].read() == int(key)).all() for _ in range(5))

        # An error in a thread is raised here.
        assert all(pool.map(read, tensors))


def test_one_tensor_at_a_time_is_in_memory(tmp_path):
    path, size = tmp_path / "large.pt", 2_500_000
    tracemalloc.start()
    try:
        write_torch_file(path, {"model": {str(i): Generated(i) for i in range(20)}})
        written = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        with open_torch_file(path) as file:
            for key, leaf in file.value["model"].items():
                assert leaf.read()[-1] == float(key)
        read = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert path.stat().st_size > 20 * size
    assert written < 2.5 * size and read < 2.5 * size


@pytest.mark.parametrize("step", [1, 2])
def test_a_small_view_of_a_large_storage_takes_little_memory(step, tmp_path):
    base = torch.arange(5_000_000, dtype=torch.int32)
    torch.save(base[4_000_000:4_000_010:step], tmp_path / "view.pt")
    tracemalloc.start()
    try:
        with open_torch_file(tmp_path / "view.pt") as file:
            want = np.arange(4_000_000, 4_000_010, step)
            np.testing.assert_array_equal(file.value.read(), want)
        assert tracemalloc.get_traced_memory()[1] < 3 * 2**20
    finally:
        tracemalloc.stop()


def test_the_stride_of_a_single_row_means_nothing(tmp_path):
    path = checkpoint(tmp_path / "m.pt", tensor((1, 6), (2**63 - 1, 1)))
    with open_torch_file(path) as file:
        np.testing.assert_array_equal(file.value.read(), [SIX])


def test_the_largest_empty_shape_that_is_accepted_can_be_read(tmp_path):
    shape = (0, 2**30, 2**29)
    path = checkpoint(tmp_path / "m.pt", tensor(shape, (0, 0, 0)))
    with open_torch_file(path) as file:
        assert file.value.read().shape == shape


def test_a_file_of_more_than_four_gigabytes_is_read(tmp_path):
    stream = b"\x80\x02]" + tensor((1,), (1,), 2**30 + 5, key="0", count=2**30 + 100) + b"a"
    path = write_zip(
        tmp_path / "large.pt",  # a hole: it takes no room on disk
        [
            Entry("m/data.pkl", stream + tensor(key="1") + b"a."),
            Entry("m/data/0", b"", hole=4 * (2**30 + 100), crc=0),
            Entry("m/data/1", SIX.tobytes()),
        ],
    )
    assert path.stat().st_size > 2**32
    with open_torch_file(path) as file:
        assert file.value[0].shape == (1,)
        np.testing.assert_array_equal(file.value[1].read(), SIX.reshape(2, 3))
    path.unlink()


def test_the_modules_import_neither_torch_nor_an_unpickler():
    folder = Path(torch_file.__file__).parent
    paths = [*folder.glob("*.py"), folder.parent / "safe_pickle.py"]
    assert len(paths) == 9
    for path in paths:
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add((node.module or "").split(".")[0])
        assert not names & {"torch", "pickle", "_pickle", "marshal", "shelve", "importlib"}


def test_reading_needs_neither_torch_nor_pickle_nor_jax(tmp_path):
    path = tmp_path / "m.pt"
    torch.save({**training_checkpoint()}, path)
    program = """
import pickle, sys, _pickle
def refuse(*_, **__):
    raise AssertionError("unpickled")
for module in (pickle, _pickle):
    for name in ("load", "loads", "Unpickler"):
        setattr(module, name, refuse)
from vapi_jax.weights.torch_file import open_torch_file, write_torch_file
with open_torch_file(sys.argv[1]) as file:
    write_torch_file(sys.argv[1] + "2", {"model": file.value["model"], "args": file.value["args"]})
assert not {"torch", "jax"} & set(sys.modules), "imported"
print(len(file.value["model"]))
"""
    done = commands.python("-c", program, path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(len(module().state_dict()))
    assert Path(f"{path}2").exists()
