"""What a run says while it runs: metrics.jsonl, TensorBoard events, a progress line, tables, image grids.

Nothing here touches a device: values arrive as Python, NumPy or (already computed) JAX scalars. A caller
that keeps the accelerator busy hands over the metrics of an earlier step, because reading a JAX scalar
waits for it.
"""

from __future__ import annotations

import json
import logging
import math
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from vapi_jax.common.files import write_all, write_atomically

logger = logging.getLogger(__name__)

RESERVED_KEYS = ("step", "time", "non_finite")

TENSORBOARD = "tensorboard"
"""Folder of a run for TensorBoard's events and traces."""


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
        taken back, so that curves have no duplicates. None keeps everything.
    """

    def __init__(self, workdir: str | Path, active: bool = True, after: int | None = None):
        self.active = active
        self.path = Path(workdir) / "metrics.jsonl"
        if not active:
            return
        events = self.path.parent / TENSORBOARD
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if after is not None:
            _rewind(self.path, after)
        # A killed run may have left half a line; the next object must not continue it.
        before = self.path.read_bytes() if self.path.exists() else b""
        self._file = self.path.open("ab", buffering=0)
        if before and not before.endswith(b"\n"):
            write_all(self._file, b"\n", self.path)
        self._events = _EventFile(events, after)

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
            self.active = False
            self._file.close()
            self._events.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class _EventFile:
    """A new TensorBoard event file; every event is whole in it before the call returns.

    tensorboardX's own writer hands events to a thread, which dies in silence where the disk is full, and
    the run then waits for it forever; and it names files by the clock, so that two of one second are
    one, and a clock that goes back misorders them. Its events are used here, its writer is not.

    Args:
      folder: made if absent.
      after: TensorBoard forgets what earlier files say of later steps (a purge, as every session
        that starts after the first of a folder asks for it); None keeps everything.
    """

    def __init__(self, folder: Path, after: int | None):
        from tensorboardX.proto import event_pb2  # 0.3 s, needed by one process only

        folder.mkdir(parents=True, exist_ok=True)
        parts = [path.name.split(".")[3] for path in folder.glob("events.out.tfevents.*")]
        number = 1 + max((int(part) for part in parts if part.isdigit()), default=0)
        self._path = folder / f"events.out.tfevents.{number:010d}.vapi_jax"
        self._file, self._event = self._path.open("xb", buffering=0), event_pb2.Event
        self._append(file_version="brain.Event:2")
        if after is not None:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._append(step=after + 1, session_log=start)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the numbers of one step."""
        self._append(
            step=step,
            summary={"value": [{"tag": n, "simple_value": v} for n, v in values.items()]},
        )

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Writes an image, uint8 [H, W, 3]."""
        from tensorboardX import summary

        self._append(step=step, summary=summary.image(name, image, dataformats="HWC"))

    def _append(self, **fields: Any) -> None:
        from tensorboardX.record_writer import masked_crc32c

        data = self._event(wall_time=time.time(), **fields).SerializeToString()
        size = struct.pack("<Q", len(data))
        sums = [struct.pack("<I", masked_crc32c(part)) for part in (size, data)]
        write_all(self._file, size + sums[0] + data + sums[1], self._path)

    def close(self) -> None:
        self._file.close()


def _rewind(path: Path, step: int) -> None:
    """Removes the rows of later steps from a metrics.jsonl, and lines that are not whole rows."""
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if _is_row_until(line, step)]
    if len(kept) < len(lines):
        write_atomically(path, b"".join(kept).decode())


def _is_row_until(line: bytes, step: int) -> bool:
    try:
        row = json.loads(line)
        return line.endswith(b"\n") and row["step"] <= step
    except (ValueError, TypeError, KeyError):
        return False


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
