"""Files that are whole or not there, and a sentence for what can go wrong with them."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import BinaryIO

_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would be larger than this process may write (ulimit -f)",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EIO: "the disk does not read or write (input/output error)",
}


def write_all(file: BinaryIO, data: bytes, path: Path) -> None:
    """Writes to an unbuffered file: all of `data`, or an OSError that names the path."""
    try:
        while data:
            data = data[file.write(data) :]
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_atomically(path: Path, text: str) -> None:
    """Writes a file under another name, and renames it when it is on the disk."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb", buffering=0) as file:
        write_all(file, text.encode(), partial)
        os.fsync(file.fileno())
    partial.replace(path)


def disk_trouble(error: OSError) -> str | None:
    """A sentence where an error is the disk's (full, read-only, no permission), else None."""
    reason = _REASONS.get(error.errno or 0)
    if reason is None:
        return None
    where = f" at {error.filename}" if error.filename else ""
    return (
        f"{reason}{where} ({error.strerror}). Nothing saved before is lost: put this right and run "
        "the same command again"
    )
