"""Runs that are killed, stopped, starved and confused, and end as if nothing had happened.

Every life is a process of its own (see `tests.lives`). What was seen goes into docs/reliability.md.
"""

import collections
import dataclasses
import filecmp
import json
import os
import random
import signal
import subprocess
import time

import pytest

from tests.lives import KILLED, Life, begin, live
from tests.observations import observe
from tests.test_metrics import read_tensorboard
from tests.test_train import make_tiny_config
from vapi_jax.checkpoint.manifest import read_manifest

pytestmark = pytest.mark.slow

STEPS, EVERY = 240, 6
RANDOM_KILLS = 20
CHANGES = {
    "mesh": {"data": 1, "fsdp": 2},
    "checkpoint": {"every": EVERY},
    "eval": {"every": 40, "images": 8, "grid_classes": 2, "grid_per_class": 2},
}
CLOCKS = {"time", "images_per_second"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture
def new_life(cache, tmp_path):
    """Lives of this test, by default all in one work directory."""

    def make(config, workdir=None, hook=(), **more):
        workdir = workdir or tmp_path / "run"
        return Life(config, workdir, tmp_path / "log.txt", cache, hook, **more)

    return make


def tiny(task="vapi", **changes):
    return make_tiny_config(task, **{"steps": STEPS, **CHANGES, **changes})


def short(**changes):
    return tiny(**{"steps": 12, **changes})


@pytest.fixture(scope="module")
def straight(cache, tmp_path_factory):
    """The run that is never disturbed."""
    folder = tmp_path_factory.mktemp("straight")
    life = Life(tiny(), folder / "run", folder / "log.txt", cache)
    assert live(life) == 0, life.log.read_text()
    return life.workdir


@pytest.fixture(scope="module")
def straight_short(cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight_short")
    life = Life(short(), folder / "run", folder / "log.txt", cache)
    assert live(life) == 0, life.log.read_text()
    return life.workdir


def last_step(workdir):
    return max(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


def rows_of(workdir):
    """Every line of metrics.jsonl without its clocks."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in CLOCKS} for line in lines]


def without_clocks(summary):
    return {k: v for k, v in summary.items() if k not in ("seconds", "versions")}


def assert_same_run(workdir, straight):
    """Bit for bit: state, weights, metrics, pictures, summary."""
    step = last_step(straight)
    assert last_step(workdir) == step
    here, there = (read_manifest(w / "checkpoints" / str(step)) for w in (workdir, straight))
    assert {name.split("/")[0] for name in here.arrays} == {"params", "opt_state", "rest"}
    for name, facts in there.arrays.items():
        assert here.arrays[name] == facts, name
    assert here.digest == there.digest
    assert rows_of(workdir) == rows_of(straight)
    events, wanted = (sorted_events(w) for w in (workdir, straight))
    assert events == wanted
    summaries = [json.loads((w / "summary.json").read_text()) for w in (workdir, straight)]
    assert without_clocks(summaries[0]) == without_clocks(summaries[1])
    assert summaries[0]["seconds"].keys() == summaries[1]["seconds"].keys()
    files = [*straight.glob("*.png"), *straight.glob("weights/*")]
    assert len(files) >= 3
    for name in [p.relative_to(straight) for p in files] + ["config.json", "parameters.txt"]:
        assert filecmp.cmp(workdir / name, straight / name, shallow=False), name
    assert (workdir / "report.html").stat().st_size > 10_000
    left = [p for p in workdir.rglob("*") if "partial" in p.name or "-tmp" in p.name]
    assert not left


def sorted_events(workdir):
    """TensorBoard's view, clocks left out; a duplicate would stay one."""
    found = read_tensorboard(workdir / "tensorboard")
    return sorted(((tag, step, str(v)) for tag, step, v in found if tag not in CLOCKS))


# --- kill -9 --------------------------------------------------------------------------------------

IN_TRAINING = [
    "in_a_step", "in_an_evaluation", "in_a_row", "in_an_event", "writing_a_manifest",
    "before_a_commit", "after_a_commit", "cutting_rows_back", "cutting_events_back",
]  # fmt: skip
AT_THE_END = [
    "writing_weights", "in_the_final_evaluation", "writing_the_summary", "writing_the_report",
]  # fmt: skip


def test_killed_anywhere_it_ends_as_if_it_had_never_been_killed(straight, new_life, tmp_path):
    """A run of 240 steps is killed where it hurts and at random moments, and then left alone."""
    workdir, log = tmp_path / "run", tmp_path / "log.txt"
    moment = random.Random(0)
    phases = collections.Counter()

    def dies_at(hook):
        status = live(new_life(tiny(), hook=(hook,)))
        assert status == KILLED, f"{hook}: {status}\n{log.read_text()[-3000:]}"

    for hook in IN_TRAINING:
        dies_at(hook)
    begun = time.monotonic()
    told = tmp_path / "phase"
    startup = 2.0
    for _ in range(RANDOM_KILLS):
        told.unlink(missing_ok=True)
        process = begin(new_life(tiny(), hook=("telling_phases", str(told))))
        process.join(moment.uniform(0.2, startup + 1.5))
        process.kill()
        process.join()
        assert process.exitcode in (KILLED, 0), log.read_text()[-3000:]
        phases[told.read_text().strip() if told.exists() else "start"] += 1
    print(f"{RANDOM_KILLS} random kills in {time.monotonic() - begun:.0f} s: {phases}")
    for hook in AT_THE_END:
        dies_at(hook)
    assert live(new_life(tiny())) == 0, log.read_text()[-3000:]
    assert_same_run(workdir, straight)
    assert "Traceback" not in log.read_text()
    observe(
        "kill -9 at random moments of one run",
        f"killed {RANDOM_KILLS} times, then finished: parameters, optimizer state, metrics, weights, "
        "samples and pictures are bit for bit those of the run that was never killed",
    )
    for hook in IN_TRAINING + AT_THE_END:
        observe(f"kill -9 {hook.replace('_', ' ')}", "the same bits, as above")


@pytest.mark.parametrize("task", ["base", "tokenizer"])
def test_the_other_stages_resume_as_well(task, new_life, tmp_path):
    more = {"steps": 6, "checkpoint": {"every": 2}, "eval": {**CHANGES["eval"], "every": 3}}
    if task == "tokenizer":
        more |= {"image_size": 16, "batch_size": 8}
    config = tiny(task, **more)
    straight = tmp_path / "straight"
    assert live(new_life(config, straight)) == 0
    for hook in ("in_a_step", "before_a_commit", "writing_weights", "writing_the_report"):
        assert live(new_life(config, hook=(hook,))) == KILLED, hook
    assert live(new_life(config)) == 0
    assert_same_run(tmp_path / "run", straight)
    observe(f"kill -9 of the stage `{task}`, four times", "the same bits, as above")


# --- signals --------------------------------------------------------------------------------------


def wait_for(path, process, timeout=120):
    end = time.monotonic() + timeout
    while not path.exists():
        assert process.is_alive() and time.monotonic() < end, "it never came so far"
        time.sleep(0.01)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_lets_the_step_end_saves_and_exits_with_0(
    name, straight_short, new_life, tmp_path
):
    mark, log = tmp_path / "mark", tmp_path / "log.txt"
    never = short(checkpoint={"every": 0})  # so that only the signal saves
    process = begin(new_life(never, hook=("announcing", str(mark), "_Trainer", "_step", 4)))
    wait_for(mark, process)
    sent = time.monotonic()
    os.kill(process.pid, getattr(signal, name))
    process.join(60)
    took = time.monotonic() - sent
    assert process.exitcode == 0, log.read_text()
    text = log.read_text()
    assert f"{name}: finishing the step and saving; once more ends at once" in text
    stopped = last_step(tmp_path / "run")
    assert f"{name}: stopped at step {stopped} of 12, saved in" in text
    assert 4 <= stopped < 12
    assert not (tmp_path / "run" / "summary.json").exists()
    assert live(new_life(never)) == 0
    assert rows_of(tmp_path / "run") == rows_of(straight_short)
    here, there = (
        read_manifest(w / "checkpoints" / "12") for w in (tmp_path / "run", straight_short)
    )
    assert here.digest == there.digest
    observe(
        f"{name} in training",
        f"the step is finished and saved, exit status 0 after {took:.1f} s; the same command goes on "
        "and ends with the same bits",
    )


def test_a_second_signal_ends_at_once(new_life, tmp_path):
    mark, log = tmp_path / "mark", tmp_path / "log.txt"
    config = short(steps=10_000, checkpoint={"every": 0})
    process = begin(new_life(config, hook=("slow_saving", str(mark))))
    deadline = time.monotonic() + 60
    while "  1/10000" not in (log.read_text() if log.exists() else ""):
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGTERM)
    wait_for(mark, process)  # it is saving, and that would take a minute
    os.kill(process.pid, signal.SIGTERM)
    process.join(5)
    assert process.exitcode == 128 + signal.SIGTERM
    assert "SIGTERM again: ending at once" in log.read_text()
    observe(
        "a second SIGTERM while the first is being answered", "it ends at once, exit status 143"
    )


@pytest.mark.parametrize(
    ("owner", "function", "when"),
    [
        ("loop", "_batches", "before the first step"),
        ("run", "_evaluate", "in the final evaluation"),
    ],
)
def test_a_signal_where_nothing_is_unsaved_ends_at_once(
    owner, function, when, straight_short, new_life, tmp_path
):
    mark = tmp_path / "mark"
    process = begin(new_life(short(), hook=("announcing", str(mark), owner, function)))
    wait_for(mark, process)
    sent = time.monotonic()
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 0
    assert time.monotonic() - sent < 2.0
    assert "SIGTERM: nothing was left to save" in (tmp_path / "log.txt").read_text()
    assert live(new_life(short())) == 0
    assert_same_run(tmp_path / "run", straight_short)
    observe(
        f"SIGTERM {when}", "it ends at once, exit status 0; the same command goes on from there"
    )


# --- the disk -------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MB; as much of it as wanted can be taken away."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(folder, leave):
    """Takes away all but `leave` bytes."""
    with (folder / "ballast").open("wb") as file:
        free = os.statvfs(folder)
        file.write(bytes(max(0, free.f_bavail * free.f_frsize - leave)))


@pytest.mark.parametrize(
    ("what", "leave", "sentence"),
    [
        ("while a checkpoint is written", 120_000, "could not be saved in"),
        ("while metrics are written", 0, "the disk is full at"),
    ],
)
def test_a_full_disk_stops_the_run_and_loses_nothing(
    what, leave, sentence, straight_short, small_disk, new_life, tmp_path
):
    log, workdir = tmp_path / "log.txt", small_disk / "run"
    assert live(new_life(short(steps=6), workdir)) == 0
    saved = read_manifest(workdir / "checkpoints" / "6").digest
    fill(small_disk, leave)
    assert live(new_life(short(), workdir)) == 1
    text = log.read_text()
    assert sentence in text
    assert "run the same command again" in text
    assert "Traceback" not in text.partition("error: ")[2]
    assert read_manifest(workdir / "checkpoints" / "6").digest == saved
    (small_disk / "ballast").unlink()
    assert live(new_life(short(), workdir)) == 0, log.read_text()
    assert_same_run(workdir, straight_short)
    observe(
        f"the disk is full {what}",
        "the run stops with a sentence; what was saved verifies; with room again the same command "
        "ends with the same bits",
    )


def test_a_read_only_workdir_is_refused_with_a_sentence(
    straight_short, small_disk, new_life, tmp_path
):
    workdir = small_disk / "run"
    assert live(new_life(short(steps=6), workdir)) == 0
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert live(new_life(short(), workdir)) == 1
    assert "error: the file system is read-only at" in (tmp_path / "log.txt").read_text()
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert live(new_life(short(), workdir)) == 0
    assert_same_run(workdir, straight_short)
    observe("the work directory is read-only", "the run ends with a sentence before it begins")


def test_the_newest_checkpoint_is_damaged_and_the_one_before_goes_on(
    straight_short, new_life, tmp_path
):
    workdir, log = tmp_path / "run", tmp_path / "log.txt"
    assert live(new_life(short(), hook=("writing_weights",))) == KILLED
    assert last_step(workdir) == 12
    files = (p for p in (workdir / "checkpoints" / "12" / "params").rglob("*") if p.is_file())
    victim = max(files, key=lambda path: path.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    assert live(new_life(short())) == 0, log.read_text()
    assert "DAMAGED CHECKPOINT: step 12" in log.read_text()
    assert "Restored step 6 instead of 12" in log.read_text()
    assert_same_run(workdir, straight_short)
    observe(
        "one bit of the newest checkpoint flips",
        "a loud warning, the run goes on from the one before, and ends with the same bits",
    )


# --- a second run, the clock, the seed ------------------------------------------------------------


def test_a_second_live_run_in_the_same_workdir_is_refused(new_life, tmp_path):
    mark, workdir = tmp_path / "mark", tmp_path / "run"
    config = short(steps=10_000)
    process = begin(new_life(config, hook=("announcing", str(mark), "_Trainer", "_step")))
    wait_for(mark, process)
    other = dataclasses.replace(new_life(config), log=tmp_path / "other.txt")
    assert live(other) == 1
    text = (tmp_path / "other.txt").read_text()
    assert f"error: {workdir} is in use by process {process.pid} on " in text
    assert " since 20" in text
    assert process.is_alive()
    process.kill()
    process.join()
    # The lock died with its process, though its file is still there.
    assert (workdir / ".lock").exists()
    after = new_life(config, hook=("announcing", str(tmp_path / "second"), "_Trainer", "_step"))
    process = begin(after)
    wait_for(tmp_path / "second", process)
    process.kill()
    process.join()
    observe(
        "a second run is started in the work directory of a live one",
        "refused, with process, host and time of the first; after that one's death its lock is gone",
    )


def test_a_clock_that_goes_back_changes_nothing(straight_short, new_life, tmp_path):
    hook = ("clock_going_back",)
    first = new_life(short(steps=6), hook=hook)
    assert live(first) == 0, first.log.read_text()
    assert live(new_life(short(), hook=hook)) == 0
    assert_same_run(tmp_path / "run", straight_short)
    observe("the clock goes back by an hour at every look", "the same bits, as above")


def test_the_same_seed_and_devices_give_the_same_bits_twice(straight_short, new_life, tmp_path):
    assert live(new_life(short())) == 0
    assert_same_run(tmp_path / "run", straight_short)
    assert live(new_life(short(seed=1), tmp_path / "other")) == 0
    assert rows_of(tmp_path / "other") != rows_of(straight_short)
    observe(
        "nothing: the same command in two processes", "the same bits; another seed gives others"
    )


def test_more_devices_go_on_where_fewer_were(straight_short, cache, tmp_path):
    """Two devices save; one goes on: the place in the data and every number but for rounding."""
    workdir = tmp_path / "run"
    life = Life(short(steps=6), workdir, tmp_path / "log.txt", cache)
    assert live(life) == 0
    one = dataclasses.replace(life, config=short(mesh={"data": 2, "fsdp": 1}))
    assert live(one) == 0, one.log.read_text()
    here, there = rows_of(workdir), rows_of(straight_short)
    assert [row["step"] for row in here] == [row["step"] for row in there]
    for got, want in zip(here, there, strict=True):
        for name, value in want.items():
            assert got[name] == pytest.approx(value, rel=2e-3, abs=2e-4), (want["step"], name)
    observe(
        "the run goes on under another mesh",
        "the same images and draws, and the same metrics within float32 rounding",
    )
