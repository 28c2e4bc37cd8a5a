"""Checkpoints by torch.save are read bit for bit without torch, and torch.load reads what is written.

Everything hostile or damaged is refused before anything is executed or allocated.
"""

import argparse
import ast
import contextlib
import dataclasses
import io
import os
import pickle
import random
import struct
import subprocess
import sys
import threading
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from vapi_jax import torch_file
from vapi_jax.safe_pickle import GlobalName, NumpyDtype, PickleRefused
from vapi_jax.torch_file import (
    Record,
    TorchFileError,
    TorchTensor,
    open_torch_file,
    write_torch_file,
)

REFUSALS = (TorchFileError, PickleRefused)
DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
    "complex64": torch.complex64,
    "complex128": torch.complex128,
}
UNTYPED = {name: getattr(torch, name) for name in ("uint16", "uint32", "uint64")}


def bits(tensor: torch.Tensor) -> bytes:
    """The elements of a tensor in C order, as torch sees them."""
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.detach().reshape(-1))
    return flat.view(torch.uint8).numpy().tobytes()


def assert_same(got, want, where="value"):
    """What was read equals what torch.load gives, tensors bit for bit."""
    if isinstance(want, torch.Tensor):
        assert type(got) is TorchTensor, where
        array = got.read()
        assert array.shape == got.shape == tuple(want.shape), where
        assert array.dtype == got.dtype and got.dtype.name == str(want.dtype)[6:], where
        assert array.flags.c_contiguous and array.flags.owndata, where
        assert got.nbytes == array.nbytes, where
        assert array.tobytes() == bits(want), where
    elif isinstance(want, argparse.Namespace):
        assert type(got) is Record and got.name == "argparse.Namespace", where
        assert_same(got.fields, vars(want), where)
    elif isinstance(want, dict):
        assert type(got) is dict and list(got) == list(want), where
        for key in want:
            assert_same(got[key], want[key], f"{where}[{key!r}]")
    elif isinstance(want, torch.Size):
        assert got == tuple(want), where
    elif isinstance(want, list | tuple):
        assert type(got) is type(want) and len(got) == len(want), where
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            assert_same(a, b, f"{where}[{i}]")
    elif isinstance(want, torch.device):
        assert got == str(want), where
    elif isinstance(want, torch.dtype):
        assert got == GlobalName(str(want)), where
    elif isinstance(want, np.ndarray):
        assert got.dtype == want.dtype, where
        np.testing.assert_array_equal(got, want)
    else:
        assert type(got) is type(want), where
        assert got == want or (got != got and want != want), where


def module() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten(), torch.nn.Linear(4, 2)
    )


def trained() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = module()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95))
    model(torch.randn(2, 3, 3, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


def training_checkpoint():
    model, optimizer = trained()
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "steps": 300_000,
        "args": argparse.Namespace(
            lr=1e-4, betas=(0.9, 0.95), gpt_model="GPT-B", ema=False, path=None, ids=[1, -(2**40)]
        ),
        "loss": np.float64(2.5),
        "best": np.float32(0.1),
        "epoch": np.int64(7),
        "done": np.bool_(True),
    }


def views():
    base = torch.arange(24, dtype=torch.float32)
    grid = base.reshape(4, 6)
    return {
        "whole": grid,
        "transposed": grid.T,
        "column": grid[:, 2],
        "rows": grid[1:3],
        "steps": grid[::2, 1::3],
        "permuted": base.reshape(2, 3, 4).permute(2, 0, 1),
        "windows": base.as_strided((3, 4), (2, 1), 5),
        "repeated": base.as_strided((2, 3), (0, 1), 4),
        "odd stride of one element": base.as_strided((1, 3), (10**12, 1), 0),
        "last": base[-1:],
        "number": base[7],
        "nothing": base[5:5],
        "nothing, beyond the end": torch.zeros(2, 3)[2:, 3:],
    }


CHECKPOINTS = {
    "release layout": lambda: {"model": module().state_dict()},
    "bare state dict": lambda: module().state_dict(),
    "module and ema": lambda: {"module": module().state_dict(), "ema": module().state_dict()},
    "training": training_checkpoint,
    "parameters": lambda: dict(module().named_parameters()),
    "views of one storage": views,
    "every dtype": lambda: {k: torch.tensor([0, 1, 2]).to(d) for k, d in DTYPES.items()},
    "unsigned": lambda: {k: torch.arange(6).to(d)[1::2] for k, d in UNTYPED.items()},
    "numbers": lambda: [torch.tensor(3.5), torch.tensor(4), torch.zeros(0, 3), torch.zeros(2, 0)],
    "one tensor": lambda: torch.eye(3),
    "special values": lambda: torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
    "plain": lambda: {
        "text": "é\ud800\n",
        "numbers": [0, -1, 255, 2**31, -(2**31), 2**63, -(2**100), 1.5, float("inf"), float("nan")],
        3: (None, True, False, (), (1,), (1, 2, 3, 4)),
        "bytes": b"ab\xff",
        "no bytes": b"",
        "set": {1, "two"},
        "size": torch.Size([1, 2]),
        "device": [torch.device("cpu"), torch.device("cuda", 1)],
        "dtype": [torch.bfloat16, torch.float32],
        "array": np.arange(6, dtype=np.uint32).reshape(2, 3),
        "larger array": np.zeros(5000, np.uint8),
    },
}


@pytest.mark.parametrize("layout", CHECKPOINTS)
def test_reads_what_torch_saves(layout, tmp_path):
    path = tmp_path / "model.pt"
    torch.save(CHECKPOINTS[layout](), path)
    want = torch.load(path, weights_only=False)
    with open_torch_file(path) as file:
        assert_same(file.value, want)


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("layout", ["training", "views of one storage"])
def test_reads_later_pickle_protocols(layout, protocol, tmp_path):
    path = tmp_path / "model.pt"
    torch.save(CHECKPOINTS[layout](), path, pickle_protocol=protocol)
    with open_torch_file(path) as file:
        assert_same(file.value, torch.load(path, weights_only=False))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_strided_view_reads_as_torch_reads_it(data, tmp_path_factory):
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
    torch.save(view, path)
    with open_torch_file(path) as file:
        assert_same(file.value, view)


# ---- Archives by hand ----


@dataclasses.dataclass
class Entry:
    """An entry of a zip file with any claims about itself (None: the truth)."""

    name: str
    data: bytes = b""
    method: int = 0
    flags: int = 0
    crc: int | None = None
    size: int | None = None
    compressed_size: int | None = None
    offset: int | None = None
    local_name: str | None = None
    local_flags: int | None = None
    local_method: int | None = None
    hole: int = 0


def write_zip(path: Path, entries: list[Entry]) -> Path:
    """Writes a zip file; every offset and size goes into zip64 fields, as PyTorch may do."""
    directory = b""
    with open(path, "wb") as file:
        for entry in entries:
            name = entry.name.encode()
            position = file.tell() if entry.offset is None else entry.offset
            crc = zlib.crc32(entry.data) if entry.crc is None else entry.crc
            size = len(entry.data) + entry.hole if entry.size is None else entry.size
            packed = size if entry.compressed_size is None else entry.compressed_size
            local = name if entry.local_name is None else entry.local_name.encode()
            claims = (45, entry.flags, entry.method, 0, 0)
            flags = entry.flags if entry.local_flags is None else entry.local_flags
            method = entry.method if entry.local_method is None else entry.local_method
            here = (45, flags, method, 0, 0, 0, 0, 0, len(local), 0)
            file.write(struct.pack("<4s5H3L2H", b"PK\3\4", *here))
            file.write(local + entry.data)
            file.seek(entry.hole, os.SEEK_CUR)
            extra = struct.pack("<HHQQQ", 1, 24, size, packed, position)
            sizes = (2**32 - 1, 2**32 - 1, len(name), len(extra), 0, 0, 0, 0, 2**32 - 1)
            directory += struct.pack("<4s6H3L5H2L", b"PK\1\2", 45, *claims, crc, *sizes)
            directory += name + extra
        start = file.tell()
        file.write(directory)
        end = file.tell()
        count, size = len(entries), len(directory)
        whole = struct.pack("<QHHLLQQQQ", 44, 45, 45, 0, 0, count, count, size, start)
        file.write(b"PK\6\6" + whole)
        file.write(struct.pack("<4sLQL", b"PK\6\7", 0, end, 1))
        file.write(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, 2**32 - 1, 2**32 - 1, 0))
    return path


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def numbers(values) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def storage(key="0", count=6, cls="torch\nFloatStorage", location="cpu") -> bytes:
    return (
        b"("
        + text("storage")
        + f"c{cls}\n".encode()
        + text(key)
        + text(location)
        + number(count)
        + b"tQ"
    )


def tensor(shape=(2, 3), strides=(3, 1), offset=0, *, hooks=b"}", more=b"", **of) -> bytes:
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + storage(**of) + number(offset) + numbers(shape) + numbers(strides) + b"\x89" + hooks + more
        + b"tR"
    )  # fmt: skip


SIX = np.arange(6, dtype=np.float32)
SIX_BYTES = SIX.tobytes()


def checkpoint(path: Path, *parts: bytes, data=SIX_BYTES, prefix=b"\x80\x02") -> Path:
    """A checkpoint of a hand-written pickle and one storage of six floats, in the layout of 1.6."""
    return write_zip(
        path,
        [
            Entry("archive/data.pkl", prefix + b"".join(parts) + b"."),
            Entry("archive/data/0", data),
            Entry("archive/version", b"3\n"),
        ],
    )


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


def attacks(trace: Path) -> dict[str, tuple[bytes, str]]:
    """Streams that leave a trace if anything in them is executed, and what the refusal names."""
    command = text(f"touch {trace}")
    python = text(f"open({str(trace)!r}, 'w')")
    return {
        "REDUCE": (b"cos\nsystem\n(" + command + b"tR", "os.system"),
        "posix": (b"cposix\nsystem\n(" + command + b"tR", "posix.system"),
        "INST": (b"(" + command + b"ios\nsystem\n", "opcode INST"),
        "OBJ": (b"(cos\nsystem\n" + command + b"o", "os.system"),
        "OBJ of an allowed class": (b"(cargparse\nNamespace\no", "opcode OBJ"),
        "NEWOBJ": (b"csubprocess\nPopen\n(" + command + b"t\x81", "subprocess.Popen"),
        "NEWOBJ of a function": (b"ctorch._utils\n_rebuild_tensor\n)\x81", "not an allowed class"),
        "NEWOBJ with arguments": (b"cargparse\nNamespace\n(" + command + b"t\x81", "arguments"),
        "NEWOBJ_EX": (b"cargparse\nNamespace\n)}\x92", "opcode NEWOBJ_EX"),
        "call of a class": (b"cargparse\nNamespace\n)R", "not called"),
        "STACK_GLOBAL": (text("os") + text("system") + b"\x93(" + command + b"tR", "os.system"),
        "EXT1": (b"\x82\x01(" + command + b"tR", "opcode EXT1"),
        "eval": (b"cbuiltins\neval\n(" + python + b"tR", "builtins.eval"),
        "getattr": (b"cbuiltins\ngetattr\n", "builtins.getattr"),
        "dotted attribute": (
            text("torch._utils") + text("os.system") + b"\x93", "torch._utils.os.system"),
        "dotted module": (b"ctorch._utils.os\nsystem\n", "torch._utils.os.system"),
        "attribute of a tensor function": (
            text("torch._utils") + text("_rebuild_tensor.__globals__") + b"\x93", "__globals__"),
        "torch.load": (b"ctorch\nload\n", "torch.load"),
        "hub": (b"ctorch.hub\nload\n", "torch.hub.load"),
        "compile": (b"ctorch._dynamo\noptimize\n", "torch._dynamo.optimize"),
        "storage from a file": (b"ctorch\nUntypedStorage\n", "torch.UntypedStorage"),
        "module": (b"ctorch.nn.modules.linear\nLinear\n)\x81", "Linear"),
        "numpy object array": (
            b"cnumpy\ndtype\n" + text("O8") + b"\x89\x88\x87R", "numpy dtype 'O8'"),
        "_codecs.decode": (b"c_codecs\ndecode\n", "_codecs.decode"),
        "encode into something else": (
            b"c_codecs\nencode\n" + text("x") + text("zlib") + b"\x86R", "latin1"),
        "BUILD of a tensor": (tensor() + b"}" + text("__class__") + command + b"sb", "state for"),
        "BUILD of a function": (b"ctorch\nSize\n}b", "state for"),
        "__setstate__ of a Namespace": (
            b"cargparse\nNamespace\n)\x81(N}" + text("__setstate__") + command + b"stb",
            "not a dictionary"),
        "attributes of an OrderedDict": (
            b"ccollections\nOrderedDict\n)R}" + text("__reduce__") + command + b"sb", "_metadata"),
        "OrderedDict of a list": (b"ccollections\nOrderedDict\n(]tR", "with arguments"),
        "persistent id": (command + b"Q", "persistent id"),
        "named persistent id": (b"Pstorage\n", "opcode PERSID"),
        "container code": (
            b"(" + text("module") + b"cos\nsystem\n" + command + command + b"NtQ", "os.system"),
    }  # fmt: skip


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


HUGE = 2**62
BAD_TENSORS = {
    "too many elements": (tensor((3, 3), (3, 1)), "in a storage of 6 elements"),
    "product overflows": (tensor((2**40, 2**40), (1, 1)), "in a storage of 6"),
    "zero stride bomb": (tensor((2**40,), (0,)), r"contiguous\(\)"),
    "huge but empty": (tensor((0, HUGE, HUGE), (0, 0, 0)), "too large for any array"),
    "less huge but empty": (tensor((0, 2**31, 2**31), (0, 0, 0)), "too large for any array"),
    "stride too large": (tensor((2, 3), (4, 1)), "ends at element 6 of a storage of 6"),
    "offset too large": (tensor((2, 3), (3, 1), 1), "offset 1 ends at element 6"),
    "offset of 64 bits": (tensor((1,), (1,), 2**63 - 1), "ends at element"),
    "offset of 65 bits": (tensor((1,), (1,), 2**64), "whole numbers from 0"),
    "stride of 65 bits": (tensor((1, 1), (2**64, 1)), "whole numbers from 0"),
    "negative size": (tensor((-2, 3)), "whole numbers from 0"),
    "negative stride": (tensor((2, 3), (-3, 1), 5), "whole numbers from 0"),
    "negative offset": (tensor(offset=-1), "whole numbers from 0"),
    "too many axes": (tensor((1,) * 33, (1,) * 33), "more than 32 axes"),
    "axes without strides": (tensor((2, 3), (1,)), "2 axes has 1 strides"),
    "true as a size": (tensor().replace(numbers((2, 3)), b"(\x88\x88t"), "whole numbers from 0"),
    "list as a shape": (tensor().replace(numbers((2, 3)), b"]"), "whole numbers from 0"),
    "no storage": (tensor().replace(storage(), b"N"), "without a storage"),
    "hooks": (tensor(hooks=b"}K\x01K\x02s"), "with hooks"),
    "hooks that are a list": (tensor(hooks=b"]"), "with hooks"),
    "negative bit": (tensor(more=b"}" + text("neg") + b"\x88s"), "negative bit"),
    "too few parts": (b"ctorch._utils\n_rebuild_tensor_v2\n)R", "0 parts"),
    "too few parts, v1": (b"ctorch._utils\n_rebuild_tensor\n)R", "0 parts"),
    "too few parts, v3": (b"ctorch._utils\n_rebuild_tensor_v3\n)R", "0 parts"),
    "parameter of nothing": (b"ctorch._utils\n_rebuild_parameter\n(N\x88}tR", "a parameter"),
    "parameter with hooks": (
        b"ctorch._utils\n_rebuild_parameter\n(" + tensor() + b"\x88]tR", "with hooks"),
    "dtype that is none": (
        b"ctorch._utils\n_rebuild_tensor_v3\n(" + storage() + number(0) + numbers((1,))
        + numbers((1,)) + b"\x89}ctorch\nFloatStorage\ntR", "not a torch dtype"),
    "hooks, v3": (
        b"ctorch._utils\n_rebuild_tensor_v3\n(" + storage() + number(0) + numbers((1,))
        + numbers((1,)) + b"\x89]ctorch\nuint16\ntR", "with hooks"),
    "negative bit, v3": (
        b"ctorch._utils\n_rebuild_tensor_v3\n(" + storage() + number(0) + numbers((1,))
        + numbers((1,)) + b"\x89}ctorch\nuint16\n" + b"]tR", "negative bit"),
    "storage larger than its entry": (tensor(count=7), "more than the 24 bytes"),
    "storage of wider elements": (tensor(cls="torch\nDoubleStorage"), "more than the 24 bytes"),
    "storage of 2**62 elements": (tensor(count=HUGE), "more than the 24 bytes"),
    "storage of negative size": (tensor(count=-1), "more than the 24 bytes"),
    "missing entry": (tensor(key="1"), "no entry data/1"),
    "key that is a path": (tensor(key="../../etc/passwd"), "key is not a number"),
    "key of other digits": (tensor(key="٠"), "key is not a number"),
    "key of many digits": (tensor(key="0" * 21), "key is not a number"),
    "other class": (tensor(cls="torch\nSize"), "class is not one of torch's"),
    "meta": (tensor(location="meta"), "meta device"),
    "two descriptions": (b"(" + tensor() + tensor(count=5, shape=(2, 2)) + b"t", "two ways"),
    "two types": (
        b"(" + tensor() + tensor(cls="torch\nIntStorage") + b"t", "two ways"),
    "a bare storage": (storage(), "contains a _Storage"),
    "Size of lists": (b"ctorch\nSize\n(]tR", "torch.Size"),
    "device of a number": (b"ctorch\ndevice\n(K\x01tR", "torch.device"),
    "device without a name": (b"ctorch\ndevice\n)R", "torch.device"),
    "device of a large index": (b"ctorch\ndevice\n(" + text("cuda") + number(2**70) + b"tR", "index"),
    "set of tuples": (b"c__builtin__\nset\n(](K\x01)etR", "key of type tuple"),
    "set of nothing": (b"c__builtin__\nset\n)R", "not made of a list"),
    "bytes of a size": (b"c__builtin__\nbytes\n(K\x05tR", "with arguments"),
    "scalar of too few bytes": (
        b"cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\n" + text("f8") + b"\x89\x88\x87R"
        b"c_codecs\nencode\n" + text("abc") + text("latin1") + b"\x86R\x86R", "of 3 bytes, not 8"),
    "scalar of text": (
        b"cnumpy.core.multiarray\nscalar\n" + text("f8") + text("abc") + b"\x86R", "numpy scalar"),
}  # fmt: skip


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


def shared_pairs(levels: int) -> bytes:
    """A list that holds pairs of pairs of ...: 2**levels leaves in a few bytes a level."""
    return b"]K\x01q\x01a" + b"h\x01h\x01\x86q\x01a" * levels


BOMBS = {
    "shared tuples": (shared_pairs(200), "nested more than 100|more than 20000 items"),
    "wide sharing": (shared_pairs(30), "more than 20000 items"),
    "deep": (b")" + b"\x85" * 30_000, "nested more than 100"),
    "deep records": (
        (b"cargparse\nNamespace\n)\x81}" + text("a")) * 5_000 + b"N" + b"sb" * 5_000,
        "nested more than 100"),
    "cyclic": (b"]q\x01h\x01a", "within itself"),
    "tuple as a key": (b"}" + shared_pairs(200) + b"K\x01s", "key of type list"),
    "colliding keys": (
        b"}(" + b"".join(number(k * (2**61 - 1)) + b"N" for k in range(10**9, 10**9 + 20)) + b"u",
        "more than 64 bits"),
    "one text as many bytes": (
        b"(" + text("x" * 100_000) + b"q\x01"
        + b"c_codecs\nencode\nq\x02h\x01X\x06\0\0\0latin1q\x03\x86R"
        + b"h\x02h\x01h\x03\x86R" * 100 + b"t", "bytes of array data asked for"),
    "one list as many sets": (
        b"(](" + b"K\x01" * 50_000 + b"eq\x01"
        + b"c__builtin__\nset\nq\x02h\x01\x85R" + b"h\x02h\x01\x85R" * 100 + b"t",
        "bytes of array data asked for"),
    "one dict as the attributes of many": (
        b"(}(" + b"".join(text(str(n)) + b"N" for n in range(9_000)) + b"uq\x01"
        + b"cargparse\nNamespace\nq\x02)\x81h\x01b" + b"h\x02)\x81h\x01b" * 100 + b"t",
        "bytes of array data asked for"),
    "long integer": (b"\x8b" + struct.pack("<I", 1_000_000) + b"\x7f" * 1_000_000, "opcode LONG4"),
    "long decimal": (b"L" + b"7" * 1_000_000 + b"L\n", "refused at byte"),
    "claimed length": (b"X\xff\xff\xff\x7f", "refused at byte"),
    "long name": (b"c" + b"a" * 1_000_000 + b"\nb\n", "is not allowed"),
    "DUP": (b"]" + b"2" * 10, "opcode DUP"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BOMBS)
def test_small_streams_cannot_become_large_or_slow(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(torch_file, "_MAX_ITEMS", 20_000)
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


# ---- Hostile and damaged archives ----

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
    monkeypatch.setattr(torch_file, "_MAX_ENTRIES", 3)
    with pytest.raises(TorchFileError, match="4 entries, at most 3"):
        open_torch_file(path)
    monkeypatch.setattr(torch_file, "_MAX_DIRECTORY", 100)
    with pytest.raises(TorchFileError, match="it claims [0-9]+ bytes"):
        open_torch_file(path)


def legacy_tar() -> bytes:
    import tarfile

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    return buffer.getvalue()


def legacy_pickle() -> bytes:
    buffer = io.BytesIO()
    torch.save({"w": torch.ones(2)}, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def script() -> bytes:
    class Twice(torch.nn.Module):
        def forward(self, x):
            return 2 * x

    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(Twice(), torch.ones(1)), buffer)
    return buffer.getvalue()


def safetensors() -> bytes:
    from safetensors.numpy import save

    return save({"w": SIX})


def plain_zip() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, w=SIX)
    return buffer.getvalue()


OTHER_FILES = {
    "legacy": (legacy_pickle, r"before PyTorch 1\.6.*re-save it.*weights_only=True.*safetensors"),
    "tar": (legacy_tar, "tar archive"),
    "pickle": (lambda: pickle.dumps({"w": SIX}), "a bare pickle"),
    "safetensors": (safetensors, "a safetensors file"),
    "LFS": (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "HTML": (lambda: b"\n<!DOCTYPE html><html></html>", "a web page"),
    "empty": (lambda: b"", "the file is empty"),
    "noise": (lambda: b"noise" * 100, "does not begin as a zip archive"),
    "a header only": (lambda: b"PK\3\4", "incomplete download"),
    "numpy archive": (plain_zip, "without data.pkl"),
}


@pytest.mark.parametrize("kind", OTHER_FILES)
def test_other_files_are_named(kind, tmp_path):
    make, message = OTHER_FILES[kind]
    (tmp_path / "x.pt").write_bytes(make())
    with pytest.raises(TorchFileError, match=message):
        open_torch_file(tmp_path / "x.pt")


@pytest.mark.filterwarnings("ignore")
def test_a_torchscript_program_is_named(tmp_path):
    (tmp_path / "x.pt").write_bytes(script())
    with pytest.raises(TorchFileError, match="TorchScript program"):
        open_torch_file(tmp_path / "x.pt")


def test_paths_that_are_no_files_are_refused(tmp_path):
    with pytest.raises(TorchFileError, match="No such file"):
        open_torch_file(tmp_path / "missing.pt")
    with pytest.raises(TorchFileError, match="not a regular file"):
        open_torch_file(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(TorchFileError, match="not a regular file"):
        open_torch_file(tmp_path / "pipe")


def small_file(path: Path) -> Path:
    grid = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    torch.save({"model": {"w": grid, "t": grid.T, "n": torch.tensor(3)}, "steps": 5}, path)
    return path


def everything(path: Path):
    """All that a file says, as plain values."""

    def plain(value):
        if isinstance(value, TorchTensor):
            return (value.shape, str(value.dtype), value.read().tobytes())
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return value

    with open_torch_file(path) as file:
        return plain(file.value)


def test_every_truncation_is_refused(tmp_path):
    data = small_file(tmp_path / "good.pt").read_bytes()
    path = tmp_path / "cut.pt"
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        with pytest.raises(TorchFileError):
            open_torch_file(path)


def test_every_altered_byte_is_noticed_or_harmless(tmp_path):
    """The archive's checksums cover the pickle and the tensors; the rest must not mislead."""
    data = small_file(tmp_path / "good.pt").read_bytes()
    want = everything(tmp_path / "good.pt")
    path, refused, rng = tmp_path / "altered.pt", 0, random.Random(0)
    for position in range(0, len(data), 2):
        damaged = bytearray(data)
        damaged[position] ^= rng.randrange(1, 256)
        path.write_bytes(damaged)
        try:
            assert everything(path) == want
        except REFUSALS:
            refused += 1
    assert refused > 300


@pytest.mark.filterwarnings("ignore::DeprecationWarning:pickletools")
@settings(max_examples=150, deadline=None)
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
    try:
        with open_torch_file(path) as file:
            for leaf in file.value.values() if isinstance(file.value, dict) else ():
                if isinstance(leaf, TorchTensor):
                    assert leaf.read().nbytes <= len(data)
    except REFUSALS:
        pass


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200), st.sampled_from([b"", b"PK\3\4", b"\x80\x02"]))
def test_arbitrary_bytes_are_refused(tmp_path_factory, data, prefix):
    path = tmp_path_factory.getbasetemp() / "noise.pt"
    path.write_bytes(prefix + data)
    with pytest.raises(REFUSALS):
        open_torch_file(path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:pickletools")
@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=60))
def test_arbitrary_pickles_are_read_or_refused(tmp_path_factory, stream):
    path = tmp_path_factory.getbasetemp() / "stream.pt"
    write_zip(path, [Entry("a/data.pkl", b"\x80\x02" + stream + b".")])
    with contextlib.suppress(*REFUSALS):
        open_torch_file(path).close()


# ---- Laziness ----


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
            with pytest.raises(TorchFileError, match="data/1 is damaged: its CRC-32 is"):
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
    original = torch_file._File

    def remember(path):
        files.append(original(path))
        return files[-1]

    monkeypatch.setattr(torch_file, "_File", remember)
    for path in (checkpoint(tmp_path / "x.pt", b"cos\nsystem\n"), checkpoint(tmp_path / "y.pt")):
        with pytest.raises(REFUSALS):
            open_torch_file(path)
    assert len(files) == 2 and all(file.closed for file in files)


def test_threads_may_read_one_file(tmp_path):
    tensors = {str(i): torch.full((50_000,), i, dtype=torch.int32)[::2] for i in range(8)}
    torch.save(tensors, tmp_path / "m.pt")
    wrong = []
    with open_torch_file(tmp_path / "m.pt") as file:

        def read(key):
            wrong.extend(key for _ in range(20) if (file.value[key].read() != int(key)).any())

        threads = [threading.Thread(target=read, args=(key,)) for key in tensors]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


class Generated:
    """An array that is made when it is read, and counts how many are alive."""

    shape, dtype = (2_500_000,), np.dtype(np.float32)

    def __init__(self, value):
        self.value = value

    def read(self):
        return np.full(self.shape, self.value, self.dtype)


def test_one_tensor_at_a_time_is_in_memory(tmp_path):
    path, size = tmp_path / "large.pt", 10_000_000
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


# ---- Writing ----


def load_both(path: Path):
    """What torch.load makes of a file; the same with and without memory mapping."""
    plain = torch.load(path, weights_only=True)
    mapped = torch.load(path, weights_only=True, mmap=True)
    return plain, mapped


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
            assert leaf._storage.entry.offset % 64 == 0
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
    monkeypatch.setattr(torch_file, "_ZIP64_FROM", 20)
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 20)
    value = {"large": SIX, "small": SIX[:2], "last": SIX[1:]}
    write_torch_file(tmp_path / "m.pt", value)
    with zipfile.ZipFile(tmp_path / "m.pt") as archive:
        assert b"\x01\x00" in archive.getinfo("m/data/0").extra[:2]
        assert archive.testzip() is None
    with open_torch_file(tmp_path / "m.pt") as file:
        for loaded in load_both(tmp_path / "m.pt"):
            for name, want in value.items():
                assert file.value[name]._storage.entry.offset % 64 == 0
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
        r"value\['w'\]: read\(\) gave float32\[3\] .* float32\[2500000\]",
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
    monkeypatch.setattr(torch_file, "_MAX_ENTRIES", 6)
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


@settings(max_examples=80, deadline=None)
@given(VALUES)
def test_whatever_is_written_is_read_back(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "round.pt"
    write_torch_file(path, value)
    with open_torch_file(path) as file:
        assert_round_trip(file.value, value)


@settings(max_examples=40, deadline=None)
@given(st.lists(SCALARS | ARRAYS, max_size=5))
def test_whatever_is_written_torch_reads(tmp_path_factory, values):
    path = tmp_path_factory.getbasetemp() / "torch.pt"
    write_torch_file(path, values)
    with open_torch_file(path) as file:
        assert_same(file.value, torch.load(path, weights_only=True))


# ---- Independence ----


def test_the_modules_import_neither_torch_nor_an_unpickler():
    folder = Path(torch_file.__file__).parent
    for name in ("torch_file.py", "safe_pickle.py"):
        names = set()
        for node in ast.walk(ast.parse((folder / name).read_text())):
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
from vapi_jax.torch_file import open_torch_file, write_torch_file
with open_torch_file(sys.argv[1]) as file:
    write_torch_file(sys.argv[1] + "2", {"model": file.value["model"], "args": file.value["args"]})
assert not {"torch", "jax"} & set(sys.modules), "imported"
print(len(file.value["model"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(torch_file.__file__).parents[1],
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(len(module().state_dict()))
    assert Path(f"{path}2").exists()
