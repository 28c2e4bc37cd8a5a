"""PyTorch files for the tests: objects to save, archives and pickles written by hand."""

import argparse
import contextlib
import dataclasses
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import torch

from vapi_jax.weights.safe_pickle import GlobalName, PickleRefused
from vapi_jax.weights.torch_file import Record, TorchFileError, TorchTensor, open_torch_file

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


def small_file(path: Path) -> Path:
    grid = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    torch.save({"model": {"w": grid, "t": grid.T, "n": torch.tensor(3)}, "steps": 5}, path)
    return path


def everything(path: Path, *, legacy: bool = False):
    """All that a file says, as plain values."""

    def plain(value):
        if isinstance(value, TorchTensor):
            return (value.shape, str(value.dtype), value.read().tobytes())
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return value

    with open_torch_file(path, legacy=legacy) as file:
        return plain(file.value)


class Generated:
    """An array that is made when it is read, and counts how many are alive."""

    shape, dtype = (625_000,), np.dtype(np.float32)

    def __init__(self, value):
        self.value = value

    def read(self):
        return np.full(self.shape, self.value, self.dtype)


def read_or_be_refused(path: Path, size: int, *, legacy: bool = False):
    """Opens what may be damaged: every tensor that can be read has at most `size` bytes."""
    with contextlib.suppress(*REFUSALS), open_torch_file(path, legacy=legacy) as file:
        for leaf in file.value.values() if isinstance(file.value, dict) else ():
            if isinstance(leaf, TorchTensor):
                assert leaf.read().nbytes <= size
