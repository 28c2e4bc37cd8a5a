"""How far a long piece of work has come, and how long it took."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self, TextIO

from vapi_jax.common.tables import cell


class Progress:
    """One line of progress: step/total, percent, images/s, a few metrics, elapsed time and ETA.

    On a terminal the line is rewritten in place; elsewhere (a log file, CI) a new line is written every
    `interval` seconds. The last step is always shown.

    Args:
      total_steps: steps of the whole run.
      name: what runs, the first word of the line.
      interval: seconds between lines when the stream is no terminal.
      stream: where to write, standard error by default (standard output is for results).
      first_step: steps that an earlier run has already done.
    """

    def __init__(
        self,
        total_steps: int,
        name: str,
        *,
        interval: float = 10.0,
        stream: TextIO | None = None,
        first_step: int = 0,
    ):
        self.total_steps = total_steps
        self.name = name
        self.interval = interval
        self.stream = sys.stderr if stream is None else stream
        self.terminal = self.stream.isatty()
        self._start = time.monotonic()
        # (time, step, images so far). Rates come from a window that opens after the first update, so
        # compilation does not spoil the ETA of everything after it.
        self._window: deque[tuple[float, int, int]] = deque(maxlen=32)
        self._images = 0
        self._step = first_step
        self._metrics: dict[str, Any] = {}
        self._shown: float | None = None
        self._shown_step = -1

    def update(self, step: int, images: int = 0, metrics: Mapping[str, Any] | None = None) -> None:
        """Tells that `step` steps are done; `images` were processed since the last call."""
        now = time.monotonic()
        self._step = step
        self._images += images
        self._window.append((now, step, self._images))
        if metrics is not None:
            self._metrics = dict(metrics)
        pause = 0.1 if self.terminal else self.interval
        if self._shown is None or now - self._shown >= pause or step >= self.total_steps:
            self._show(now)

    def line(self, now: float | None = None) -> str:
        """The text of the line at monotonic time `now`."""
        now = time.monotonic() if now is None else now
        percent = 100 * self._step / max(self.total_steps, 1)
        width = len(str(self.total_steps))
        parts = [f"{self.name} {self._step:{width}d}/{self.total_steps} {percent:3.0f}%"]
        eta = None
        if len(self._window) > 1:
            (t0, step0, images0), (t1, step1, images1) = self._window[0], self._window[-1]
            if t1 > t0 and images1 > images0:
                parts.append(f"{(images1 - images0) / (t1 - t0):.3g} images/s")
            if step1 > step0:
                eta = (t1 - t0) / (step1 - step0) * (self.total_steps - self._step)
        parts += [f"{name} {cell(value)}" for name, value in self._metrics.items()]
        parts.append(f"elapsed {format_duration(now - self._start)}")
        if eta is not None and self._step < self.total_steps:
            parts.append(f"ETA {format_duration(eta)}")
        return "  ".join(parts)

    def _show(self, now: float) -> None:
        text = self.line(now)
        # \x1b[K clears what a longer line has left behind.
        self.stream.write(f"\r{text}\x1b[K" if self.terminal else f"{text}\n")
        self.stream.flush()
        self._shown, self._shown_step = now, self._step

    def close(self) -> None:
        """Shows the last step if that has not happened yet and ends the line."""
        if self._shown_step != self._step and self._window:
            self._show(time.monotonic())
        if self.terminal and self._shown is not None:
            self.stream.write("\n")
            self.stream.flush()
        self._shown, self._shown_step = None, self._step

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class ByteProgress:
    """`Progress` counted in megabytes: a context that gives the function to tell bytes to."""

    def __init__(self, total: int, name: str):
        self._total = max(total, 1)
        self._progress = Progress(-(-self._total // 10**6), f"{name} (MB)")
        self._done = self._shown = 0

    def __enter__(self) -> Callable[[int], None]:
        self._progress.__enter__()
        return self._tick

    def __exit__(self, *exc: object) -> None:
        self._progress.__exit__(*exc)

    def _tick(self, count: int) -> None:
        self._done += count
        step = self._done * self._progress.total_steps // self._total
        if step != self._shown:
            self._progress.update(step)
            self._shown = step


class Timer:
    """Seconds spent per named phase, accumulated over any number of visits.

    A phase inside a phase counts in both. JAX returns before the device has finished: block inside the
    phase on what it computed, or the time lands in the next one.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._start = time.perf_counter()

    def resume(self, before: Mapping[str, float]) -> None:
        """Adds what `summary` said in an earlier life of the run."""
        before = dict(before)
        self._start -= before.pop("total", 0.0)
        for name, seconds in before.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def summary(self) -> dict[str, float]:
        """{"total": seconds since construction, phase: seconds, ...}, rounded to milliseconds."""
        total = time.perf_counter() - self._start
        return {name: round(s, 3) for name, s in ({"total": total} | self.seconds).items()}


def format_duration(seconds: float) -> str:
    """0.42 -> '0.4 s', 42 -> '42 s', 125 -> '2 min 05 s', 3725 -> '1 h 02 min', 93600 -> '1 d 02 h'."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 0:
        return "-" + format_duration(-seconds)
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24:02d} h"
