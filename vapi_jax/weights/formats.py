"""What a file is that was given for weights, by its first bytes; safetensors opened with that in mind."""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from vapi_jax.weights.errors import WeightsError

_HEAD = 512
_LEGACY_MAGIC = b"\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8"  # its low bytes
_RESAVE = (
    "re-save it with a recent PyTorch:"
    " torch.save(torch.load(path, weights_only=True), new_path), or convert it to safetensors"
)


def is_legacy(head: bytes) -> bool:
    """Whether a file that begins so is of PyTorch before 1.6, going by its magic number."""
    return head.startswith(b"\x80") and _LEGACY_MAGIC in head[:24]


def is_safetensors(head: bytes) -> bool:
    """Whether a file that begins so is meant as safetensors: a length, and the brace of its header."""
    return head[8:9] == b"{"


def _begins(*starts: bytes) -> Callable[[bytes], bool]:
    return lambda head: head.startswith(starts)


_FORMATS: tuple[tuple[Callable[[bytes], bool], str], ...] = (
    (lambda head: not head, "the file is empty: download or copy it again"),
    (
        is_legacy,
        f"a checkpoint in the format before PyTorch 1.6, which is a plain pickle: {_RESAVE}",
    ),
    (_begins(b"PK\3\4"), "a zip archive, as PyTorch checkpoints are: name it .pt"),
    (
        lambda head: head[257:262] == b"ustar",
        f"a tar archive. Unpack it, if it is a download; if it is a checkpoint by PyTorch 0.1, {_RESAVE}",
    ),
    (_begins(b"\x80"), f"a bare pickle, not a PyTorch checkpoint: {_RESAVE}"),
    (is_safetensors, "a safetensors file: give it where safetensors are read"),
    (
        _begins(b"version https://git-lfs"),
        "a pointer of Git LFS, not the file itself: run `git lfs pull` or download the file",
    ),
    (
        lambda head: head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"<",
        "a web page, not a checkpoint: the download link led to a page. Download the file itself",
    ),
    (
        lambda head: head.lstrip()[:1] in (b"{", b"["),
        "JSON text, not weights: an answer of a server, or an index. Name the file of weights, or an "
        "index as *.safetensors.index.json",
    ),
    (_begins(b"\x1f\x8b"), "compressed by gzip: unpack it first (gunzip, or tar -xzf)"),
    (_begins(b"BZh"), "compressed by bzip2: unpack it first (bunzip2, or tar -xjf)"),
    (_begins(b"\xfd7zXZ"), "compressed by xz: unpack it first (unxz, or tar -xJf)"),
    (_begins(b"\x28\xb5\x2f\xfd"), "compressed by zstd: unpack it first (unzstd)"),
    (_begins(b"7z\xbc\xaf"), "a 7-Zip archive: unpack it first"),
    (_begins(b"\x93NUMPY"), "a NumPy array: weights are many, under their names"),
    (_begins(b"\x89HDF"), "an HDF5 file, as Keras writes: not read; convert it to safetensors"),
    (_begins(b"GGUF"), "a GGUF file: not read; take the weights from which it was made"),
)


def what_it_is(head: bytes) -> str:
    """What a file that begins so is, and what to do about it; "" for nothing known."""
    return next((reason for found, reason in _FORMATS if found(head)), "")


def head_of(path: Path) -> bytes:
    """The first bytes of a file, as `what_it_is` takes them."""
    with open(path, "rb") as file:
        return file.read(_HEAD)


@contextlib.contextmanager
def open_safetensors(path: str | Path) -> Iterator[Any]:
    """`safetensors.safe_open` for NumPy, with a sentence where it cannot.

    Raises:
      WeightsError: the file is missing, cut off, or something else; what it is is said.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except FileNotFoundError as error:
        raise WeightsError(f"there is no file {path}") from error
    except (OSError, SafetensorError) as error:
        reason = _refusal(Path(path)) or str(error)
        raise WeightsError(f"{path} cannot be read as safetensors: {reason}") from error


def _refusal(path: Path) -> str:
    """Why a file is no whole safetensors file, as far as its first bytes and its size tell."""
    try:
        head, size = head_of(path), path.stat().st_size
        if not is_safetensors(head):
            return what_it_is(head)
        length = struct.unpack("<Q", head[:8])[0]
        wanted = 8 + length
        if wanted <= min(size, 1 << 27):
            with open(path, "rb") as file:
                header = json.loads(file.read(wanted)[8:])
            wanted += max(v["data_offsets"][1] for k, v in header.items() if k != "__metadata__")
        if wanted > size:
            return (
                f"it should have {wanted} bytes and has {size}, as after a download or a copy that did "
                "not finish: fetch it again"
            )
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        pass  # damaged otherwise: the library's own words have to do
    return ""
