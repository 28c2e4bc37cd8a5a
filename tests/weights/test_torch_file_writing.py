"""torch.load reads what is written, bit for bit, and so does the reader of this package."""

import argparse
import struct
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.helpers.torch_files import (
    DTYPES,
    SIX,
    Generated,
    assert_same,
    bits,
    module,
    trained,
)
from vapi_jax.weights.torch_file import (
    Record,
    TorchFileError,
    TorchTensor,
    open_torch_file,
    write_torch_file,
    writing,
)


def load_both(path: Path):
    """What torch.load makes of a file; the same with and without memory mapping."""
    plain = torch.load(path, weights_only=True)
    mapped = torch.load(path, weights_only=True, mmap=True)
    return plain, mapped


def offset_of(leaf: TorchTensor) -> int:
    """Where in the file the storage of a tensor begins."""
    return leaf._storage.source.entries[leaf._storage.name].offset


@pytest.mark.parametrize("name", DTYPES)
def test_torch_loads_every_dtype_that_is_written(name, tmp_path):
    dtype = np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
    raw = np.random.default_rng(0).integers(0, 256, (3, 5 * dtype.itemsize), np.uint8)
    array = (raw % 2 if name == "bool" else raw).view(dtype)
    write_torch_file(tmp_path / "m.pt", {"model": {"w": array, "n": array[0, 0, ...]}})
    for loaded in load_both(tmp_path / "m.pt"):
        for got, want in ((loaded["model"]["w"], array), (loaded["model"]["n"], array[0, 0])):
            assert got.dtype == DTYPES[name] and got.shape == want.shape
            assert got.is_contiguous() and not got.requires_grad and got.device.type == "cpu"
            assert bits(got) == want.tobytes()


def test_torch_loads_the_nesting_that_is_written(tmp_path):
    value = {
        "plain": [
            0,
            -1,
            2**31,
            -(2**63),
            2**1000,
            1.5,
            float("inf"),
            True,
            False,
            None,
            "é\n'\ud800",
        ],
        "nested": ({"a": [()], 3: ({}, [])}, [[1], (2,)]),
        "steps": 300_000,
    }
    write_torch_file(tmp_path / "m.pt", value)
    for loaded in load_both(tmp_path / "m.pt"):
        assert loaded == value
    with open_torch_file(tmp_path / "m.pt") as file:
        assert file.value == value


@pytest.mark.parametrize(
    "array",
    [
        np.arange(12.0).reshape(3, 4).T,
        np.arange(12.0)[::3],
        np.arange(6, dtype=">f4").reshape(2, 3),
        np.arange(6, dtype=">i8")[::-1],
        np.broadcast_to(np.float32(2), (3, 2)),
        np.zeros((0, 3), np.float32),
        np.zeros((2, 0, 4), np.int8),
        np.array(5, np.int64),
        np.ones((1,) * 20, np.float16),
    ],
    ids=["transposed", "steps", "big", "big reversed", "broadcast", "none", "none2", "0-d", "20-d"],
)
def test_any_memory_layout_is_written_contiguous_and_little_endian(array, tmp_path):
    write_torch_file(tmp_path / "m.pt", [array])
    for (got,) in load_both(tmp_path / "m.pt"):
        assert got.is_contiguous() and got.stride() == torch.zeros(array.shape).stride()
        np.testing.assert_array_equal(got.numpy(), array)


def test_arguments_are_written_for_torch(tmp_path):
    args = argparse.Namespace(lr=1e-4, name="GPT-B", sizes=[1, 2])
    write_torch_file(tmp_path / "m.pt", {"args": args})
    with torch.serialization.safe_globals([argparse.Namespace]):
        assert torch.load(tmp_path / "m.pt", weights_only=True) == {"args": args}
    with open_torch_file(tmp_path / "m.pt") as file:
        record = file.value["args"]
        assert record == Record("argparse.Namespace", vars(args))
        write_torch_file(tmp_path / "again.pt", {"args": record})
    assert torch.load(tmp_path / "again.pt", weights_only=False) == {"args": args}


def test_the_layout_is_that_of_the_releases(tmp_path):
    write_torch_file(tmp_path / "c2i_B_256.pt", {"model": {"w": SIX, "b": SIX[:1]}})
    with zipfile.ZipFile(tmp_path / "c2i_B_256.pt") as archive:
        assert archive.testzip() is None
        assert archive.namelist() == [
            f"c2i_B_256/{name}" for name in ("data.pkl", "byteorder", "data/0", "data/1", "version")
        ]
        assert archive.read("c2i_B_256/byteorder") == b"little"
        assert archive.read("c2i_B_256/version") == b"3\n"
        assert archive.read("c2i_B_256/data/0") == SIX.tobytes()
        for info in archive.infolist():
            assert info.compress_type == zipfile.ZIP_STORED
    with open_torch_file(tmp_path / "c2i_B_256.pt") as file:
        for leaf in file.value["model"].values():
            assert offset_of(leaf) % 64 == 0
    names = {"a.b.pt": "a.b", "ümläut.pt": "archive", "a b.pt": "archive", ".pt": "archive"}
    for name, stem in names.items():
        write_torch_file(tmp_path / name, SIX)
        assert zipfile.ZipFile(tmp_path / name).namelist()[0] == f"{stem}/data.pkl"
        assert torch.equal(torch.load(tmp_path / name), torch.from_numpy(SIX))


def test_the_pickle_is_a_golden(tmp_path):
    write_torch_file(tmp_path / "m.pt", {"w": SIX.reshape(2, 3)})
    with zipfile.ZipFile(tmp_path / "m.pt") as archive:
        assert archive.read("m/data.pkl") == (
            b"\x80\x02}(X\x01\0\0\0wctorch._utils\n_rebuild_tensor_v2\n("
            b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuJ\x06\0\0\0tQ"
            b"J\0\0\0\0(J\x02\0\0\0J\x03\0\0\0t(J\x03\0\0\0J\x01\0\0\0t\x89"
            b"ccollections\nOrderedDict\n)RtRu."
        )


def test_the_same_value_gives_the_same_file(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_torch_file(tmp_path / folder / "m.pt", {"w": SIX, "steps": 3})
    assert (tmp_path / "a/m.pt").read_bytes() == (tmp_path / "b/m.pt").read_bytes()


def test_large_entries_use_zip64(tmp_path, monkeypatch):
    # Four gigabytes are too much for a test: the limits are lowered instead.
    monkeypatch.setattr(writing, "_ZIP64_FROM", 20)
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 20)
    value = {"large": SIX, "small": SIX[:2], "last": SIX[1:]}
    write_torch_file(tmp_path / "m.pt", value)
    with zipfile.ZipFile(tmp_path / "m.pt") as archive:
        assert b"\x01\x00" in archive.getinfo("m/data/0").extra[:2]
        assert archive.testzip() is None
    with open_torch_file(tmp_path / "m.pt") as file:
        for loaded in load_both(tmp_path / "m.pt"):
            for name, want in value.items():
                assert offset_of(file.value[name]) % 64 == 0
                np.testing.assert_array_equal(file.value[name].read(), want)
                np.testing.assert_array_equal(loaded[name].numpy(), want)


def test_a_checkpoint_is_copied_tensor_by_tensor(tmp_path):
    model, _ = trained()
    torch.save({"model": model.state_dict()}, tmp_path / "a.pt")
    with open_torch_file(tmp_path / "a.pt") as file:
        write_torch_file(tmp_path / "b.pt", file.value)
        write_torch_file(tmp_path / "a.pt", file.value)  # over the open file
    for name in ("a.pt", "b.pt"):
        restored = module()
        restored.load_state_dict(torch.load(tmp_path / name, weights_only=True)["model"])
        for got, want in zip(restored.parameters(), model.parameters(), strict=True):
            assert torch.equal(got, want)


class Wrong(Generated):
    """Announces another array than it gives."""

    def read(self):
        return np.zeros(3, np.float32)


class Failing(Generated):
    """Cannot be read."""

    def read(self):
        raise OSError("the disk is gone")


def nested(depth):
    value = SIX
    for _ in range(depth):
        value = [value]
    return value


CYCLE: list = []
CYCLE.append(CYCLE)
UNWRITABLE = {
    "set": ({"a": [1, {2}]}, r"value\['a'\]\[1\]: set cannot be written"),
    "bytes": ([b"x"], r"value\[0\]: bytes cannot be written"),
    "numpy scalar": ({"n": np.int64(3)}, r"value\['n'\]: int64 cannot be written"),
    "complex": (1j, "value: complex cannot be written"),
    "object": ({"f": len}, "builtin_function_or_method cannot be written"),
    "other record": (Record("os.system", {"a": 1}), "value: Record cannot be written"),
    "objects": (np.array([None]), "dtype object cannot be written"),
    "text array": (np.array(["a"]), "dtype <U1 cannot be written"),
    "unsigned": (np.zeros(3, np.uint16), "dtype uint16 cannot be written; one of .*bfloat16"),
    "tuple as a key": ({(1, 2): 3}, "neither text nor a plain number"),
    "long key": ({2**65: 3}, "neither text nor a plain number"),
    "long number": ([2**2100], "int cannot be written"),
    "cycle": (CYCLE, "nested more than 100"),
    "deep": (nested(101), "nested more than 100"),
    "other array": (
        {"w": Wrong(0)},
        r"value\['w'\]: read\(\) gave float32\[3\] .* float32\[625000\]",
    ),
}


@pytest.mark.parametrize("kind", UNWRITABLE)
def test_what_cannot_be_written_is_refused_and_leaves_no_file(kind, tmp_path):
    value, message = UNWRITABLE[kind]
    (tmp_path / "m.pt").write_bytes(b"what was there")
    with pytest.raises(TorchFileError, match=message):
        write_torch_file(tmp_path / "m.pt", value)
    assert [p.name for p in tmp_path.iterdir()] == ["m.pt"]
    assert (tmp_path / "m.pt").read_bytes() == b"what was there"


def test_an_error_in_mid_write_leaves_the_old_file(tmp_path):
    write_torch_file(tmp_path / "m.pt", SIX)
    before = (tmp_path / "m.pt").read_bytes()
    with pytest.raises(OSError, match="the disk is gone"):
        write_torch_file(tmp_path / "m.pt", [SIX, Failing(0)])
    assert [p.name for p in tmp_path.iterdir()] == ["m.pt"]
    assert (tmp_path / "m.pt").read_bytes() == before


def test_more_than_can_be_read_again_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "MAX_ENTRIES", 6)
    write_torch_file(tmp_path / "m.pt", [SIX] * 3)
    with open_torch_file(tmp_path / "m.pt") as file:
        assert len(file.value) == 3
    with pytest.raises(TorchFileError, match="write several files"):
        write_torch_file(tmp_path / "m.pt", [SIX] * 4)
    write_torch_file(tmp_path / "deep.pt", nested(100))
    with open_torch_file(tmp_path / "deep.pt") as file:
        assert isinstance(file.value, list)


SCALARS = (
    st.none() | st.booleans() | st.integers(-(2**90), 2**90) | st.floats() | st.text(max_size=8)
)
ARRAYS = hnp.arrays(
    st.sampled_from([np.dtype(n) for n in ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u1", "?")]),
    hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
)
KEYS = st.text(max_size=6) | st.integers(-(2**62), 2**62)
VALUES = st.recursive(
    SCALARS | ARRAYS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=4)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3).map(
            lambda fields: Record("argparse.Namespace", fields)
        )
    ),
    max_leaves=12,
)


def assert_round_trip(got, want):
    if isinstance(want, np.ndarray):
        array = got.read()
        assert array.shape == want.shape and array.dtype == want.dtype
        assert array.tobytes() == want.tobytes()
    elif isinstance(want, Record):
        assert got.name == want.name
        assert_round_trip(got.fields, want.fields)
    elif isinstance(want, dict):
        assert list(got) == list(want)
        for key in want:
            assert_round_trip(got[key], want[key])
    elif isinstance(want, list | tuple):
        assert type(got) is type(want) and len(got) == len(want)
        for a, b in zip(got, want, strict=True):
            assert_round_trip(a, b)
    elif isinstance(want, float):
        assert struct.pack("<d", got) == struct.pack("<d", want)
    else:
        assert type(got) is type(want) and got == want


@settings(max_examples=80)
@given(VALUES)
def test_whatever_is_written_is_read_back(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "round.pt"
    write_torch_file(path, value)
    with open_torch_file(path) as file:
        assert_round_trip(file.value, value)


@settings(max_examples=40)
@given(st.lists(SCALARS | ARRAYS, max_size=5))
def test_whatever_is_written_torch_reads(tmp_path_factory, values):
    path = tmp_path_factory.getbasetemp() / "torch.pt"
    write_torch_file(path, values)
    with open_torch_file(path) as file:
        assert_same(file.value, torch.load(path, weights_only=True))
