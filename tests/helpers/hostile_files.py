"""Files that attack, mislead or belong to another program, and what each refusal names."""

import io
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save

from tests.helpers.torch_files import SIX, number, numbers, storage, tensor, text


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
    "a bare storage": (storage(), "contains a Storage"),
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


def shared_pairs(levels: int) -> bytes:
    """A list that holds pairs of pairs of ...: 2**levels leaves in a few bytes a level."""
    return b"]K\x01q\x01a" + b"h\x01h\x01\x86q\x01a" * levels


BOMBS = {
    "shared tuples": (shared_pairs(200), "nested more than 100|more than 20000 items"),
    "wide sharing": (shared_pairs(30), "more than 20000 items"),
    "deep": (b")" + b"\x85" * 10_000, "nested more than 100"),
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


def legacy_tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    return buffer.getvalue()


def legacy_pickle() -> bytes:
    buffer = io.BytesIO()
    torch.save({"w": torch.ones(2)}, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def plain_zip() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, w=SIX)
    return buffer.getvalue()


OTHER_FILES = {
    "legacy": (legacy_pickle, r"before PyTorch 1\.6.*re-save it.*weights_only=True.*safetensors"),
    "tar": (legacy_tar, "tar archive"),
    "pickle": (lambda: pickle.dumps({"w": SIX}), "a bare pickle"),
    "safetensors": (lambda: save({"w": SIX}), "a safetensors file"),
    "LFS": (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "HTML": (lambda: b"\n<!DOCTYPE html><html></html>", "a web page"),
    "empty": (lambda: b"", "the file is empty"),
    "noise": (lambda: b"noise" * 100, "does not begin as a zip archive"),
    "a header only": (lambda: b"PK\3\4", "incomplete download"),
    "numpy archive": (plain_zip, "without data.pkl"),
}
