"""How far a long piece of work has come, and how long it took."""

from __future__ import annotations

import contextlib
import logging
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self, TextIO

from tqdm import tqdm

from vapi_jax.common.tables import cell

INTERVAL = 10.0
"""Seconds between lines where they are not shown on a terminal."""


_silent = False


def silence() -> None:
    """From now on this process shows no progress: of several that do one work, one shows it for all.

    Errors and warnings are its own, and stay.
    """
    global _silent
    _silent = True
    logging.getLogger("vapi_jax").setLevel(logging.WARNING)


def announce(text: str) -> None:
    """Prints what people may want to know of the work, unless another process does."""
    if not _silent:
        print(text, flush=True)


class _Lines:
    """Takes a bar that is redrawn in place, and writes lines that stay, for a log file."""

    def __init__(self, stream: TextIO):
        self._stream, self._shown = stream, ""

    def write(self, text: str) -> None:
        line = text.strip()
        step = line.partition("[")[0]  # closing shows a step once more that may be there already
        if line and step != self._shown:
            self._stream.write(f"{line}\n")
            self._shown = step

    def flush(self) -> None:
        self._stream.flush()


def _bar(name: str, total: int, stream: TextIO | None = None, **more: Any) -> tqdm:
    stream = sys.stderr if stream is None else stream
    # A terminal that does not know its size says 0, and nothing would be shown; this makes 80 x 24.
    columns, lines = shutil.get_terminal_size()
    shown: Any = {"file": stream, "ncols": columns, "nrows": lines}
    if not stream.isatty():
        shown = {"file": _Lines(stream), "mininterval": INTERVAL, "maxinterval": INTERVAL}
    return tqdm(desc=name, total=total, miniters=1, disable=_silent, **shown, **more)


class ProgressBar:
    """A bar with steps, percent, elapsed and remaining time, images/s and a few metrics.

    On a terminal it is redrawn in place; elsewhere (a log file, CI) a line is written every `INTERVAL`
    seconds. The last step is always shown, also of a run that is interrupted.

    Args:
      total_steps: steps of the whole run.
      name: what runs, the first word of the line.
      stream: where to write, standard error by default (standard output is for results).
      first_step: steps that an earlier run has already done.
    """

    def __init__(
        self, total_steps: int, name: str, *, stream: TextIO | None = None, first_step: int = 0
    ):
        self._bar = _bar(name, total_steps, stream, initial=first_step, unit="step")
        self._begun = False

    def update(self, step: int, images: int = 0, metrics: Mapping[str, Any] | None = None) -> None:
        """Tells that `step` steps are done; `images` were processed since the last call."""
        bar, done = self._bar, step - self._bar.n
        shown = dict(metrics or {})
        if images and done > 0 and (rate := bar.format_dict["rate"]):
            shown = {"images/s": rate * images / done, **shown}
        if shown:
            bar.set_postfix_str(
                ", ".join(f"{k} {cell(v)}" for k, v in shown.items()), refresh=False
            )
        if self._begun:
            bar.update(done)
        else:  # the first step compiles: rates and what remains are told from the next one on
            self._begun, bar.initial, bar.n, bar.last_print_n = True, step, step, step
            bar.last_print_t = time.time()
            bar.refresh()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.close()


@contextlib.contextmanager
def byte_progress(total: int, name: str) -> Iterator[Callable[[int], Any]]:
    """Progress counted in bytes: a context that gives the function to tell bytes to."""
    with _bar(name, total, unit="B", unit_scale=True) as bar:
        yield bar.update


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
