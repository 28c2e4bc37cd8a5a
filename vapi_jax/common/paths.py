"""From what a user writes to a path: `~` is a home, and a bucket is refused by name."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from absl import flags

from vapi_jax.common.errors import ExpectedError
from vapi_jax.common.options import Convert

# A scheme; of the two slashes after it one is lost where the text has been a path before.
_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")

LOCAL = (
    "a path of a local or mounted file system: mount the bucket (gcsfuse, mountpoint-s3) and give the "
    "folder where it is mounted, or copy what is needed"
)
"""What an option wants that was given gs://bucket/run, say."""


class PathError(ExpectedError, ValueError, argparse.ArgumentTypeError):
    """A text that is no path here; the message says why. argparse and absl show it with the option."""


def is_local(text: str | Path) -> bool:
    """Whether this is no URI such as gs://bucket/run, which `Path` would take for a folder "gs:"."""
    return not _URI.match(str(text))


def local_path(text: str | Path) -> Path:
    """The path that a user means, with `~` and `~name` expanded.

    Raises:
      PathError: an empty text, a URI, or the home of nobody.
    """
    if not str(text):
        raise PathError("wants a path, not an empty text")
    if not is_local(text):
        raise PathError(f"{str(text)!r}: wants {LOCAL}")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise PathError(f"{str(text)!r}: {error}") from error


def local_text(text: str | Path) -> str:
    """`local_path` where a path is kept as text; "./demo" stays, where "demo" may be another thing."""
    path = str(local_path(text))
    return path if os.sep in path or os.sep not in str(text) else os.path.join(".", path)


def local_folder(text: str | Path) -> Path:
    """`local_path` of a folder that is there or can be made.

    Raises:
      PathError: also where a file is in its place, or in that of a folder above it.
    """
    path = local_path(text)
    there = next((part for part in (path, *path.parents) if os.path.lexists(part)), path)
    if there.exists() and not there.is_dir():
        raise PathError(f"{there} is a file where a folder is wanted")
    return path


def cache_folder() -> Path:
    """Where what can be made again is kept: ~/.cache/vapi_jax, or in $XDG_CACHE_HOME."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "vapi_jax"


PathText = Annotated[str, Convert(lambda text: local_text(text) if text else text)]
"""A recipe's option that names a file or folder; "" names none."""


class _PathParser(flags.ArgumentParser):
    def __init__(self, parse: Callable[[str | Path], Path]):
        self._parse = parse

    def parse(self, argument: str | Path) -> Path:
        return self._parse(argument)


PATH, FOLDER = _PathParser(local_path), _PathParser(local_folder)
"""For `flags.DEFINE`: absl flags whose values are paths."""
