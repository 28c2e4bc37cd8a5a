"""What people give for weights and is none, told by its bytes whatever its name."""

import bz2
import gzip
import io
import json
import lzma
import pickle
import tarfile

import numpy as np
import pytest
import torch
from safetensors.numpy import load, save

from vapi_jax.common.errors import ExpectedError
from vapi_jax.models.inception import load_inception
from vapi_jax.weights.names import WeightsError
from vapi_jax.weights.store import load_metadata, load_safetensors
from vapi_jax.weights.tensors import open_tensors

W = {"w": np.arange(6, dtype=np.float32)}
WHOLE = save(W)


def in_tar(mode):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        member = tarfile.TarInfo("w.safetensors")
        member.size = len(WHOLE)
        archive.addfile(member, io.BytesIO(WHOLE))
    return buffer.getvalue()


def legacy():
    buffer = io.BytesIO()
    torch.save({"w": torch.ones(2)}, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


OTHERS = {
    "pointer of LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs"),
    "web page": (b"<!DOCTYPE html><html>404</html>", "web page"),
    "web page after a mark": (b"\xef\xbb\xbf\n<html>", "web page"),
    "answer of a bucket": (b"<?xml version='1.0'?><Error>AccessDenied</Error>", "web page"),
    "answer of a server": (b'{"error": "Repository not found"}', "JSON"),
    "empty": (b"", "empty"),
    "gzip": (gzip.compress(WHOLE), "gunzip"),
    "tar": (in_tar("w"), "tar archive"),
    "tar.gz": (in_tar("w:gz"), "tar -xzf"),
    "bzip2": (bz2.compress(WHOLE), "bunzip2"),
    "xz": (lzma.compress(WHOLE), "unxz"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(60), "unzstd"),
    "7-Zip": (b"7z\xbc\xaf\x27\x1c" + bytes(60), "7-Zip"),
    "pickle": (pickle.dumps(W), "pickle"),
    "PyTorch before 1.6": (legacy(), r"before PyTorch 1\.6"),
    "array": (b"\x93NUMPY\x01\x00" + bytes(80), "NumPy"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(80), "HDF5"),
    "GGUF": (b"GGUF\x03" + bytes(80), "GGUF"),
}  # fmt: skip


@pytest.mark.parametrize("name", ["x.safetensors", "x.pt", "x.bin", "x", "x.SAFETENSORS"])
@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_something_else_is_told_by_its_bytes(tmp_path, kind, name):
    content, advice = OTHERS[kind]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=advice) as error, open_tensors(path):
        pass
    assert str(path) in str(error.value)
    for read in (load_safetensors, load_metadata):
        with pytest.raises(WeightsError, match=advice):
            read(path)


@pytest.mark.parametrize("kind", sorted(OTHERS.keys() - {"PyTorch before 1.6"}))
def test_other_readers_of_weights_tell_it_too(tmp_path, kind):
    content, advice = OTHERS[kind]
    for name in ("x.safetensors", "x.pth"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ExpectedError, match=advice):
            load_inception(tmp_path / name, any_weights=True)


@pytest.mark.parametrize("kept", [9, 40, len(WHOLE) - 1])
def test_a_download_that_did_not_finish_is_told(tmp_path, kept):
    path = tmp_path / "x.safetensors"
    path.write_bytes(WHOLE[:kept])
    with pytest.raises(WeightsError, match=f"{len(WHOLE) if kept > 80 else ''}.*has {kept}"):
        load_safetensors(path)


def test_a_header_that_lies_is_still_a_sentence(tmp_path):
    header = json.dumps({"w": {"dtype": "F32", "shape": [6], "data_offsets": "no"}}).encode()
    for content in (
        len(header).to_bytes(8, "little") + header,
        (2**62).to_bytes(8, "little") + b"{",
        (4).to_bytes(8, "little") + b"{" * 200_000,
    ):
        path = tmp_path / "x.safetensors"
        path.write_bytes(content)
        with pytest.raises(WeightsError, match=r"x\.safetensors"):
            load_safetensors(path)


def test_weights_are_known_by_their_bytes_not_by_their_name(tmp_path):
    (tmp_path / "a.pt").write_bytes(WHOLE)
    torch.save({"w": torch.arange(6.0)}, tmp_path / "b.safetensors")
    for name in ("a.pt", "b.safetensors"):
        with open_tensors(tmp_path / name) as file:
            np.testing.assert_array_equal(file.tensors["w"].read(), load(WHOLE)["w"])
