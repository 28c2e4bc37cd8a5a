"""Files from before PyTorch 1.6: read as torch.load reads them, refused when anything in them lies."""

import os
import pickle
import random
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.hostile_files import BAD_TENSORS, BOMBS, OTHER_FILES, attacks
from tests.helpers.torch_files import (
    CHECKPOINTS,
    REFUSALS,
    SIX,
    SIX_BYTES,
    assert_same,
    bits,
    everything,
    read_or_be_refused,
    tensor,
    text,
)
from vapi_jax.weights.safe_pickle import PickleRefused
from vapi_jax.weights.torch_file import TorchFileError, legacy, names, open_torch_file

MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."
PROTOCOL = b"\x80\x02M\xe9\x03."
MACHINE = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4}}


def stored(data=SIX_BYTES, count=6) -> bytes:
    """One storage: the number of its elements, then the elements."""
    return struct.pack("<q", count) + data


STORED = stored()


def write_legacy(
    path: Path, stream: bytes, *, keys=("0",), storages=STORED, magic=MAGIC, protocol=PROTOCOL,
    machine=MACHINE, prefix=b"\x80\x02",
) -> Path:  # fmt: skip
    """A file of hand-written parts; `stream` describes storages in five parts, as zip files do."""
    stream = prefix + stream.replace(b"tQ", b"NtQ") + b"."
    rest = (machine, keys if isinstance(keys, str | int) else list(keys))
    machine_data, keys_data = (pickle.dumps(part, protocol=2) for part in rest)
    path.write_bytes(magic + protocol + machine_data + stream + keys_data + storages)
    return path


def save_legacy(value, path: Path) -> bytes:
    torch.save(value, path, _use_new_zipfile_serialization=False)
    return path.read_bytes()


def open_legacy(path: Path):
    return open_torch_file(path, legacy=True)


def small_value():
    grid = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    return {"model": {"w": grid, "t": grid.T, "n": torch.tensor(3)}, "steps": 5}


def test_the_handwritten_file_that_other_tests_alter_is_what_torch_writes_and_reads(tmp_path):
    path = write_legacy(tmp_path / "good.pt", b"}" + text("w") + tensor() + b"s")
    np.testing.assert_array_equal(torch.load(path)["w"].numpy(), SIX.reshape(2, 3))
    with open_legacy(path) as file:
        assert file.path == path
        np.testing.assert_array_equal(file.value["w"].read(), SIX.reshape(2, 3))
    assert save_legacy({}, tmp_path / "torch.pt").startswith(MAGIC + PROTOCOL)


def test_a_file_in_the_old_format_is_read_only_on_request(tmp_path):
    save_legacy(small_value(), tmp_path / "old.pt")
    with pytest.raises(TorchFileError, match=r"PyTorch 1\.6.*re-save"):
        open_torch_file(tmp_path / "old.pt")
    with open_legacy(tmp_path / "old.pt") as file:
        assert_same(file.value, small_value())


def test_on_request_a_zip_archive_is_read_as_ever(tmp_path):
    torch.save(small_value(), tmp_path / "new.pt")
    with open_legacy(tmp_path / "new.pt") as file:
        assert_same(file.value, small_value())


@pytest.mark.parametrize("kind", sorted(OTHER_FILES.keys() - {"legacy"}))
def test_other_formats_are_named_on_request_too(kind, tmp_path):
    make, message = OTHER_FILES[kind]
    (tmp_path / "x.pt").write_bytes(make())
    with pytest.raises(TorchFileError, match=message):
        open_legacy(tmp_path / "x.pt")


def test_storages_lie_in_the_order_of_the_list_not_of_the_object(tmp_path):
    stream = b"]" + tensor(key="7") + b"a" + tensor(key="12345678901234567890") + b"a"
    reverse = stored((SIX + 10).tobytes()) + stored()
    path = write_legacy(
        tmp_path / "m.pt", stream, keys=("12345678901234567890", "7"), storages=reverse
    )
    with open_legacy(path) as file:
        first, second = file.value
        np.testing.assert_array_equal(second.read(), SIX.reshape(2, 3) + 10)
        np.testing.assert_array_equal(first.read(), SIX.reshape(2, 3))


def test_pickles_longer_than_the_first_look_are_read(tmp_path):
    value = {f"layer.{i}": torch.full((2,), i) for i in range(1000)}
    data = save_legacy(value, tmp_path / "m.pt")
    storages = 1000 * (8 + 2 * 8)
    assert len(data) - storages > legacy._FIRST_LOOK
    with open_legacy(tmp_path / "m.pt") as file:
        assert_same(file.value, value)


# ---- Hostile and damaged files ----


@pytest.mark.parametrize("attack", attacks(Path()))
def test_nothing_in_the_pickle_is_executed(attack, tmp_path):
    trace = tmp_path / "was_here"
    stream, message = attacks(trace)[attack]
    stream = b"}" + text("w") + stream + b"s"
    path = write_legacy(tmp_path / "evil.pt", stream, prefix=b"\x80\x04")
    with pytest.raises(PickleRefused) as error:
        open_legacy(path)
    assert message in str(error.value) and "evil.pt (saved object)" in str(error.value)
    assert not trace.exists()


@pytest.mark.parametrize("part", ["protocol", "machine", "storage keys"])
@pytest.mark.parametrize("name", ["posix.system", "collections.OrderedDict"])
def test_no_other_pickle_may_name_anything(part, name, tmp_path):
    trace = tmp_path / "was_here"
    call = "\n".join(["c" + name.split(".")[0], name.split(".")[1], "("]).encode()
    parts = {
        "magic number": MAGIC,
        "protocol": PROTOCOL,
        "machine": pickle.dumps(MACHINE, 2),
        "saved object": b"\x80\x02N.",
        "storage keys": b"\x80\x02].",
    }
    parts[part] = b"\x80\x02" + call + text(f"touch {trace}") + b"tR."
    (tmp_path / "evil.pt").write_bytes(b"".join(parts.values()))
    with pytest.raises(PickleRefused, match=rf"evil.pt.*{part}.*{name}'"):
        open_legacy(tmp_path / "evil.pt")
    assert not trace.exists()


# Where there is no archive, the bounds are those of the file, and the layout shows what lies.
OTHERWISE = {
    "storage larger than its entry": "ends within storage 0",
    "storage of wider elements": "ends within storage 0",
    "storage of 2**62 elements": "claims more than the [0-9]+ bytes",
    "storage of negative size": "claims more than the [0-9]+ bytes",
    "missing entry": "does not name those of the saved object",
}


@pytest.mark.parametrize("kind", BAD_TENSORS)
def test_a_tensor_outside_its_storage_is_refused(kind, tmp_path):
    stream, message = BAD_TENSORS[kind]
    path = write_legacy(tmp_path / "bad.pt", stream)
    tracemalloc.start()
    try:
        with pytest.raises(REFUSALS, match=OTHERWISE.get(kind, message)):
            open_legacy(path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", ["shared tuples", "deep", "cyclic", "claimed length", "long name"])
def test_small_streams_cannot_become_large_or_slow(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(names, "_MAX_ITEMS", 20_000)
    stream, message = BOMBS[kind]
    path = write_legacy(tmp_path / "bomb.pt", stream)
    with pytest.raises(REFUSALS, match=f"{message}|pickle") as error:
        open_legacy(path)
    assert len(str(error.value)) < 1000


W = b"}" + text("w") + tensor() + b"s"
BAD_FILES = {
    "wrong magic number": ({"magic": MAGIC[:-2] + b"\x18."}, "magic number or protocol is not"),
    "wider magic number": (
        {"magic": MAGIC.replace(b"\x8a\x0a", b"\x8a\x0b").replace(b"\x19.", b"\x19\x01.")},
        "magic number or protocol is not"),
    "protocol 1002": ({"protocol": PROTOCOL.replace(b"\xe9", b"\xea")}, "protocol is not"),
    "protocol of text": ({"protocol": b"\x80\x02" + text("1001") + b"."}, "protocol is not"),
    "big endian": ({"machine": {**MACHINE, "little_endian": False}}, "little-endian machine"),
    "no byte order": ({"machine": {}}, "little-endian machine"),
    "byte order of a number": ({"machine": {"little_endian": 1}}, "little-endian machine"),
    "machine of a list": ({"machine": [True]}, "little-endian machine"),
    "key listed twice": ({"keys": "00", "storages": stored() * 2}, "not a list of texts"),
    "key twice in the list": (
        {"keys": ("0", "0"), "storages": stored() * 2}, "does not name those"),
    "key missing": ({"keys": (), "storages": b""}, "does not name those"),
    "key of another": ({"keys": ("1",)}, "does not name those"),
    "one key more": ({"keys": ("0", "1"), "storages": stored() * 2}, "does not name those"),
    "key of a number": ({"keys": (0,)}, "not a list of texts"),
    "key of a list": ({"keys": (["0"],)}, "not a list of texts"),
    "keys of a number": ({"keys": 0}, "not a list of texts"),
    "too few elements": ({"storages": stored(count=5)}, "has 5 elements, 6 in the saved object"),
    "too many elements": ({"storages": stored(count=7)}, "has 7 elements, 6 in the saved object"),
    "negative count": ({"storages": stored(count=-6)}, "elements, 6 in the saved object"),
    "large count": ({"storages": stored(count=2**62)}, "has 4611686018427387904 elements"),
    "no storage": ({"storages": b""}, "ends within storage 0"),
    "half a count": ({"storages": stored()[:5]}, "ends within storage 0"),
    "one byte short": ({"storages": stored()[:-1]}, "ends within storage 0"),
    "one byte more": ({"storages": stored() + b"\0"}, "1 bytes follow its last storage"),
    "one storage more": ({"storages": stored() * 2}, "32 bytes follow its last storage"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_FILES)
def test_files_whose_parts_contradict_each_other_are_refused(kind, tmp_path):
    parts, message = BAD_FILES[kind]
    path = write_legacy(tmp_path / "bad.pt", W, **parts)
    with pytest.raises(TorchFileError, match=message) as error:
        open_legacy(path)
    assert str(error.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    "sixth, message",
    [
        (b"", "six parts"),
        (b"NN", "six parts"),
        (b"(" + text("1") + b"K\x00K\x06t", "view of another"),
        (b"}", "view of another"),
    ],
    ids=["five parts", "seven parts", "a view", "a dictionary"],
)
def test_a_reference_must_have_six_parts_and_no_view(sixth, message, tmp_path):
    data = write_legacy(tmp_path / "m.pt", W).read_bytes()
    assert data.count(b"NtQ") == 1
    (tmp_path / "m.pt").write_bytes(data.replace(b"NtQ", sixth + b"tQ"))
    with pytest.raises(PickleRefused, match=message):
        open_legacy(tmp_path / "m.pt")


def test_the_number_of_storages_and_the_pickles_are_bounded(tmp_path, monkeypatch):
    save_legacy([torch.ones(1) for _ in range(4)], tmp_path / "many.pt")
    monkeypatch.setattr(legacy, "MAX_ENTRIES", 3)
    with pytest.raises(TorchFileError, match="4.*3"):
        open_legacy(tmp_path / "many.pt")
    monkeypatch.undo()
    save_legacy({"text": "x" * 70_000}, tmp_path / "long.pt")
    open_legacy(tmp_path / "long.pt").close()
    monkeypatch.setattr(legacy, "MAX_PICKLE", legacy._FIRST_LOOK)
    with pytest.raises(TorchFileError, match="65536"):
        open_legacy(tmp_path / "long.pt")


def test_every_truncation_and_every_addition_is_refused(tmp_path):
    data = save_legacy(small_value(), tmp_path / "good.pt")
    path = tmp_path / "cut.pt"
    for length in range(0, len(data), 3):
        path.write_bytes(data[:length])
        with pytest.raises(REFUSALS):
            open_legacy(path)
    for tail in (b"\0", b"PK\3\4", data):
        path.write_bytes(data + tail)
        with pytest.raises(TorchFileError, match="bytes follow its last storage"):
            open_legacy(path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:pickletools")
def test_an_altered_byte_changes_numbers_alone_or_is_refused(tmp_path):
    """There are no checksums: what torch.load reads of such a file is the measure."""
    value = small_value()
    data = save_legacy(value, tmp_path / "good.pt")
    path, rng = tmp_path / "altered.pt", random.Random(0)
    storages = len(data) - (8 + 12 * 4) - (8 + 8)
    counts = elements = 0
    for position in [*range(0, storages, 4), *range(storages, len(data))]:
        damaged = bytearray(data)
        damaged[position] ^= rng.randrange(1, 256)
        path.write_bytes(damaged)
        try:
            got = everything(path, legacy=True)
        except REFUSALS:
            counts += position >= storages
            continue
        if position < storages:
            continue  # another name or number in the pickle: allowed, if it fits
        elements += 1
        want = torch.load(path, weights_only=True)
        for name, leaf in want["model"].items():
            assert got["model"][name][2] == bits(leaf), (position, name)
    assert (counts, elements) == (2 * 8, 12 * 4 + 8)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:pickletools")
@settings(max_examples=100)
@given(changes=st.lists(st.tuples(st.integers(0, 10**6), st.binary(max_size=4)), max_size=3))
def test_an_altered_file_is_read_within_its_bounds_or_refused(changes, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "altered_legacy.pt"
    data = bytearray(save_legacy(CHECKPOINTS["views of one storage"](), path))
    for position, new in changes:
        position %= len(data)
        data[position : position + len(new)] = new
    path.write_bytes(data)
    read_or_be_refused(path, len(data), legacy=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:pickletools")
@settings(max_examples=100)
@given(st.binary(max_size=100), st.booleans())
def test_arbitrary_bytes_behind_a_good_beginning_are_refused(tmp_path_factory, data, machine):
    path = tmp_path_factory.getbasetemp() / "noise_legacy.pt"
    path.write_bytes(MAGIC + PROTOCOL + pickle.dumps(MACHINE, 2) * machine + data)
    with pytest.raises(REFUSALS):
        open_legacy(path)


# ---- Laziness ----


def test_a_small_view_of_a_large_storage_takes_little_memory(tmp_path):
    save_legacy(torch.arange(2_000_000)[1_000_000:1_000_020:2], tmp_path / "view.pt")
    tracemalloc.start()
    try:
        with open_legacy(tmp_path / "view.pt") as file:
            np.testing.assert_array_equal(file.value.read(), range(1_000_000, 1_000_020, 2))
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_opening_reads_the_pickles_and_counts_alone(tmp_path, monkeypatch):
    save_legacy([torch.zeros(1_000_000), torch.zeros(1_000_000)], tmp_path / "m.pt")
    total = 0
    original = legacy.StorageFile.fill

    def counting(self, buffer, offset):
        nonlocal total
        got = original(self, buffer, offset)
        total += got
        return got

    monkeypatch.setattr(legacy.StorageFile, "fill", counting)
    with open_legacy(tmp_path / "m.pt") as file:
        assert total <= legacy._FIRST_LOOK + 2 * 8 + 512
        file.value[1].read()
    assert 4_000_000 < total < 4_100_000


def test_a_closed_or_shrunken_file_is_an_error(tmp_path):
    data = save_legacy(small_value(), tmp_path / "m.pt")
    with open_legacy(tmp_path / "m.pt") as file:
        os.truncate(tmp_path / "m.pt", len(data) - 72)
        for name in ("w", "t", "n"):
            with pytest.raises(TorchFileError, match="changed while it was open"):
                file.value["model"][name].read()
    with pytest.raises(TorchFileError, match="before their file is closed"):
        file.value["model"]["w"].read()
