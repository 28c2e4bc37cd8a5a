"""SIGTERM and SIGINT: finish the step, save, end with 0; the second signal ends at once.

A signal is noticed by a thread, since the main one may be inside a compilation or a step for minutes
and Python would tell it only afterwards. Where nothing has been computed since the last save, there
is nothing to wait for and the process ends there and then.

In a run of several processes SIGTERM belongs to JAX, which tells all of them of it and picks a step at
which all stop; SIGINT is passed on to it as SIGTERM.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):
    """The run was asked to stop and has saved its state; the same command goes on from there."""


class StopRequest:
    """Whether a run has been asked to stop. Without `listening`, nobody asks."""

    def __init__(self) -> None:
        self._asked: signal.Signals | None = None
        self._unsaved = False
        self._several = False

    def asked(self, step: int) -> bool:
        """Whether to save and stop after this step: the same answer on every process.

        To be called at every step.
        """
        if jax.process_count() == 1:
            return self._asked is not None
        try:
            return multihost_utils.reached_preemption_sync_point(step)
        except RuntimeError:  # JAX_ENABLE_PREEMPTION_SERVICE=0: signals do what they do by default
            return False

    @property
    def name(self) -> str:
        """What asked: a signal's name, or JAX's notice."""
        return self._asked.name if self._asked else "a preemption notice"

    @contextlib.contextmanager
    def unsaved(self) -> Iterator[None]:
        """While this lasts, there may be work that is not saved yet: a signal waits for `asked`.

        Raises:
          Stopped: at the end, if a signal came after `asked` had been called for the last time.
        """
        self._unsaved = True
        try:
            yield
        finally:
            self._unsaved = False
        if self._asked is not None and not self._several:
            raise Stopped(f"{self.name}: training is done and saved, its evaluation is not")

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Answers signals while this lasts. Main thread only, after `jax.distributed` is set up."""
        self._several = jax.distributed.is_initialized()  # starts no devices, unlike a count
        heard = [signal.SIGINT] if self._several else list(SIGNALS)
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        # With a Python handler in place the interpreter writes the signal's number to this pipe at
        # once, in whatever the main thread is.
        before = {number: signal.signal(number, lambda *_: None) for number in heard}
        woken = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        watcher = threading.Thread(target=self._watch, args=(reading,), daemon=True)
        watcher.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(woken)
            for number, handler in before.items():
                signal.signal(number, handler)
            os.close(writing)  # ends the watcher
            watcher.join()
            os.close(reading)

    def _watch(self, reading: int) -> None:
        while received := os.read(reading, 1):
            if received[0] not in SIGNALS:
                continue
            number = signal.Signals(received[0])
            if self._asked is not None:
                _say(f"{number.name} again: ending at once; what was saved stays")
                os._exit(128 + number)
            self._asked = number
            if self._several:
                _say(f"{number.name}: all processes stop at their next common step, and save")
                os.kill(os.getpid(), signal.SIGTERM)
            elif self._unsaved:
                _say(f"{number.name}: finishing the step and saving; once more ends at once")
            else:
                _say(f"{number.name}: nothing was left to save; the same command goes on from here")
                os._exit(0)


def _say(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # nobody may be listening any more
        print(f"\n{text}", file=sys.stderr, flush=True)
        sys.stdout.flush()
