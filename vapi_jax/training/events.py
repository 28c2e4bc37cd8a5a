"""TensorBoard event files, and cutting them and metrics.jsonl back where a run is resumed.

tensorboardX's own writer hands events to a thread: when the disk is full the thread dies and the run
waits for it forever. And it names files by the clock, so a clock that goes back overwrites or
misorders them. Its file format is used here, its writer is not.
"""

from __future__ import annotations

import io
import json
import struct
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vapi_jax.common.files import write_all, write_atomically

SAMPLED = "sampled/"
"""Begins the names of numbers and pictures of free-running samples in training."""

_PATTERN = "events.out.tfevents.*"


class EventWriter:
    """Appends events to a new file of `folder`, each flushed before the call returns.

    Args:
      folder: made if absent.
    """

    def __init__(self, folder: Path):
        from tensorboardX.proto import event_pb2, summary_pb2  # 0.3 s, needed by one process only

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        folder.mkdir(parents=True, exist_ok=True)
        numbers = [
            int(part) for p in folder.glob(_PATTERN) if (part := p.name.split(".")[3]).isdigit()
        ]
        number = max(numbers, default=0) + 1
        self._path = folder / f"events.out.tfevents.{number:010d}.vapi_jax"
        self._file = self._path.open("xb", buffering=0)
        self._append(self._event(wall_time=time.time(), file_version="brain.Event:2"))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the numbers of one step."""
        summary = self._summary()
        for name, value in values.items():
            summary.value.add(tag=name, simple_value=value)
        self._append(self._event(wall_time=time.time(), step=step, summary=summary))

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Writes an image, uint8 [H, W, 3]."""
        from PIL import Image

        png = io.BytesIO()
        Image.fromarray(image).save(png, "PNG")
        height, width, _ = image.shape
        summary = self._summary()
        value = summary.value.add(tag=name)
        value.image.height, value.image.width, value.image.colorspace = height, width, 3
        value.image.encoded_image_string = png.getvalue()
        self._append(self._event(wall_time=time.time(), step=step, summary=summary))

    def _append(self, event: Any) -> None:
        from tensorboardX.record_writer import masked_crc32c

        data = event.SerializeToString()
        header = struct.pack("<Q", len(data))
        sums = [struct.pack("<I", masked_crc32c(part)) for part in (header, data)]
        write_all(self._file, header + sums[0] + data + sums[1], self._path)

    def close(self) -> None:
        self._file.close()


def read_records(path: Path) -> Iterator[tuple[Any, bytes]]:
    """The events of a file with the bytes of their records, up to the first that is not whole."""
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from tensorboardX.proto.event_pb2 import Event

    data, position = path.read_bytes(), 0
    while position + 12 <= len(data):
        (length,) = struct.unpack_from("<Q", data, position)
        end = position + 12 + length + 4
        if end > len(data):
            return
        try:
            event = Event.FromString(data[position + 12 : end - 4])
        except DecodeError:
            return
        yield event, data[position:end]
        position = end


def rewind_events(folder: Path, step: int) -> None:
    """Removes what a run wrote after it had saved `step`: later numbers, and its final pictures."""
    for path in sorted(folder.glob(_PATTERN)):
        kept = [record for event, record in read_records(path) if _is_before(event, step)]
        whole = b"".join(kept)
        if len(whole) == path.stat().st_size:
            continue
        partial = path.with_name("rewound.partial")  # TensorBoard reads whatever says "tfevents"
        partial.write_bytes(whole)
        partial.replace(path)


def _is_before(event: Any, step: int) -> bool:
    if event.HasField("file_version"):
        return True
    final = any(v.HasField("image") and not v.tag.startswith(SAMPLED) for v in event.summary.value)
    return event.step < step or (event.step == step and not final)


def rewind_history(path: Path, step: int) -> None:
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
