"""metrics.py: what a run writes while it runs."""

import json

import numpy as np
import pytest

from tests.helpers.events import read_tensorboard
from vapi_jax.training import logging as metrics


def strict(line):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(line, parse_constant=refuse)


def test_writer_jsonl_and_tensorboard(tmp_path):
    import jax.numpy as jnp

    with metrics.MetricsWriter(tmp_path) as writer:
        writer.write(1, {"reward": jnp.float32(-0.5), "count": np.int64(3), "ok": True})
        # Flushed line by line: readable while the run goes on.
        assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1
        writer.write(2, {"loss": float("nan"), "norm": np.inf, "ce": jnp.bfloat16(0.25)})
        writer.write_images(2, {"samples": np.zeros((8, 8, 3), np.uint8)})
    first, second = map(strict, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert first["step"] == 1 and first["reward"] == -0.5 and first["count"] == 3
    assert first["ok"] is True and "non_finite" not in first
    assert second["loss"] is None and second["norm"] is None and second["ce"] == 0.25
    assert second["non_finite"] == ["loss", "norm"]
    events = read_tensorboard(tmp_path / "tensorboard")
    assert ("reward", 1, -0.5) in events and ("samples", 2, "image") in events
    assert not [event for event in events if event[0] == "loss"]


def test_writer_appends_after_a_half_written_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "a": 1}\n{"step": 2, "a"')
    with metrics.MetricsWriter(tmp_path) as writer:
        writer.write(2, {"a": 2})
        writer.write(2, {"b": 5})
        writer.write(3, {"a": 3})
    rows = metrics.read_history(tmp_path / "metrics.jsonl")
    assert [(row["step"], row.get("a"), row.get("b")) for row in rows] == [
        (1, 1, None),
        (2, 2, 5),
        (3, 3, None),
    ]


def test_a_resumed_run_takes_back_what_came_after_its_checkpoint(tmp_path):
    image = {"samples": np.zeros((8, 8, 3), np.uint8)}
    with metrics.MetricsWriter(tmp_path, after=-1) as writer:
        for step in (1, 2, 3):
            writer.write(step, {"a": step})
        writer.write_images(2, image)
        writer.write_images(2, {"sampled/grid": image["samples"]})
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"step": 1}')  # half a row, and a whole object
    for _ in range(2):  # and once more, from the same checkpoint
        with metrics.MetricsWriter(tmp_path, after=2) as writer:
            writer.write(3, {"a": 30})
            writer.write_images(3, image)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["step"], row["a"]) for row in rows] == [(1, 1), (2, 2), (3, 30)]
    pictures = [("samples", 2, "image"), ("sampled/grid", 2, "image"), ("samples", 3, "image")]
    assert sorted(read_tensorboard(tmp_path / "tensorboard"), key=str) == sorted(
        [("a", 1, 1.0), ("a", 2, 2.0), ("a", 3, 30.0), *pictures], key=str
    )
    with metrics.MetricsWriter(tmp_path, after=-1):
        pass
    assert path.read_text() == ""
    assert read_tensorboard(tmp_path / "tensorboard") == []


def test_rows_from_before_the_checkpoint_keep_their_bytes(tmp_path):
    path = tmp_path / "metrics.jsonl"
    kept = '{"step": 1, "a": 0.10000000000000001}\n{"step":2}\n'
    path.write_text(kept + '{"step": 3, "a": 1}\n[]\n{"a": 1}\nnoise\n{"step": 2, "b"')
    with metrics.MetricsWriter(tmp_path, after=2):
        pass
    assert path.read_text() == kept


def test_a_torn_event_file_gives_up_only_its_torn_record(tmp_path):
    with metrics.MetricsWriter(tmp_path) as writer:
        for step in (1, 2, 3):
            writer.write(step, {"a": step})
    (events,) = (tmp_path / "tensorboard").iterdir()
    whole = events.read_bytes()
    events.write_bytes(whole[:-5])
    with metrics.MetricsWriter(tmp_path, after=9) as writer:
        writer.write(3, {"a": 3})
    assert read_tensorboard(tmp_path / "tensorboard") == [("a", s, float(s)) for s in (1, 2, 3)]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2


def test_tensorboard_itself_accepts_the_records(tmp_path):
    """The framing by an independent reader of the format: lengths and masked CRC-32C."""
    with metrics.MetricsWriter(tmp_path) as writer:
        writer.write(7, {"a": 0.5, "b": 1.5})
    (path,) = (tmp_path / "tensorboard").iterdir()
    data, position, records = path.read_bytes(), 0, []
    while position < len(data):
        header = data[position : position + 8]
        size = int.from_bytes(header, "little")
        body = data[position + 12 : position + 12 + size]
        sums = data[position + 8 : position + 12], data[position + 12 + size : position + 16 + size]
        for part, found in zip((header, body), sums, strict=True):
            assert int.from_bytes(found, "little") == masked_crc32c(part)
        records.append(body)
        position += 16 + size
    assert len(records) == 2
    assert b"brain.Event:2" in records[0]


def masked_crc32c(data):
    """Castagnoli's polynomial bit by bit, and TensorFlow's mask."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def test_event_files_are_numbered_whatever_the_clock_says(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics.time, "time", lambda: 1.0)
    for step in (1, 2):
        with metrics.MetricsWriter(tmp_path) as writer:
            writer.write(step, {"a": step})
    assert [p.name.split(".")[3] for p in sorted((tmp_path / "tensorboard").iterdir())] == [
        "0000000001",
        "0000000002",
    ]


def test_writer_refuses_what_it_cannot_write(tmp_path):
    with metrics.MetricsWriter(tmp_path) as writer:
        with pytest.raises(ValueError, match="reserved"):
            writer.write(1, {"step": 3})
        with pytest.raises(TypeError, match="scalar"):
            writer.write(1, {"a": np.zeros(2)})
        with pytest.raises(TypeError, match="number"):
            writer.write(1, {"a": "high"})
        with pytest.raises(ValueError, match="uint8"):
            writer.write_images(1, {"a": np.zeros((2, 2, 3))})
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_inactive_writer_makes_no_files(tmp_path):
    with metrics.MetricsWriter(tmp_path / "run", active=False) as writer:
        writer.write(1, {"a": 1.0})
    assert not (tmp_path / "run").exists()
