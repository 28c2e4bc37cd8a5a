"""Whole runs of the loop: files, learning, going on after a kill, stopping when it is hopeless."""

import json
import shutil

import jax
import numpy as np
import pytest

from tests.test_train import make_tiny_task, with_random_head
from vapi_jax.checkpoint import CheckpointError
from vapi_jax.loop import HELD_OUT, fit
from vapi_jax.metrics import read_history
from vapi_jax.sharding import make_mesh
from vapi_jax.tasks import HealthError
from vapi_jax.weights import (
    WeightsError,
    flatten,
    load_metadata,
    load_safetensors,
    save_safetensors,
    sha256_file,
)

STEPS, HALF = 30, 15
BASE = {
    "optimizer": {"learning_rate": 1e-2, "eps": 1e-8},
    "checkpoint": {"every": HALF},
    "eval": {"every": HALF, "images": 8},
}


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(1, 2, jax.devices()[:2])


@pytest.fixture(scope="module")
def straight(mesh, tmp_path_factory):
    """A base generator trained without a break."""
    workdir = tmp_path_factory.mktemp("straight")
    return fit(make_tiny_task("base", mesh, steps=STEPS, **BASE), workdir), workdir


@pytest.fixture(scope="module")
def resumed(mesh, tmp_path_factory):
    """The same in two runs: the second begins where the first one's last checkpoint was."""
    workdir = tmp_path_factory.mktemp("resumed")
    fit(make_tiny_task("base", mesh, steps=HALF, **BASE), workdir)
    task = make_tiny_task("base", mesh, steps=STEPS, **BASE)
    return fit(task, workdir, keep_start=True), workdir


@pytest.mark.slow
def test_a_run_leaves_its_files(straight):
    run, workdir = straight
    assert {entry.name for entry in workdir.iterdir()} == {
        "metrics.jsonl",
        "parameters.txt",
        "tensorboard",
        "checkpoints",
        "weights",
    }
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == [str(HALF), str(STEPS)]
    path = workdir / "weights" / "policy.safetensors"
    assert run.weights == {path.name: sha256_file(path)}
    assert load_metadata(path) == {"name": "tiny_base", "task": "base"}
    saved, kept = flatten(load_safetensors(path)), flatten(jax.device_get(run.params))
    assert saved.keys() == kept.keys()
    for name in kept:
        np.testing.assert_array_equal(saved[name], kept[name])
    assert run.timer.summary()["total"] > 0.0


@pytest.mark.slow
def test_every_step_has_its_row(straight):
    run, workdir = straight
    rows = read_history(workdir / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(STEPS + 1))
    for row in rows[1:]:
        assert row.keys() >= {"loss", "ce", "entropy", "grad_norm", "learning_rate"}
        assert row["images_per_second"] > 0.0
    judged = [row["step"] for row in rows if HELD_OUT + "ce" in row]
    assert judged == [0, HALF, STEPS]
    assert rows[0][HELD_OUT + "ce"] == run.first["ce"]
    assert rows[-1][HELD_OUT + "ce"] == run.last["ce"]


@pytest.mark.slow
def test_it_learns(straight):
    run, workdir = straight
    losses = [row["loss"] for row in read_history(workdir / "metrics.jsonl") if "loss" in row]
    assert losses[0] == pytest.approx(np.log(16), abs=1e-5)  # an untrained head is uniform
    assert np.mean(losses[-5:]) < losses[0] - 0.2
    assert run.last["ce"] < run.first["ce"] - 0.2


@pytest.mark.slow
def test_going_on_from_a_checkpoint_changes_no_bit(straight, resumed):
    (run, workdir), (again, other) = straight, resumed
    assert again.weights == run.weights
    for want, got in zip(
        read_history(workdir / "metrics.jsonl"), read_history(other / "metrics.jsonl"), strict=True
    ):
        for clock in ("time", "images_per_second"):
            want.pop(clock, None), got.pop(clock, None)
        assert got == want
    assert (again.first, again.last) == (run.first, run.last)


@pytest.mark.slow
def test_the_held_out_batch_is_judged_alike_before_and_after_a_break(resumed):
    _, workdir = resumed
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    twice = [
        {name: value for name, value in line.items() if name.startswith(HELD_OUT)}
        for line in lines
        if line["step"] == HALF and HELD_OUT + "ce" in line
    ]
    assert len(twice) == 2
    assert twice[0] == twice[1]


@pytest.mark.slow
def test_the_start_is_that_of_step_0_also_after_a_break(resumed):
    run, _ = resumed
    assert not np.any(run.start_params["output"]["kernel"])  # an untrained head is zero
    assert np.any(run.params["output"]["kernel"])


@pytest.mark.slow
def test_a_checkpoint_of_another_model_is_refused(resumed, mesh):
    _, workdir = resumed
    policy = {"dim": 16}
    with pytest.raises(CheckpointError, match="is of another model.*another --workdir"):
        fit(make_tiny_task("base", mesh, steps=STEPS, policy=policy, **BASE), workdir)


@pytest.mark.slow
def test_a_policy_that_always_says_the_same_is_stopped_and_not_saved(mesh, tmp_path):
    """Collapse for real: at this temperature all samples of a group are the likeliest tokens."""
    task = make_tiny_task("vapi", mesh)
    start = with_random_head(jax.jit(task.init)(jax.random.key(0)), 1)
    save_safetensors(tmp_path / "start.safetensors", start)
    collapsed = make_tiny_task(
        "vapi",
        mesh,
        vapi={"temperature": 1e-6},
        init={"gpt": str(tmp_path / "start.safetensors")},
        checkpoint={"every": 1},
        eval={"every": 5, "images": 8},
        steps=5,
    )
    with pytest.raises(HealthError, match="step 1: all samples of every group"):
        fit(collapsed, tmp_path / "run")
    assert not [p for p in (tmp_path / "run" / "checkpoints").iterdir() if p.name.isdigit()]
    assert not (tmp_path / "run" / "weights").exists()


def test_a_generator_needs_a_tokenizer(mesh, tmp_path):
    with pytest.raises(WeightsError, match=r"config\.init\.vq"):
        fit(make_tiny_task("base", mesh, init={"vq": ""}), tmp_path)
    missing = str(tmp_path / "no.safetensors")
    with pytest.raises(WeightsError, match="no.safetensors cannot be read"):
        fit(make_tiny_task("base", mesh, init={"vq": missing}), tmp_path)


@pytest.mark.slow
def test_the_tokenizer_trains_with_its_adversary_and_goes_on(mesh, tmp_path):
    changes = {
        "image_size": 16,
        "batch_size": 8,
        "tokenizer_training": {
            "discriminator_start": 2,
            "discriminator_ndf": 4,
            "discriminator_layers": 1,
            "restart_below": 0.5,
            "restart_every": 1,
            "restart_until": 1.0,
        },
        "optimizer": {"learning_rate": 1e-3, "eps": 1e-8},
        "checkpoint": {"every": 2},
        "eval": {"every": 2, "images": 8},
    }
    run = fit(make_tiny_task("tokenizer", mesh, steps=4, **changes), tmp_path)
    rows = read_history(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert rows[4]["reconstruction_loss"] < rows[1]["reconstruction_loss"]
    assert run.last.keys() == {"reward", "mse", "lpips", "psnr", "codebook_usage"}
    assert run.last["reward"] == pytest.approx(-run.last["mse"] - run.last["lpips"], abs=1e-5)
    assert sorted(run.weights) == ["discriminator.safetensors", "tokenizer.safetensors"]
    # With its checkpoint of step 2 alone, the last two steps are taken again.
    shutil.rmtree(tmp_path / "checkpoints" / "4")
    again = fit(make_tiny_task("tokenizer", mesh, steps=4, **changes), tmp_path)
    assert again.weights == run.weights
    # The file starts another run: its tokenizer, with a fresh discriminator.
    path = str(tmp_path / "weights" / "tokenizer.safetensors")
    base = make_tiny_task("base", mesh, image_size=16, init={"vq": path})
    loaded = flatten(base.load_frozen()["tokenizer"])
    for name, leaf in flatten(jax.device_get(run.params["tokenizer"])).items():
        np.testing.assert_array_equal(loaded[name], leaf)
