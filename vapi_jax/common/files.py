"""Files and folders that are whole or not there, and objects read from JSON."""

from __future__ import annotations

import codecs
import contextlib
import errno
import json
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from vapi_jax.common.errors import ExpectedError

PARTIAL = ".partial"
"""Ends the name of what is not complete yet, or never will be: its writer was killed."""

LARGEST_JSON = 1 << 26
"""Bytes: a larger file is no JSON of ours, nor of those that publish weights."""


class FolderExistsError(ExpectedError, FileExistsError):
    """A folder that was to be made is there already."""


class OutputError(ExpectedError, ValueError):
    """A file that was to be written is needed for something else, or cannot be there."""


def partial_of(path: Path) -> Path:
    """What `path` is called until it is complete."""
    return path.with_name(path.name + PARTIAL)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A path to write a file at, which becomes `path` when the context ends without an error.

    Until then what was at `path` stays. The file gets the mode that the umask gives, also from a writer
    that has another in mind, as safetensors has.
    """
    partial = partial_of(path)
    partial.unlink(missing_ok=True)
    try:
        with partial.open("xb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        yield partial
        if stat.S_IMODE(partial.stat().st_mode) != mode:
            partial.chmod(mode)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    partial.replace(path)


def write_all(file: BinaryIO, data: bytes, path: Path) -> None:
    """Writes to an unbuffered file: all of `data`, or an OSError that names the path."""
    try:
        while data:
            data = data[file.write(data) :]
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_atomically(path: Path, data: str | bytes, *, sync: bool = True) -> None:
    """Writes a `new_file` of these bytes, or of this text in UTF-8.

    Args:
      path: the file.
      data: all of it.
      sync: have it on the disk before it is renamed, so that a power cut leaves the old file or the new.
    """
    with new_file(path) as partial, partial.open("wb", buffering=0) as file:
        # A name may hold bytes that are no UTF-8: as "\\udce9", which JSON reads back.
        text = data.encode(errors="backslashreplace") if isinstance(data, str) else data
        write_all(file, text, partial)
        if sync:
            os.fsync(file.fileno())


def make_folder(path: Path) -> None:
    """Makes a folder and those above it, where they are not there.

    Raises:
      OSError: it cannot be made; a PermissionError also where /proc says that it does not exist.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError as error:
        raise PermissionError(errno.EACCES, error.strerror, str(path)) from error


def make_room(outputs: Iterable[Path], inputs: Iterable[Path | None]) -> None:
    """Makes the folders of files that are to be written, before any work goes into them.

    Raises:
      OutputError: one of them is an input as well, or a folder.
      OSError: a folder cannot be made.
    """
    read = [path for path in inputs if path is not None]
    for path in outputs:
        if any(path.resolve() == other.resolve() for other in read):
            raise OutputError(
                f"{path} is read, and would be replaced by what is written there: name another --out"
            )
        if path.is_dir():
            raise OutputError(f"{path} is a folder, and a file is to be written there")
        if path.parent.exists() and not path.parent.is_dir():
            raise OutputError(f"{path} cannot be written: {path.parent} is a file")
        make_folder(path.parent)


def require_space(place: Path, nbytes: int, what: str) -> None:
    """Refuses what cannot fit before it is begun.

    Args:
      place: where it is to go; it need not be there yet.
      nbytes: that are to be written.
      what: is written, for the message.

    Raises:
      OutputError: fewer bytes are free there.
    """
    held = next(path for path in (place, *place.absolute().parents) if path.exists())
    if (free := shutil.disk_usage(held).free) < nbytes:
        raise OutputError(
            f"{what} take about {nbytes / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free at {held}"
        )


@contextlib.contextmanager
def new_folder(out: Path, *, replace: bool = False) -> Iterator[Path]:
    """A folder to fill, called `out` when the context ends, and gone when it ends with an error.

    Until then it is `out`.partial; what a killed call left there is removed.

    Args:
      out: the folder, or a link to it.
      replace: one that is there already goes once the new one is complete, and has its name.

    Raises:
      FolderExistsError: there is something at `out`.
    """
    named, out = out, out.resolve()  # a link stays, and what it leads to is replaced
    partial, old = partial_of(out), out.with_name(f"{out.name}.replaced")
    if old.exists() and not out.exists():
        old.rename(out)  # killed before the new one had the name
    if out.exists() and not replace:
        raise FolderExistsError(f"{named} exists; choose another place")
    for left in (partial, old):
        if left.exists():
            shutil.rmtree(left)
    make_folder(partial)
    try:
        yield partial
        if out.exists():
            out.rename(old)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    partial.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def read_text(path: Path) -> str:
    """A text that somebody wrote with an editor: UTF-8, or what its byte-order mark says.

    Raises:
      OSError: it cannot be read.
      UnicodeDecodeError: it is no text.
    """
    data = path.read_bytes()
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):  # PowerShell's `>`
        return data.decode("utf-16")
    return data.decode("utf-8-sig")


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def read_json(path: Path, error: type[ExpectedError]) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
      ExpectedError: of the given kind, where there is no such file, or anything else in it.
    """
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise ValueError(f"it has more than {LARGEST_JSON} bytes")
        value = json.loads(path.read_bytes(), parse_constant=_refuse)
    except FileNotFoundError as missing:
        raise error(f"there is no file {path}") from missing
    except (OSError, ValueError, RecursionError) as wrong:
        raise error(f"{path} cannot be read as JSON: {wrong}") from wrong
    if not isinstance(value, dict):
        raise error(f"{path} holds no JSON object")
    return value
