"""One live process that writes to a directory: a lock that dies with its process."""

import contextlib
import datetime
import errno
import json
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from vapi_jax.common.errors import ExpectedError
from vapi_jax.common.files import make_folder

logger = logging.getLogger(__name__)

LOCK = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class LockedError(ExpectedError, RuntimeError):
    """Another live process works in the directory; says which."""


@contextlib.contextmanager
def hold(directory: Path, flag: str = "--workdir", patience: float = 0.0) -> Iterator[None]:
    """Holds `directory`/.lock for as long as the context lasts.

    The kernel lets go of it when the process ends, however it ends: a file that a killed run has left
    locks nobody out. A file system without locks is warned about.

    Args:
      directory: made if absent.
      flag: of the command, that chooses another directory.
      patience: seconds that another process may hold it.

    Raises:
      LockedError: another process holds it.
      OSError: the directory cannot be made or written.
    """
    make_folder(directory)
    path = directory / LOCK
    # Its soft lock is a file that a killed process leaves locked.
    lock = FileLock(path, timeout=patience, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise LockedError(_in_use(directory, flag)) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        logger.warning("%s cannot be locked (%s): start one process in it only", directory, error)
    try:
        since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
        path.write_text(f"{json.dumps(holder)}\n", encoding="utf-8")
        yield
    finally:
        lock.release()


def look(directory: Path, flag: str = "--workdir") -> None:
    """Raises LockedError where a live process holds the directory; makes and writes nothing."""
    path = directory / LOCK
    if not path.is_file():
        return
    lock = FileLock(path, blocking=False, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise LockedError(_in_use(directory, flag)) from error
    except OSError:  # `hold` will warn, or say why it cannot
        return
    lock.release()


def _in_use(directory: Path, flag: str) -> str:
    return (
        f"{directory} is in use by {_holder(directory / LOCK)}. Two in one directory would destroy each "
        f"other's files: wait for that one, end it, or give another {flag}"
    )


def _holder(path: Path) -> str:
    """Who says to hold the lock; the file is theirs and may be anything."""
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        return (
            f"process {int(holder['pid'])} on {holder['host']!s:.99} since {holder['since']!s:.99}"
        )
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
