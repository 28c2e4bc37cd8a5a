"""SHA-256 of files and of parameters."""

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


def params_digest(params: Params) -> str:
    """SHA-256 over names, types, shapes and values, whatever file the parameters came from."""
    digest = hashlib.sha256()
    for name, leaf in flatten(params).items():
        array = np.ascontiguousarray(leaf)
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
