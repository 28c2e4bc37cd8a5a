"""SHA-256 of files and of parameters."""

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from vapi_jax.common.trees import Params, flatten


def sha256_file(path: str | Path, tick: Callable[[int], None] = lambda count: None) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal; `tick` is told the bytes as they are read."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
            tick(len(block))
    return digest.hexdigest()


def digest_of(path: str | Path) -> str:
    """As `sha256_file`, but a process reads a file once for as long as it stays the same one."""
    facts = Path(path).stat()
    return _known_digest(str(Path(path).resolve()), facts.st_ino, facts.st_size, facts.st_mtime_ns)


@functools.cache
def _known_digest(path: str, *identity: int) -> str:
    del identity
    return sha256_file(path)


def params_digest(params: Params) -> str:
    """SHA-256 over names, types, shapes and values, whatever file the parameters came from."""
    digest = hashlib.sha256()
    for name, leaf in flatten(params).items():
        array = np.ascontiguousarray(leaf)
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
