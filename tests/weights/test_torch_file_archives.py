"""Hostile, damaged and foreign files are refused by name before anything in them is believed."""

import dataclasses
import io
import os
import random
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.hostile_files import OTHER_FILES
from tests.helpers.torch_files import (
    REFUSALS,
    SIX,
    Entry,
    everything,
    small_file,
    tensor,
    text,
    write_zip,
)
from vapi_jax.weights.torch_file import TorchFileError, archive, open_torch_file, storage_file

PICKLE = b"\x80\x02}" + text("w") + tensor() + b"s."
GOOD = [
    Entry("m/data.pkl", PICKLE),
    Entry("m/byteorder", b"little"),
    Entry("m/data/0", SIX.tobytes()),
    Entry("m/version", b"3\n"),
]


def altered(index: int, **changes) -> list[Entry]:
    entries = list(GOOD)
    entries[index] = dataclasses.replace(entries[index], **changes)
    return entries


BAD_ARCHIVES = {
    "compressed": (altered(2, method=8), "compressed"),
    "bomb": (
        altered(2, method=8, data=zlib.compress(b"\0" * 10**6), size=10**6, compressed_size=1000),
        "compressed"),
    "two sizes": (altered(2, compressed_size=12), "compressed"),
    "encrypted": (altered(2, flags=1), "encrypted"),
    "two top folders": (altered(2, name="n/data/0"), "plain name in the one folder"),
    "no folder": (altered(3, name="version"), "plain name in the one folder"),
    "parent folder": (altered(3, name="m/../version"), "plain name in the one folder"),
    "this folder": (altered(3, name="m/./version"), "plain name in the one folder"),
    "absolute": (altered(3, name="/m/version"), "plain name in the one folder"),
    "backslash": (altered(3, name="m/..\\version"), "plain name in the one folder"),
    "null byte": (altered(3, name="m/version\0.txt"), "plain name in the one folder"),
    "a folder": (altered(3, name="m/data/"), "plain name in the one folder"),
    "the same name twice": ([*GOOD, Entry("m/data/0", b"\1" * 24)], "two entries are named"),
    "the same bytes twice": (altered(3, offset=0, size=9, local_name="m/version"), "overlaps"),
    "an entry inside another": (altered(1, data=b"little" + b"\0" * 200, size=10**3), "runs past|over"),
    "past the end": (altered(3, size=2**40), "runs past the end"),
    "past the end, 64 bits": (altered(3, size=2**64 - 1), "runs past the end"),
    "offset past the end": (altered(3, offset=2**40), "lies outside"),
    "offset of 64 bits": (altered(3, offset=2**64 - 1), "lies outside"),
    "another local name": (altered(2, local_name="m/data/1"), "described differently"),
    "encrypted only in its place": (altered(2, local_flags=1), "described differently"),
    "compressed only in its place": (altered(2, local_method=8), "described differently"),
    "big endian": (altered(1, data=b"big"), "byte order is 'big'"),
    "unknown byte order": (altered(1, data=b"middle"), "byte order is 'middle'"),
    "long byte order": (altered(1, data=b"little" * 10), "at most 16 are read"),
    "no data.pkl": (GOOD[1:], "without data.pkl"),
    "data.pkl deeper": (altered(0, name="m/x/data.pkl"), "not at the top"),
    "TorchScript": ([*GOOD, Entry("m/constants.pkl", b"\x80\x02).")], "TorchScript"),
    "TorchScript code": ([*GOOD, Entry("m/code/__torch__.py", b"")], "TorchScript"),
    "empty archive": ([], "does not begin"),
    "large data.pkl": (
        altered(0, data=PICKLE, hole=16 * 2**20, crc=0), "data.pkl has .* at most 16777216 are read"),
    "damaged data.pkl": (altered(0, crc=1), "data.pkl is damaged"),
}  # fmt: skip


def test_the_archive_that_the_next_test_alters_is_good(tmp_path):
    path = write_zip(tmp_path / "good.pt", GOOD)
    with open_torch_file(path) as file:
        np.testing.assert_array_equal(file.value["w"].read(), SIX.reshape(2, 3))
    np.testing.assert_array_equal(torch.load(path)["w"], SIX.reshape(2, 3))


@pytest.mark.parametrize("kind", BAD_ARCHIVES)
def test_hostile_archives_are_refused(kind, tmp_path):
    entries, message = BAD_ARCHIVES[kind]
    path = write_zip(tmp_path / "bad.pt", entries)
    with pytest.raises(TorchFileError, match=message) as error:
        open_torch_file(path)
    assert str(error.value).startswith(str(path))


def test_the_number_of_entries_and_the_directory_are_bounded(tmp_path, monkeypatch):
    path = write_zip(tmp_path / "many.pt", GOOD)
    monkeypatch.setattr(archive, "MAX_ENTRIES", 3)
    with pytest.raises(TorchFileError, match="4.*3"):
        open_torch_file(path)
    monkeypatch.setattr(storage_file, "_MAX_DIRECTORY", 100)
    with pytest.raises(TorchFileError, match="it claims [0-9]+ bytes"):
        open_torch_file(path)


def script() -> bytes:
    class Twice(torch.nn.Module):
        def forward(self, x):
            return 2 * x

    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(Twice(), torch.ones(1)), buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", OTHER_FILES)
def test_other_files_are_named(kind, tmp_path):
    make, message = OTHER_FILES[kind]
    (tmp_path / "x.pt").write_bytes(make())
    with pytest.raises(TorchFileError, match=message):
        open_torch_file(tmp_path / "x.pt")


@pytest.mark.filterwarnings("ignore")
def test_a_torchscript_program_is_named(tmp_path):
    (tmp_path / "x.pt").write_bytes(script())
    with pytest.raises(TorchFileError, match="TorchScript"):
        open_torch_file(tmp_path / "x.pt")


def test_paths_that_are_no_files_are_refused(tmp_path):
    with pytest.raises(TorchFileError, match="No such file"):
        open_torch_file(tmp_path / "missing.pt")
    with pytest.raises(TorchFileError, match="not a regular file"):
        open_torch_file(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(TorchFileError, match="not a regular file"):
        open_torch_file(tmp_path / "pipe")


def test_every_truncation_is_refused(tmp_path):
    data = small_file(tmp_path / "good.pt").read_bytes()
    path = tmp_path / "cut.pt"
    for length in range(0, len(data), 11):
        path.write_bytes(data[:length])
        with pytest.raises(TorchFileError):
            open_torch_file(path)


def test_every_altered_byte_is_noticed_or_harmless(tmp_path):
    """The archive's checksums cover the pickle and the tensors; the rest must not mislead."""
    data = small_file(tmp_path / "good.pt").read_bytes()
    want = everything(tmp_path / "good.pt")
    path, refused, rng = tmp_path / "altered.pt", 0, random.Random(0)
    for position in range(0, len(data), 5):
        damaged = bytearray(data)
        damaged[position] ^= rng.randrange(1, 256)
        path.write_bytes(damaged)
        try:
            assert everything(path) == want
        except REFUSALS:
            refused += 1
    assert refused > 120


@settings(max_examples=100)
@given(st.binary(max_size=200), st.sampled_from([b"", b"PK\3\4", b"\x80\x02"]))
def test_arbitrary_bytes_are_refused(tmp_path_factory, data, prefix):
    path = tmp_path_factory.getbasetemp() / "noise.pt"
    path.write_bytes(prefix + data)
    with pytest.raises(REFUSALS):
        open_torch_file(path)
