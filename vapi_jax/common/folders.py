"""Folders that are whole or not there."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from vapi_jax.common.errors import ExpectedError


class FolderExistsError(ExpectedError, FileExistsError):
    """A folder that was to be made is there already."""


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill, called `out` when the context ends, and gone when it ends with an error.

    Until then it is `out`.partial; what a killed call left there is removed.

    Raises:
        FolderExistsError: there is something at `out`.
    """
    if out.exists():
        raise FolderExistsError(f"{out} exists; choose another place")
    partial = out.with_name(out.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    partial.rename(out)
