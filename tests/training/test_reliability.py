"""Runs that are killed, stopped, starved and confused, and end as if nothing had happened.

Every life is a process of its own (see `tests.helpers.lives`). What was seen goes into docs/reliability.md.
"""

import collections
import dataclasses
import filecmp
import json
import os
import random
import shutil
import signal
import subprocess
import time

import pytest

from tests.helpers.events import read_tensorboard
from tests.helpers.lives import KILLED, Life, begin, fill, live
from tests.helpers.messages import assert_mentions
from tests.helpers.observations import observe
from tests.helpers.processes import free_port
from tests.helpers.tiny import make_tiny_config
from vapi_jax.checkpoint import main as command
from vapi_jax.training.checkpoint.manifest import read_manifest

pytestmark = pytest.mark.slow

STEPS, EVERY = 120, 6
RANDOM_KILLS = 8
CHANGES = {
    "mesh": {"data": 1, "fsdp": 2},
    "batch_size": 4,
    "optimizer": {"learning_rate": 1e-3, "eps": 1e-2},
    "checkpoint": {"every": EVERY},
    "eval": {"every": 20, "images": 8, "grid_classes": 2, "grid_per_class": 2},
}
SAME = "the finished run has the bits of one that was never disturbed"
CLOCKS = {"time", "images_per_second"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture
def new_life(cache, tmp_path):
    """Lives of this test, by default all in one work directory."""

    def make(config, workdir=None, hook=(), **more):
        workdir = workdir or tmp_path / "run"
        more.setdefault("pictures", False)
        return Life(config, workdir, tmp_path / "log.txt", cache, hook, **more)

    return make


def tiny(task="vapi", **changes):
    return make_tiny_config(task, **{"steps": STEPS, **CHANGES, **changes})


def short(**changes):
    often = {**CHANGES["eval"], "every": 6}
    return tiny(**{"steps": 12, "eval": often, **changes})


@pytest.fixture(scope="module")
def straight(cache, tmp_path_factory):
    """The run that is never disturbed."""
    folder = tmp_path_factory.mktemp("straight")
    life = Life(tiny(), folder / "run", folder / "log.txt", cache)
    assert live(life) == 0, life.log.read_text()
    return life.workdir


@pytest.fixture(scope="module")
def straight_short(cache, tmp_path_factory):
    """One that is as little disturbed, of 12 steps and without pictures."""
    folder = tmp_path_factory.mktemp("straight_short")
    life = Life(short(), folder / "run", folder / "log.txt", cache, pictures=False)
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


def assert_same_training(workdir, straight):
    """Bit for bit: state, weights, metrics, configuration."""
    step = last_step(straight)
    assert last_step(workdir) == step
    here, there = (read_manifest(w / "checkpoints" / str(step)) for w in (workdir, straight))
    assert {name.split("/")[0] for name in here.arrays} == {"params", "opt_state", "rest"}
    for name, facts in there.arrays.items():
        assert here.arrays[name] == facts, name
    assert here.digest == there.digest
    assert rows_of(workdir) == rows_of(straight)
    assert sorted_events(workdir, "scalar") == sorted_events(straight, "scalar")
    weights = [p.relative_to(straight) for p in straight.glob("weights/*")]
    assert weights
    for name in [*weights, "config.json", "parameters.txt"]:
        assert filecmp.cmp(workdir / name, straight / name, shallow=False), name
    left = [p for p in workdir.rglob("*") if "partial" in p.name or "-tmp" in p.name]
    assert not left


def assert_same_run(workdir, straight):
    """The same, and the evaluation and report after it."""
    assert_same_training(workdir, straight)
    summaries = [json.loads((w / "summary.json").read_text()) for w in (workdir, straight)]
    assert without_clocks(summaries[0]) == without_clocks(summaries[1])
    assert summaries[0]["seconds"].keys() == summaries[1]["seconds"].keys()
    assert sorted_events(workdir, "image") == sorted_events(straight, "image")
    pictures = list(straight.glob("*.png"))
    assert pictures
    for path in pictures:
        assert filecmp.cmp(workdir / path.name, path, shallow=False), path
    assert (workdir / "report.html").stat().st_size > 10_000


def sorted_events(workdir, kind):
    """What TensorBoard shows, clocks left out. Duplicates would count."""
    found = [
        (tag, step, value)
        for tag, step, value in read_tensorboard(workdir / "tensorboard")
        if tag not in CLOCKS and (value == "image") == (kind == "image")
    ]
    assert found or kind == "image"
    return sorted(found)


# --- kill -9 --------------------------------------------------------------------------------------

IN_TRAINING = [
    "in_a_step", "in_an_evaluation", "in_a_row", "in_an_event", "writing_a_manifest",
    "before_a_commit", "after_a_commit", "cutting_rows_back",
]  # fmt: skip
PHASES = {
    "": "starting", "setup": "setting up or restoring", "input": "reading images",
    "step": "in a step", "held_out": "judging", "checkpoint": "saving", "evaluation": "evaluating",
}  # fmt: skip
AT_THE_END = [
    "writing_weights", "in_the_final_evaluation", "writing_the_summary", "writing_the_report",
]  # fmt: skip


def test_killed_anywhere_it_ends_as_if_it_had_never_been_killed(straight, new_life, tmp_path):
    """A run of 120 steps is killed where it hurts and at random moments, and then left alone."""
    workdir, log = tmp_path / "run", tmp_path / "log.txt"
    moment = random.Random(0)
    phases = collections.Counter()

    def dies_at(hook):
        status = live(new_life(tiny(), hook=(hook,), pictures=True))
        assert status == KILLED, f"{hook}: {status}\n{log.read_text()[-3000:]}"

    begun = time.monotonic()
    dies_at(IN_TRAINING[0])
    startup = time.monotonic() - begun
    for hook in IN_TRAINING[1:]:
        dies_at(hook)
    told = tmp_path / "phase"
    for place in moment.sample(range(RANDOM_KILLS), RANDOM_KILLS):  # early ones and late ones
        told.unlink(missing_ok=True)
        share = (place + moment.random()) / RANDOM_KILLS
        hook = ("telling_phases", str(told))
        process = begin(new_life(tiny(), hook=hook, pictures=True))
        process.join(0.1 + share * (startup + 1.0))
        process.kill()
        process.join()
        assert process.exitcode in (KILLED, 0), log.read_text()[-3000:]
        phases[told.read_text().strip() if told.exists() else ""] += 1
    for hook in AT_THE_END:
        dies_at(hook)
    assert live(new_life(tiny(), pictures=True)) == 0, log.read_text()[-3000:]
    assert_same_run(workdir, straight)
    assert "Traceback" not in log.read_text()
    observe(
        "kill -9: at random moments of one run",
        f"killed {RANDOM_KILLS} times, then finished: parameters, optimizer state, metrics, weights, "
        "samples and pictures are bit for bit those of the run that was never killed (it was "
        + ", ".join(f"{name} {phases[phase]} times" for phase, name in PHASES.items())
        + ")",
    )
    for hook in IN_TRAINING + AT_THE_END:
        observe(f"kill -9: {hook.replace('_', ' ')}", SAME)


def test_a_tokenizer_resumes_as_well(new_life, tmp_path):
    few = {"steps": 4, "checkpoint": {"every": 2}, "eval": {**CHANGES["eval"], "every": 3}}
    config = tiny("tokenizer", image_size=16, batch_size=8, **few)
    straight = tmp_path / "straight"
    assert live(new_life(config, straight)) == 0
    for hook in ("before_a_commit", "writing_weights"):
        assert live(new_life(config, hook=(hook,))) == KILLED, hook
    assert live(new_life(config)) == 0
    assert_same_training(tmp_path / "run", straight)
    observe("kill -9: stage `tokenizer`, twice", SAME)


def test_the_controls_of_a_compared_run_resume_as_well(new_life, tmp_path):
    few = {"samples": 16, "allow_singular": True, "seeds": 1, "temperatures": (0.9,)}
    evaluation = {**CHANGES["eval"], "compare": True, "controls": True, **few}
    config = tiny(steps=4, image_size=16, checkpoint={"every": 2}, eval=evaluation)
    straight, workdir = tmp_path / "straight", tmp_path / "run"
    never = ("controls_alone", 99)
    assert live(new_life(config, straight, never, pictures=True)) == 0
    # Two saves in each training: the second of the first control, the second of the other.
    for number in (4, 3):
        hook = ("controls_alone", number)
        assert live(new_life(config, hook=hook, pictures=True)) == KILLED
    assert live(new_life(config, hook=never, pictures=True)) == 0
    digests = set()
    for folder in (".", "controls/ce_only", "controls/shuffled_advantages"):
        assert_same_training(workdir / folder, straight / folder)
        digests.add(read_manifest(workdir / folder / "checkpoints" / "4").digest)
    assert len(digests) == 3
    observe("kill -9: both controls of a compared run", SAME)


# --- signals --------------------------------------------------------------------------------------


def wait_for(path, process, timeout=120):
    end = time.monotonic() + timeout
    while not path.exists():
        assert process.is_alive() and time.monotonic() < end, "it never came so far"
        time.sleep(0.01)


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 75), ("SIGINT", 0)])
def test_a_signal_lets_the_step_end_saves_and_exits_with_0_or_as_told(
    name, status, straight_short, new_life, tmp_path
):
    log = tmp_path / "log.txt"
    never = short(checkpoint={"every": 0})  # so that only the signal saves
    stopped = new_life(never, hook=("stopping_after", 4, name), stopped_status=status)
    assert live(stopped) == status, log.read_text()
    text = log.read_text()
    assert f"{name}: finishing the step and saving; once more ends at once" in text
    assert last_step(tmp_path / "run") == 4
    assert f"{name}: stopped at step 4 of 12, saved in" in text
    assert not (tmp_path / "run" / "summary.json").exists()
    assert live(new_life(never)) == 0
    assert rows_of(tmp_path / "run") == rows_of(straight_short)
    here, there = (
        read_manifest(w / "checkpoints" / "12") for w in (tmp_path / "run", straight_short)
    )
    assert here.digest == there.digest
    observe(
        f"signal: {name} in training",
        f"the step is finished and saved, exit status {'75 as told' if status else 0}; the same "
        "command goes on and ends with the same bits",
    )


def test_a_second_signal_ends_at_once(new_life, tmp_path):
    mark, log = tmp_path / "mark", tmp_path / "log.txt"
    config = short(steps=10_000, checkpoint={"every": 0})
    process = begin(new_life(config, hook=("slow_saving", str(mark))))
    deadline = time.monotonic() + 60
    while " 1/10000 " not in (log.read_text() if log.exists() else ""):
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGTERM)
    wait_for(mark, process)  # it is saving, and that would take a minute
    os.kill(process.pid, signal.SIGTERM)
    process.join(5)
    assert process.exitcode == 128 + signal.SIGTERM
    assert "SIGTERM again: ending at once" in log.read_text()
    observe(
        "signal: a second SIGTERM while the first is answered", "it ends at once, exit status 143"
    )


@pytest.mark.parametrize(
    ("owner", "function", "when"),
    [
        ("loop", "_batches", "before the first step"),
        ("run", "_samples", "in the final evaluation"),
    ],
)
def test_a_signal_where_nothing_is_unsaved_ends_at_once(
    owner, function, when, straight_short, new_life, tmp_path
):
    mark = tmp_path / "mark"
    hook = ("announcing", str(mark), owner, function)
    process = begin(new_life(short(), hook=hook, pictures=True))
    wait_for(mark, process)
    sent = time.monotonic()
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 0
    assert time.monotonic() - sent < 2.0
    assert "SIGTERM: nothing was left to save" in (tmp_path / "log.txt").read_text()
    assert live(new_life(short())) == 0
    assert_same_training(tmp_path / "run", straight_short)
    observe(
        f"signal: SIGTERM {when}",
        "it ends at once, exit status 0; the same command goes on from there",
    )


def test_a_preemption_notice_to_one_process_stops_all_at_the_same_step(new_life, cache, tmp_path):
    """Two processes with two devices each; one is told to go. Then a single one goes on."""
    config = tiny(steps=2000, mesh={"data": 1, "fsdp": 4}, checkpoint={"every": 0})
    address = f"localhost:{free_port()}"
    workdir, logs = tmp_path / "run", [tmp_path / f"log{i}.txt" for i in range(2)]
    both = [
        begin(Life(config, workdir, log, cache, pictures=False, cluster=(address, 2, index)))
        for index, log in enumerate(logs)
    ]
    deadline = time.monotonic() + 180
    while " 1/2000 " not in (logs[0].read_text() if logs[0].exists() else ""):
        assert all(process.is_alive() for process in both), [log.read_text() for log in logs]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(both[1].pid, signal.SIGTERM)
    for process, log in zip(both, logs, strict=True):
        process.join(60)
        assert process.exitcode == 0, log.read_text()
    step = last_step(workdir)
    for log in logs:
        assert f"a preemption notice: stopped at step {step} of 2000" in log.read_text()
    parts = workdir / "checkpoints" / str(step) / "manifest"
    assert {"process_0.json", "process_1.json"} <= {path.name for path in parts.iterdir()}
    more = tiny(steps=2000, mesh={"data": 1, "fsdp": 2}, checkpoint={"every": step + 2})
    assert live(new_life(more, hook=("stopping_after", 2))) == 0
    assert f"stopped at step {step + 2} of 2000" in (tmp_path / "log.txt").read_text()
    assert "DAMAGED" not in (tmp_path / "log.txt").read_text()
    observe(
        "signal: SIGTERM to one of two processes",
        "both stop at the same step, save together and exit with 0; one process alone verifies both "
        "parts and goes on",
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


@pytest.fixture
def disk_that_freezes(tmp_path):
    """A file system of 64 MB, and what freezes and thaws it."""
    image, folder = tmp_path / "image", tmp_path / "disk"
    folder.mkdir()
    with image.open("wb") as file:
        file.truncate(64 << 20)
    make, mount = (
        ["mkfs.ext4", "-q", "-F", str(image)],
        ["mount", "-o", "loop", str(image), str(folder)],
    )
    if os.geteuid() != 0 or not all(shutil.which(tool) for tool in ("mkfs.ext4", "fsfreeze")):
        pytest.skip("only root can mount a file system and freeze it")
    for command_line in (make, mount):
        if subprocess.run(command_line, capture_output=True, check=False).returncode:
            pytest.skip("file systems in files cannot be mounted here")

    def tell(flag):
        subprocess.run(["fsfreeze", flag, str(folder)], check=True)

    yield folder, lambda: tell("-f"), lambda: tell("-u")
    subprocess.run(["fsfreeze", "-u", str(folder)], capture_output=True, check=False)
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_hangs_holds_the_run_until_it_answers_again(
    straight_short, disk_that_freezes, new_life, tmp_path
):
    folder, freeze, thaw = disk_that_freezes
    told = tmp_path / "third step"
    process = begin(new_life(short(), folder / "run", ("announcing", told, "_Trainer", "_step", 3)))
    while not told.exists():
        assert process.is_alive()
        time.sleep(0.01)
    freeze()
    process.join(5.0)
    assert process.exitcode is None
    thaw()
    process.join(120)
    assert process.exitcode == 0, (tmp_path / "log.txt").read_text()
    assert_same_training(folder / "run", straight_short)
    observe(
        "disk: hangs for a while",
        "the run waits for it, goes on when it answers, and ends with the same bits",
    )


AGAIN = (
    "the run stops with a sentence; what was saved verifies; with room again the same command ends "
    "with the same bits"
)


@pytest.mark.parametrize("noticed", ["before", "while"])
def test_a_disk_full_of_checkpoints_stops_the_run_and_loses_nothing(
    noticed, straight_short, small_disk, new_life, tmp_path
):
    log, workdir = tmp_path / "log.txt", small_disk / "run"
    assert live(new_life(short(steps=6), workdir)) == 0
    saved = read_manifest(workdir / "checkpoints" / "6").digest
    fill(small_disk, 120_000)  # enough for all but the next step
    hook = () if noticed == "before" else ("blind_to_free_space",)
    assert live(new_life(short(), workdir, hook)) == 1
    text = log.read_text()
    (told,) = [line for line in text.splitlines() if line.startswith("error: ")]
    assert told.startswith(f"error: step 12 could not be saved in {workdir}/checkpoints: ")
    assert "(steps: 6)" in told
    assert "again" in told
    if noticed == "before":
        assert "it takes about " in told
        assert "Traceback" not in text
    assert command(["verify", str(workdir)]) == 0
    assert read_manifest(workdir / "checkpoints" / "6").digest == saved
    (small_disk / "ballast").unlink()
    assert live(new_life(short(), workdir)) == 0, log.read_text()
    assert_same_training(workdir, straight_short)
    observe(f"disk: full, noticed {noticed} a checkpoint is written", AGAIN)


def test_a_disk_full_of_metrics_stops_the_run_and_loses_nothing(
    straight, small_disk, new_life, tmp_path
):
    log, workdir = tmp_path / "log.txt", small_disk / "run"
    assert live(new_life(tiny(), workdir, hook=("stopping_after", 8))) == 0
    assert last_step(workdir) == 8
    saved = read_manifest(workdir / "checkpoints" / "8").digest
    full = tiny(checkpoint={"every": 0})
    assert live(new_life(full, workdir, hook=("filling_the_disk", str(small_disk)))) == 1
    last = log.read_text().splitlines()[-1]
    assert last.startswith("error: the disk is full at ")
    assert "metrics.jsonl" in last or "tfevents" in last
    assert "run the same command again" in last
    assert read_manifest(workdir / "checkpoints" / "8").digest == saved
    (small_disk / "ballast").unlink()
    assert live(new_life(tiny(), workdir)) == 0, log.read_text()
    assert_same_training(workdir, straight)
    observe("disk: full when metrics are written", AGAIN)


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
    assert_same_training(workdir, straight_short)
    observe("disk: read-only", "the run ends with a sentence before it begins")


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
    assert_same_training(workdir, straight_short)
    observe(
        "checkpoint: one bit of the newest flips",
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
    assert_mentions(text, "error: ", workdir, process.pid)
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
        "run: a second one in the work directory of a live one",
        "refused, with process, host and time of the first; after that one's death its lock is gone",
    )


def test_a_clock_that_goes_back_changes_nothing(straight_short, new_life, tmp_path):
    hook = ("clock_going_back",)
    first = new_life(short(steps=6), hook=hook)
    assert live(first) == 0, first.log.read_text()
    assert live(new_life(short(), hook=hook)) == 0
    assert_same_training(tmp_path / "run", straight_short)
    observe("run: the clock goes back by an hour at every look", SAME)


def test_the_same_seed_and_devices_give_the_same_bits_twice(straight_short, new_life, tmp_path):
    assert live(new_life(short())) == 0
    assert_same_training(tmp_path / "run", straight_short)
    assert live(new_life(short(seed=1), tmp_path / "other")) == 0
    assert rows_of(tmp_path / "other") != rows_of(straight_short)
    observe("run: undisturbed, twice", "the same bits; another seed gives others")


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
        "resume: under another mesh",
        "the same images and draws, and the same metrics within float32 rounding",
    )
