"""Errors that a user can put right, and how commands say them."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Callable

_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would be larger than this process may write (ulimit -f)",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EIO: "the disk does not read or write (input/output error)",
    errno.ENOTDIR: "a file is where a folder is wanted",
    errno.EISDIR: "a folder is where a file is wanted",
    errno.ENAMETOOLONG: "the name is too long for this file system",
    errno.ELOOP: "links lead in a circle",
    errno.EMFILE: "this process has too many files open (ulimit -n)",
    errno.ENOTCONN: "what is mounted there has gone away",
    errno.ESTALE: "the network file system has lost it",
    errno.ETIMEDOUT: "the network file system does not answer",
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


def prepare_streams() -> None:
    """From now on nothing printed ends a command.

    A letter that the terminal's encoding lacks is printed as "?", and what goes to a stream that a daemon
    has closed goes nowhere: not into the file that got its number.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper) and mode == "w":
            stream.reconfigure(errors="replace")


def nobody_reads() -> int:
    """The exit status after a `BrokenPipeError`; what is still to be flushed goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + signal.SIGPIPE


def stop_without_a_stack() -> None:
    """From now on Ctrl-C ends this program with one line and 130, wherever it strikes.

    Outside of `exit_status` it ends there and then: what would be raised while modules are imported can end
    in a stack of C++. To be called from the main thread.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return  # whoever started it wants it to be ignored
    signal.signal(signal.SIGINT, _stop)
    others = sys.unraisablehook

    def strike_again(lost: sys.UnraisableHookArgs) -> None:
        # It struck in a callback, such as JAX's at garbage collections, from which nothing is raised.
        if isinstance(lost.exc_value, KeyboardInterrupt):
            threading.Timer(0.01, os.kill, [os.getpid(), signal.SIGINT]).start()
        else:
            others(lost)

    sys.unraisablehook = strike_again


def _stop(*_: object) -> None:
    with contextlib.suppress(OSError):
        os.write(2, b"\nstopped\n")
    os._exit(128 + signal.SIGINT)


def exit_status(command: Callable[[], int | None], stopped: str = "stopped") -> int:
    """Calls a command; prints what is expected to go wrong as one sentence on standard error.

    Args:
      command: all of it, reading its flags included.
      stopped: what to say after Ctrl-C.

    Returns:
      What the command returns (None is 0); 1 after an `ExpectedError` or trouble with the disk; as a
      shell would say, 130 after Ctrl-C and 141 where nobody reads the output any more (`| head`).
    """
    ends_here = signal.getsignal(signal.SIGINT) is _stop  # this is a program's, and the outermost
    if ends_here:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    status = _status_of(command, stopped)
    if ends_here:
        signal.signal(signal.SIGINT, _stop)
        if status == 128 + signal.SIGINT:
            os._exit(status)  # to tear down a backend that is at work can crash
    return status


def _status_of(command: Callable[[], int | None], stopped: str) -> int:
    prepare_streams()
    try:
        try:
            return command() or 0
        finally:
            sys.stdout.flush()
    except ExpectedError as error:
        sentence = str(error)
    except KeyboardInterrupt:
        print(f"\n{stopped}", file=sys.stderr, flush=True)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        return nobody_reads()
    except OSError as error:
        trouble = disk_trouble(error)
        if trouble is None:
            raise
        sentence = trouble
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    return 1
