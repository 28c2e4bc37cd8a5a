"""One live run in a work directory: a lock that dies with its process."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from vapi_jax.common.errors import ExpectedError

logger = logging.getLogger(__name__)

LOCK = ".lock"


class LockedError(ExpectedError, RuntimeError):
    """Another live process works in the directory; says which."""


@contextlib.contextmanager
def hold(directory: Path) -> Iterator[None]:
    """Holds `directory`/.lock for as long as the context lasts.

    The kernel lets go of it when the process ends, however it ends: a file that a killed run has left
    locks nobody out.

    Args:
      directory: made if absent.

    Raises:
      LockedError: another process holds it.
      OSError: the directory cannot be made or written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / LOCK
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise LockedError(
                f"{directory} is in use by {_holder(path)}. Two runs in one directory would destroy "
                "each other's files: wait for that one, end it, or give another --workdir"
            ) from error
        except OSError as error:  # some network file systems have no locks
            logger.warning("%s cannot be locked (%s): start one run in it only", directory, error)
        since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{json.dumps(holder)}\n".encode(), 0)
        yield
    finally:
        os.close(handle)


def _holder(path: Path) -> str:
    """Who says to hold the lock; the file is theirs and may be anything."""
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        return (
            f"process {int(holder['pid'])} on {holder['host']!s:.99} since {holder['since']!s:.99}"
        )
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
