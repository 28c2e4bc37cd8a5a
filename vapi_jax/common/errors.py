"""Errors that a user can put right, and how commands say them."""

from __future__ import annotations

import errno
import io
import sys
from collections.abc import Callable

_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would be larger than this process may write (ulimit -f)",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EIO: "the disk does not read or write (input/output error)",
}


class ExpectedError(Exception):
    """Something a user can put right: the message says what was wrong, where, and what to do.

    Commands print it without a stack; whatever else is raised is a fault of the program and keeps its.
    """


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


def exit_status(command: Callable[[], int | None]) -> int:
    """Calls a command; prints what is expected to go wrong as one sentence on standard error.

    A letter that the terminal's encoding lacks is printed as "?" and ends nothing.

    Returns:
      What the command returns (None is 0), or 1 after an `ExpectedError` or trouble with the disk.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        return command() or 0
    except ExpectedError as error:
        sentence = str(error)
    except OSError as error:
        trouble = disk_trouble(error)
        if trouble is None:
            raise
        sentence = trouble
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    return 1
