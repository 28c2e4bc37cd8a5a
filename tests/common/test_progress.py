"""Progress for a person, in a log file and on a terminal, and times of phases."""

import contextlib
import io
import logging
import re

import pytest

from vapi_jax.common import progress


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
    with progress.ProgressBar(10, "vapi", stream=stream) as bar:
        for step in range(1, 11):
            # The first step compiles for a minute; the rate afterwards is 4 s a step.
            clock.now += 60 if step == 1 else 4
            bar.update(step, images=8, metrics={"reward": -0.5 + step / 100})
    lines = stream.getvalue().splitlines()
    # The beginning, step 1, then the first ones at least 10 s later, and the last.
    steps = [int(re.search(r"(\d+)/10", line)[1]) for line in lines]
    assert steps == [0, 1, 4, 7, 10]
    assert all(line.startswith("vapi: ") for line in lines)
    assert "[01:00<?" in lines[1]
    assert " 40%" in lines[2] and "[01:12<00:24" in lines[2] and "reward -0.46" in lines[2]
    assert "images/s 2," in lines[3]
    assert "100%" in lines[4] and "[01:36<00:00" in lines[4]


def test_progress_on_a_terminal_is_one_line(clock):
    stream = Terminal()
    with progress.ProgressBar(3, "base", stream=stream) as bar:
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
        progress.ProgressBar(10, "x", stream=stream) as bar,
    ):
        bar.update(1)
        clock.now += 1
        bar.update(2)
        raise KeyboardInterrupt
    assert " 2/10 " in stream.getvalue().splitlines()[-1]


def test_progress_goes_on_where_an_earlier_run_was(clock):
    stream = io.StringIO()
    with progress.ProgressBar(1000, "x", stream=stream, first_step=900) as bar:
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
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(ticks))
    timer = progress.Timer()
    timer.resume({"total": 50.0, "train": 30.0, "evaluation": 4.0})
    with timer.phase("train"):
        pass
    assert timer.summary() == {"total": 60.0, "train": 32.0, "evaluation": 4.0}


def test_timer_accumulates_even_when_a_phase_fails(monkeypatch):
    ticks = iter([0.0, 1.0, 3.0, 4.0, 4.5, 10.0])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(ticks))
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


@pytest.fixture
def silent(monkeypatch):
    monkeypatch.setattr(progress, "_silent", False)
    logger = logging.getLogger("vapi_jax")
    level = logger.level
    logger.setLevel(logging.INFO)
    yield progress.silence
    logger.setLevel(level)


def shown(capsys):
    stream = io.StringIO()
    with progress.ProgressBar(2, "steps", stream=stream) as bar:
        bar.update(1, 4, {"loss": 1.0})
        bar.update(2, 4, {"loss": 0.5})
    progress.announce("a banner")
    return stream.getvalue(), capsys.readouterr().out


def test_a_silent_process_shows_no_progress_and_warns(silent, capsys, caplog):
    before, banner = shown(capsys)
    assert "2/2" in before
    assert banner == "a banner\n"
    silent()
    assert shown(capsys) == ("", "")
    logging.getLogger("vapi_jax.any").info("going on")
    logging.getLogger("vapi_jax.any").warning("left out")
    assert caplog.messages == ["left out"]
