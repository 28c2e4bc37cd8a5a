"""Hostile and damaged pickles in a sound archive: nothing is executed, nothing large is allocated."""

import contextlib
import pickle
import tracemalloc
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.hostile_files import BAD_TENSORS, BOMBS, attacks
from tests.helpers.torch_files import (
    CHECKPOINTS,
    REFUSALS,
    Entry,
    checkpoint,
    read_or_be_refused,
    text,
    write_zip,
)
from vapi_jax.weights.safe_pickle import PickleRefused
from vapi_jax.weights.torch_file import names, open_torch_file


@pytest.mark.parametrize("attack", attacks(Path()))
def test_nothing_in_the_pickle_is_executed(attack, tmp_path):
    trace = tmp_path / "was_here"
    stream, message = attacks(trace)[attack]
    path = checkpoint(tmp_path / "evil.pt", b"}", text("w"), stream, b"s", prefix=b"\x80\x04")
    with pytest.raises(PickleRefused) as error:
        open_torch_file(path)
    assert message in str(error.value) and "evil.pt" in str(error.value)
    assert "Nothing was executed" in str(error.value)
    assert not trace.exists()


def test_the_attacks_would_work_on_the_stock_unpickler(tmp_path):
    # So that the test above does not pass because its streams are nonsense.
    trace = tmp_path / "was_here"
    for attack in ("REDUCE", "INST", "STACK_GLOBAL", "eval"):
        pickle.loads(b"\x80\x04" + attacks(trace)[attack][0] + b".")
        assert trace.exists(), attack
        trace.unlink()


UNSUPPORTED = {
    "sparse": (lambda: torch.eye(3).to_sparse(), "sparse"),
    "quantized": (
        lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "quantized"),
    "meta": (lambda: torch.empty(3, device="meta"), "meta device"),
    "conjugate": (lambda: torch.ones(2, dtype=torch.complex64).conj(), "conjugate"),
    "expanded": (lambda: torch.ones(1).expand(1000), r"save its \.contiguous\(\) copy"),
    "complex number": (lambda: 1j, "__builtin__.complex"),
    "module": (lambda: torch.nn.Linear(2, 2), "Linear"),
    "float8": (lambda: torch.ones(2).to(torch.float8_e5m2), "Float8_e5m2Storage|float8_e5m2"),
    "date": (lambda: __import__("datetime").date(2024, 1, 1), "datetime.date"),
    "path": (lambda: Path("x"), "pathlib"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_what_torch_saves_and_we_do_not_read_is_refused_by_name(kind, tmp_path):
    make, message = UNSUPPORTED[kind]
    torch.save({"x": make()}, tmp_path / "x.pt")
    with pytest.raises(PickleRefused, match=message):
        open_torch_file(tmp_path / "x.pt")


@pytest.mark.parametrize("kind", BAD_TENSORS)
def test_a_tensor_outside_its_storage_is_refused(kind, tmp_path):
    stream, message = BAD_TENSORS[kind]
    path = checkpoint(tmp_path / "bad.pt", stream)
    tracemalloc.start()
    try:
        with pytest.raises(PickleRefused, match=message):
            open_torch_file(path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", BOMBS)
def test_small_streams_cannot_become_large_or_slow(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(names, "_MAX_ITEMS", 20_000)
    stream, message = BOMBS[kind]
    path = checkpoint(tmp_path / "bomb.pt", stream)
    tracemalloc.start()
    try:
        with pytest.raises(REFUSALS, match=message) as error:
            open_torch_file(path)
        assert tracemalloc.get_traced_memory()[1] < 100 * 2**20
    finally:
        tracemalloc.stop()
    assert len(str(error.value)) < 1000


@pytest.mark.filterwarnings("ignore::DeprecationWarning:pickletools")
@settings(max_examples=100)
@given(changes=st.lists(st.tuples(st.integers(0, 10**6), st.binary(max_size=4)), max_size=3))
def test_an_altered_pickle_with_a_right_checksum_is_read_or_refused(changes, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "altered.pt"
    torch.save(CHECKPOINTS["views of one storage"](), path)
    with zipfile.ZipFile(path) as archive:
        stream = bytearray(archive.read("altered/data.pkl"))
        data = archive.read("altered/data/0")
    for position, new in changes:
        position %= len(stream)
        stream[position : position + len(new)] = new
    write_zip(path, [Entry("a/data.pkl", bytes(stream)), Entry("a/data/0", data)])
    read_or_be_refused(path, len(data))


@pytest.mark.filterwarnings("ignore::DeprecationWarning:pickletools")
@settings(max_examples=100)
@given(st.binary(max_size=60))
def test_arbitrary_pickles_are_read_or_refused(tmp_path_factory, stream):
    path = tmp_path_factory.getbasetemp() / "stream.pt"
    write_zip(path, [Entry("a/data.pkl", b"\x80\x02" + stream + b".")])
    with contextlib.suppress(*REFUSALS):
        open_torch_file(path).close()
