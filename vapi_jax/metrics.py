"""What a run says while it runs: metrics.jsonl, TensorBoard events, a progress line, tables, image grids.

Nothing here touches a device: values arrive as Python, NumPy or (already computed) JAX scalars. A caller
that keeps the accelerator busy hands over the metrics of an earlier step, because reading a JAX scalar
waits for it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import numbers
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TextIO

import numpy as np

from vapi_jax.events import EventWriter, rewind_events, rewind_history
from vapi_jax.files import write_all

logger = logging.getLogger(__name__)

RESERVED_KEYS = ("step", "time", "non_finite")


def _python_scalar(name: str, value: Any) -> bool | int | float:
    """A Python number from a Python, NumPy or JAX scalar. Raises TypeError for anything else."""
    array = np.asarray(value)
    if array.size != 1:
        raise TypeError(f"metric {name!r} must be a scalar, got shape {array.shape}")
    if array.dtype.kind == "b":
        return bool(array.item())
    if array.dtype.kind in "iu":
        return int(array.item())
    try:
        # bfloat16 has kind "V" in NumPy, so ask for the conversion and not for the kind.
        return float(array.astype(np.float64).item())
    except (TypeError, ValueError) as error:
        raise TypeError(f"metric {name!r} must be a number, got {value!r}") from error


class MetricsWriter:
    """Appends one strict JSON object per `write` to `workdir/metrics.jsonl`, and the same to TensorBoard.

    JSON has no NaN and no infinity: such a value is written as null and its name listed under
    `non_finite`. Every line is written at once, so a killed run keeps all but the line it was writing.

    Args:
      workdir: folder of the run, made if absent.
      active: False writes nothing (every process but the first of a multi-process run).
      after: the step that a run goes on from; what an earlier life of it wrote of later steps is
        removed, so that curves have no duplicates. None keeps everything.
    """

    def __init__(self, workdir: str | Path, active: bool = True, after: int | None = None):
        self.active = active
        self.path = Path(workdir) / "metrics.jsonl"
        if not active:
            return
        events = self.path.parent / "tensorboard"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if after is not None:
            rewind_history(self.path, after)
            rewind_events(events, after)
        # A killed run may have left half a line; the next object must not continue it.
        before = self.path.read_bytes() if self.path.exists() else b""
        self._file = self.path.open("ab", buffering=0)
        if before and not before.endswith(b"\n"):
            write_all(self._file, b"\n", self.path)
        self._events = EventWriter(events)

    def write(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Writes the scalars of one step.

        Raises:
          ValueError: a name is one of `RESERVED_KEYS`.
          TypeError: a value is not a scalar number.
        """
        if not self.active:
            return
        if clash := [name for name in scalars if name in RESERVED_KEYS]:
            raise ValueError(f"metric names {clash} are reserved")
        values = {name: _python_scalar(name, value) for name, value in scalars.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        row: dict[str, Any] = {"step": int(step), "time": round(time.time(), 3)} | finite
        if non_finite := [name for name, value in finite.items() if value is None]:
            row["non_finite"] = non_finite
        write_all(self._file, f"{json.dumps(row, allow_nan=False)}\n".encode(), self.path)
        self._events.scalars(
            int(step), {name: value for name, value in values.items() if math.isfinite(value)}
        )

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Writes images, name -> uint8 [H, W, 3] (a grid, say), to TensorBoard."""
        if not self.active:
            return
        for name, image in images.items():
            image = np.asarray(image)
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
                raise ValueError(
                    f"image {name!r}: want uint8 [H, W, 3], got {image.dtype} {image.shape}"
                )
            self._events.image(int(step), name, image)

    def close(self) -> None:
        if self.active:
            self._file.close()
            self._events.close()
            self.active = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def read_history(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, one per step in order of step.

    Rows of the same step are merged, later values winning: a resumed run repeats the steps after its
    checkpoint, and training and evaluation metrics may come in separate lines. A half-written line
    (the run was killed) is skipped with a warning.
    """
    rows: dict[int, dict[str, Any]] = {}
    with Path(path).open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                logger.warning("%s, line %d: not a complete JSON object, skipped", path, number)
                continue
            rows.setdefault(row["step"], {}).update(row)
    return [rows[step] for step in sorted(rows)]


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
        parts += [f"{name} {_cell(value)}" for name, value in self._metrics.items()]
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


def to_uint8(images: Any) -> np.ndarray:
    """Images in [-1, 1] to uint8 as published evaluations do it: truncate(clamp(127.5 x + 128, 0, 255)).

    Args:
      images: any shape, float. Values outside [-1, 1] are clamped.

    Raises:
      ValueError: a value is not finite.
    """
    images = np.asarray(images, np.float32)
    if not np.isfinite(images).all():
        raise ValueError("images hold NaN or infinite values")
    return np.clip(np.float32(127.5) * images + np.float32(128), 0, 255).astype(np.uint8)


def image_grid(
    images: Any, columns: int | None = None, pad: int = 2, scale: int = 1, background: int = 255
) -> np.ndarray:
    """Lays images out in rows, left to right and top to bottom.

    Args:
      images: uint8 [N, H, W, 3].
      columns: images in a row; the smallest square that holds them all by default.
      pad: pixels between and around the images, in pixels of the result.
      scale: every pixel becomes scale x scale pixels (no interpolation).
      background: grey value of the padding and of empty places.

    Returns:
      uint8 [rows·(H·scale + pad) + pad, columns·(W·scale + pad) + pad, 3].
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"want uint8 [N, H, W, 3], got {images.dtype} {images.shape}")
    columns = max(1, math.ceil(math.sqrt(len(images)))) if columns is None else columns
    if columns < 1 or pad < 0 or scale < 1:
        raise ValueError(f"want columns >= 1, pad >= 0, scale >= 1, got {columns}, {pad}, {scale}")
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    count, height, width, _ = images.shape
    rows = math.ceil(count / columns)
    grid = np.full(
        (rows * (height + pad) + pad, columns * (width + pad) + pad, 3), background, np.uint8
    )
    for index, image in enumerate(images):
        top = pad + (index // columns) * (height + pad)
        left = pad + (index % columns) * (width + pad)
        grid[top : top + height, left : left + width] = image
    return grid


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, str | bool):
        return str(value)
    if isinstance(value, numbers.Integral):
        return str(value)
    return f"{float(value):.4g}"


def format_table(rows: Sequence[Sequence[Any]], headers: Sequence[str]) -> str:
    """Plain aligned text: the first column to the left, the others to the right, None as '-'.

    Raises:
      ValueError: a row has another number of cells than the header.
    """
    for row in rows:
        if len(row) != len(headers):
            raise ValueError(f"row {list(row)} has {len(row)} cells, the header {len(headers)}")
    texts = [list(headers)] + [[_cell(value) for value in row] for row in rows]
    widths = [max(len(row[i]) for row in texts) for i in range(len(headers))]

    def line(cells: Sequence[str]) -> str:
        rest = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return "  ".join([cells[0].ljust(widths[0]), *rest]).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([line(texts[0]), rule, *map(line, texts[1:])])


def print_table(
    rows: Sequence[Sequence[Any]], headers: Sequence[str], stream: TextIO | None = None
) -> None:
    """Prints `format_table` to standard output (or `stream`)."""
    print(format_table(rows, headers), file=stream, flush=True)
