"""metrics.py: what a run writes while it runs."""

import contextlib
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.events import read_tensorboard
from vapi_jax.common import progress, tables
from vapi_jax.common.files import disk_trouble, write_all
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


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_said_with_the_name_of_the_file():
    path = Path("/dev/full")
    with (
        path.open("wb", buffering=0) as file,
        pytest.raises(OSError, match="No space left") as error,
    ):
        write_all(file, b"row", path)
    assert disk_trouble(error.value) == (
        "the disk is full at /dev/full (No space left on device). Nothing saved before is lost: put "
        "this right and run the same command again"
    )
    assert disk_trouble(FileNotFoundError(2, "No such file")) is None


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


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 1000.0

        def __call__(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(progress.time, "time", clock)
    monkeypatch.setattr("tqdm.std.time", clock)
    return clock


def test_progress_in_a_log(clock):
    stream = io.StringIO()
    with progress.Progress(10, "vapi", stream=stream) as bar:
        for step in range(1, 11):
            # The first step compiles for a minute; the rate afterwards is 4 s a step.
            clock.now += 60 if step == 1 else 4
            bar.update(step, images=8, metrics={"reward": -0.5 + step / 100})
    lines = stream.getvalue().splitlines()
    # The beginning, step 1, then the first ones at least 10 s later, and the last.
    steps = [int(re.search(r"(\d+)/10", line)[1]) for line in lines]
    assert steps == [0, 1, 4, 7, 10]
    assert all(line.startswith("vapi: ") for line in lines)
    assert " 40%" in lines[2] and "[01:12<00:24" in lines[2] and "reward -0.46" in lines[2]
    assert "images/s 2," in lines[3]
    assert "100%" in lines[4] and "[01:36<00:00" in lines[4]


def test_progress_on_a_terminal_is_one_line(clock):
    stream = Terminal()
    with progress.Progress(3, "base", stream=stream) as bar:
        for step in range(1, 4):
            clock.now += 1
            bar.update(step)
    text = stream.getvalue()
    assert text.count("\n") == 1 and text.endswith("\n") and " 3/3 " in text
    assert text.count("\r") >= 4


def test_progress_of_an_interrupted_run_shows_the_last_step(clock):
    stream = io.StringIO()
    with (
        contextlib.suppress(KeyboardInterrupt),
        progress.Progress(10, "x", stream=stream) as bar,
    ):
        bar.update(1)
        clock.now += 1
        bar.update(2)
        raise KeyboardInterrupt
    assert " 2/10 " in stream.getvalue().splitlines()[-1]


def test_progress_goes_on_where_an_earlier_run_was(clock):
    stream = io.StringIO()
    with progress.Progress(1000, "x", stream=stream, first_step=900) as bar:
        for step in (901, 902, 903, 904):
            clock.now += 5
            bar.update(step)
    assert "903/1000" in stream.getvalue() and "<08:05" in stream.getvalue()


def test_bytes_are_counted_in_units_that_suit_them(clock, capsys):
    with progress.byte_progress(4 * 10**9, "convert") as tick:
        for _ in range(4):
            clock.now += 20
            tick(10**9)
    lines = capsys.readouterr().err.splitlines()
    assert "1.00G/4.00G" in lines[1] and "50.0MB/s" in lines[1] and "4.00G/4.00G" in lines[-1]


def test_a_timer_goes_on_from_an_earlier_life(monkeypatch):
    ticks = iter([100.0, 101.0, 103.0, 110.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(ticks))
    timer = progress.Timer()
    timer.resume({"total": 50.0, "train": 30.0, "evaluation": 4.0})
    with timer.phase("train"):
        pass
    assert timer.summary() == {"total": 60.0, "train": 32.0, "evaluation": 4.0}


def test_timer_accumulates_even_when_a_phase_fails(monkeypatch):
    ticks = iter([0.0, 1.0, 3.0, 4.0, 4.5, 10.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(ticks))
    timer = progress.Timer()
    with timer.phase("train"):
        pass
    with pytest.raises(KeyError), timer.phase("train"):
        raise KeyError("x")
    assert timer.summary() == {"total": 10.0, "train": 2.5}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.42, "0.4 s"),
        (9.97, "10 s"),
        (59.6, "1 min 00 s"),
        (125, "2 min 05 s"),
        (3599.7, "1 h 00 min"),
        (3725, "1 h 02 min"),
        (86390, "1 d 00 h"),
        (93600, "1 d 02 h"),
        (-5, "-5.0 s"),
        (float("inf"), "?"),
    ],
)
def test_format_duration(seconds, text):
    assert progress.format_duration(seconds) == text


def test_table_is_aligned():
    text = tables.format_table(
        [["base, T=1", -0.50512, "471.6 ± 1.8"], ["VA-π", None, "458.4 ± 1.0"]],
        ["model", "reward", "distance"],
    )
    assert text.splitlines() == [
        "model       reward     distance",
        "---------  -------  -----------",
        "base, T=1  -0.5051  471.6 ± 1.8",
        "VA-π             -  458.4 ± 1.0",
    ]
    with pytest.raises(ValueError, match="cells"):
        tables.format_table([[1]], ["a", "b"])
