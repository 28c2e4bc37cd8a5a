"""Streams from .npz files, also from files made to do harm."""

import io
import tracemalloc
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vapi_jax.common.npz import NpzError, array_names, open_array, open_npz, read_array


def read(path, name="x", limit=2**30):
    with open_npz(path) as archive:
        return read_array(archive, name, limit)


def npy(array, **changes):
    """The bytes of a .npy file whose header was tampered with."""
    file = io.BytesIO()
    descr = np.lib.format.dtype_to_descr(array.dtype)
    header = {"descr": descr, "fortran_order": False, "shape": array.shape, **changes}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + array.tobytes()


def archive_of(path, data, name="x.npy", compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(name, data)
    return path


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("shape", [(7,), (7, 2, 3), (1, 5), (0, 4)])
def test_arrays_come_back_whole_and_in_pieces(tmp_path, save, shape):
    array = np.random.default_rng(0).normal(size=shape)
    save(tmp_path / "a.npz", x=array, y=np.arange(3))
    np.testing.assert_array_equal(read(tmp_path / "a.npz"), array)
    with open_npz(tmp_path / "a.npz") as archive:
        assert array_names(archive) == {"x", "y"}
        with open_array(archive, "x") as stream:
            assert (stream.shape, stream.dtype) == (shape, array.dtype)
            parts = [stream.read(min(2, shape[0] - i)) for i in range(0, shape[0], 2)]
    np.testing.assert_array_equal(np.concatenate([np.empty((0, *shape[1:])), *parts]), array)


def test_a_large_array_is_never_in_memory(tmp_path):
    array = np.zeros((4000, 64, 64), np.uint8)
    np.savez(tmp_path / "a.npz", x=array)
    tracemalloc.start()
    try:
        with open_npz(tmp_path / "a.npz") as archive, open_array(archive, "x") as stream:
            for _ in range(40):
                stream.read(100)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < array.nbytes / 10


def test_a_header_that_claims_terabytes_allocates_nothing(tmp_path):
    path = archive_of(tmp_path / "a.npz", npy(np.zeros(4), shape=(10**6, 10**6)))
    tracemalloc.start()
    try:
        with pytest.raises(NpzError, match="8000000000000.*32"):
            read(path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_a_compressed_bomb_is_not_unpacked(tmp_path):
    data = npy(np.zeros(2**22, np.uint8))
    path = archive_of(tmp_path / "a.npz", data, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 2**14
    with pytest.raises(NpzError, match="1000"):
        read(path, limit=1000)


class Boom:
    def __reduce__(self):
        return exec, ("raise SystemExit('a pickle was run')",)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (npy(np.zeros(4), shape=(-2, -2)), "shape (-2, -2)"),
        (npy(np.zeros((2, 2)), fortran_order=True), "Fortran"),
        (npy(np.zeros(1), shape=()), "at least one axis"),
        (npy(np.zeros(4), shape=(5,)), "wants 40 bytes, it has 32"),
        (npy(np.zeros(4), shape=(3,)), "wants 24 bytes, it has 32"),
        (npy(np.zeros(4), shape="four"), "cannot be read"),
        (npy(np.zeros(4), descr="nonsense"), "cannot be read"),
        (b"\x93NUMPY\x03\x00" + npy(np.zeros(4))[8:], "version (3, 0)"),
        (b"not an array", "cannot be read"),
        (b"", "cannot be read"),
    ],
)
def test_headers_that_lie_are_refused(tmp_path, data, message):
    path = archive_of(tmp_path / "a.npz", data)
    with pytest.raises(NpzError) as caught:
        read(path)
    assert message in str(caught.value) and str(path) in str(caught.value)


def test_pickles_are_never_run(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.array([Boom()], dtype=object), allow_pickle=True)
    with pytest.raises(NpzError, match="Python objects"):
        read(tmp_path / "a.npz")


def test_files_that_are_no_npz_are_named(tmp_path):
    with pytest.raises(NpzError, match="there is no file"):
        read(tmp_path / "absent.npz")
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(NpzError, match="text.npz"):
        read(tmp_path / "text.npz")
    np.savez(tmp_path / "a.npz", y=np.zeros(2), z=np.zeros(2))
    with pytest.raises(NpzError, match="'x'.*y, z"):
        read(tmp_path / "a.npz")
    with pytest.raises(NpzError, match="cannot be read"):
        read(tmp_path)


@settings(max_examples=150)
@given(position=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255), cut=st.booleans())
def test_damage_anywhere_is_noticed_or_harmless(tmp_path_factory, position, value, cut):
    array = np.arange(600, dtype=np.uint8).reshape(50, 12)
    path = tmp_path_factory.getbasetemp() / "damaged.npz"
    np.savez(path, x=array)
    data = bytearray(path.read_bytes())
    place = int(position * len(data))
    if cut:
        del data[place:]
    else:
        data[place] = value
    path.write_bytes(data)
    try:
        found = read(path)
    except NpzError:
        return
    # The checksum covers header and data; a byte that stands for itself or for a date may differ.
    np.testing.assert_array_equal(found, array)
