"""Whole runs of the loop: files, learning, going on after a kill, stopping when it is hopeless."""

import dataclasses
import itertools
import json
import shutil

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from tests.helpers.events import read_tensorboard
from tests.helpers.observations import observe
from tests.helpers.tiny import make_tiny_method, with_random_head
from vapi_jax.common.digests import sha256_file
from vapi_jax.common.trees import flatten
from vapi_jax.evaluation.held_out import HELD_OUT
from vapi_jax.methods import HealthError
from vapi_jax.parallel.sharding import make_mesh
from vapi_jax.training import loop
from vapi_jax.training.checkpoint import Checkpointer, CheckpointError
from vapi_jax.training.checkpoint.manifest import read_manifest
from vapi_jax.training.logging import read_history
from vapi_jax.training.loop import fit
from vapi_jax.weights.names import WeightsError
from vapi_jax.weights.store import load_metadata, load_safetensors, save_safetensors

STEPS, HALF = 30, 15
BASE = {
    "optimizer": {"learning_rate": 1e-2, "eps": 1e-8},
    "checkpoint": {"every": HALF},
    "eval": {"every": HALF, "images": 8},
}


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(1, 2, jax.devices()[:2])


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """Runs of the same configuration share their compiled code."""
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in options}
    compilation_cache.reset_cache()
    for name, value in options.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def straight(mesh, tmp_path_factory):
    """A base generator trained without a break."""
    workdir = tmp_path_factory.mktemp("straight")
    return fit(make_tiny_method("base", mesh, steps=STEPS, **BASE), workdir), workdir


@pytest.fixture(scope="module")
def resumed(mesh, tmp_path_factory):
    """The same in two runs: the second begins where the first one's last checkpoint was."""
    workdir = tmp_path_factory.mktemp("resumed")
    fit(make_tiny_method("base", mesh, steps=HALF, **BASE), workdir)
    task = make_tiny_method("base", mesh, steps=STEPS, **BASE)
    return fit(task, workdir, keep_start=True), workdir


@pytest.mark.slow
def test_a_run_leaves_its_files(straight):
    run, workdir = straight
    assert {entry.name for entry in workdir.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "parameters.txt",
        "tensorboard",
        "checkpoints",
        "weights",
    }
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == [str(HALF), str(STEPS)]
    path = workdir / "weights" / "policy.safetensors"
    assert run.weights == {path.name: sha256_file(path)}
    assert load_metadata(path) == {"name": "tiny_base", "method": "base"}
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
def test_a_profile_holds_the_steps_that_were_asked_for(mesh, tmp_path, straight):
    """As TensorBoard's profiler finds it, and without a change to what is trained."""
    run = fit(make_tiny_method("base", mesh, steps=HALF, **BASE), tmp_path, profile=range(2, 5))
    found = list((tmp_path / "tensorboard" / "plugins" / "profile").glob("*/*.xplane.pb"))
    assert len(found) == 1
    planes = jax.profiler.ProfileData.from_file(str(found[0])).planes
    events = [event for plane in planes for line in plane.lines for event in line.events]
    steps = [dict(event.stats)["step_num"] for event in events if event.name == "train"]
    assert sorted(steps) == [2, 3, 4]
    _, workdir = straight
    rows = zip(*(read_history(d / "metrics.jsonl") for d in (tmp_path, workdir)), strict=False)
    assert [a["loss"] == b["loss"] for a, b in rows if "loss" in a] == [True] * HALF
    assert not list((workdir / "tensorboard").glob("plugins/*"))
    assert run.skipped == 0


@pytest.mark.slow
def test_curves_have_no_duplicates_after_a_break(resumed):
    _, workdir = resumed
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    training = [line["step"] for line in lines if "loss" in line]
    judged = [line["step"] for line in lines if HELD_OUT + "ce" in line]
    assert training == list(range(1, STEPS + 1))
    assert judged == [0, HALF, STEPS]
    events = [(tag, step) for tag, step, _ in read_tensorboard(workdir / "tensorboard")]
    assert len(events) == len(set(events))
    assert {step for tag, step in events if tag == "loss"} == set(training)


@pytest.mark.slow
def test_the_start_is_that_of_step_0_also_after_a_break(resumed):
    run, _ = resumed
    assert not np.any(run.start_params["output"]["kernel"])  # an untrained head is zero
    assert np.any(run.params["output"]["kernel"])


@pytest.mark.slow
def test_time_and_metrics_of_both_halves_count(straight, resumed, mesh):
    (_, _), (again, workdir) = straight, resumed
    with Checkpointer(workdir / "checkpoints") as saver:
        before = saver.restore(HALF, {}, ["progress"])[1]["progress"]
    seconds = again.timer.summary()
    for phase in ("total", "step", "held_out"):
        assert seconds[phase] > before["seconds"][phase] > 0.0
    assert before["first"] == again.first


@pytest.mark.slow
def test_another_configuration_is_refused_with_its_differences(resumed, mesh):
    _, workdir = resumed
    changes = {"policy": {"dim": 16}, "optimizer": {"learning_rate": 0.5, "eps": 1e-8}, "seed": 3}
    other = make_tiny_method("base", mesh, steps=STEPS, **{**BASE, **changes})
    with pytest.raises(CheckpointError) as error:
        fit(other, workdir)
    message = str(error.value)
    for line in ("policy.dim: 32 -> 16", "optimizer.learning_rate: 0.01 -> 0.5", "seed: 0 -> 3"):
        assert f"\n  {line}\n" in message
    assert "--workdir" in message
    assert "--resume_with_changes" in message
    with pytest.raises(CheckpointError, match=r"--workdir"):
        fit(other, workdir, resume_with_changes=True)
    observe(
        "resume: with another configuration",
        "refused with a list such as `optimizer.learning_rate: 0.01 -> 0.5`",
    )


@pytest.mark.slow
def test_fewer_steps_than_are_done_are_refused(resumed, mesh):
    _, workdir = resumed
    short = make_tiny_method("base", mesh, steps=HALF, **BASE)
    with pytest.raises(CheckpointError, match=f"steps: {STEPS} -> {HALF}"):
        fit(short, workdir)
    with pytest.raises(CheckpointError, match=f"{STEPS}.*steps={HALF}"):
        fit(short, workdir, resume_with_changes=True)


@pytest.mark.slow
def test_another_tokenizer_under_the_same_name_is_refused(resumed, mesh, tmp_path):
    """The file that config.init names has been replaced since the run began."""
    _, workdir = resumed
    task = make_tiny_method("base", mesh, steps=STEPS, **BASE)
    weights = task.load_frozen()["tokenizer"]
    weights["codebook"]["embedding"] = weights["codebook"]["embedding"] * 2.0
    other = dataclasses.replace(task)
    object.__setattr__(other, "load_frozen", lambda: {"tokenizer": weights})
    with pytest.raises(CheckpointError, match="tokenizer"):
        fit(other, workdir)
    observe(
        "resume: with other frozen weights under the same name",
        "refused: they are not those that the run began with",
    )


@pytest.mark.slow
def test_a_place_inside_a_batch_is_refused(resumed, mesh):
    """30 steps of 16 images are no whole number of batches of 14."""
    _, workdir = resumed
    task = make_tiny_method("base", mesh, **BASE | {"steps": STEPS + 1, "batch_size": 14})
    with pytest.raises(CheckpointError, match="batch_size: 16 -> 14"):
        fit(task, workdir)
    with pytest.raises(CheckpointError, match="480 images have been consumed"):
        fit(task, workdir, resume_with_changes=True)


# --- gradients that are not finite ----------------------------------------------------------------


@pytest.fixture
def poisoned(monkeypatch):
    """A NaN in one pixel of one image, in the batches of the given steps."""
    steps = set()
    original = loop.shard_batch
    count = itertools.count(1)

    def shard(batch, mesh):
        if next(count) in steps:
            batch = {**batch, "image": batch["image"].copy()}
            batch["image"][5, 3, 2, 1] = np.nan
        return original(batch, mesh)

    monkeypatch.setattr(loop, "shard_batch", shard)
    return steps


NAN = {
    "microbatch_size": 8,
    "steps": 4,
    "eval": {"every": 4, "images": 8},
    "checkpoint": {"every": 1, "keep_every": 1},
}


@pytest.mark.slow
def test_a_nan_in_one_microbatch_stops_before_it_reaches_anything(mesh, tmp_path, poisoned):
    poisoned.add(3)
    with pytest.raises(HealthError, match=r"step 3.*on_nonfinite"):
        fit(make_tiny_method("vapi", mesh, **NAN), tmp_path)
    with Checkpointer(tmp_path / "checkpoints") as saver:
        assert saver.latest_step() == 2
        _, found = saver.restore(None, {"params": saver.abstract_item(2, "params")})
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found["params"]))
    observe(
        "gradient: a NaN in one microbatch, `on_nonfinite=stop`",
        "the run stops with an error; the update is not applied, the last checkpoint is finite",
    )


@pytest.mark.slow
def test_a_skipped_step_changes_nothing_and_is_counted(mesh, tmp_path, poisoned):
    poisoned.update({2, 3})
    run = fit(make_tiny_method("vapi", mesh, on_nonfinite="skip", max_skipped=2, **NAN), tmp_path)
    assert run.skipped == 2
    one, two, three, four = (
        {
            name: facts.blocks
            for name, facts in read_manifest(tmp_path / "checkpoints" / step).arrays.items()
            if not name.startswith("rest/step")
        }
        for step in "1234"
    )
    assert one == two == three
    assert all(one[name] != four[name] for name in one if name.startswith("params/"))
    rows = read_history(tmp_path / "metrics.jsonl")
    assert [row["nonfinite"] for row in rows if "nonfinite" in row] == [0.0, 1.0, 1.0, 0.0]
    assert rows[2]["grad_norm"] is None
    with Checkpointer(tmp_path / "checkpoints") as saver:
        assert saver.restore(4, {}, ["progress"])[1]["progress"]["skipped"] == 2
    observe(
        "gradient: a NaN in one microbatch, `on_nonfinite=skip`",
        "the step changes nothing, is counted and warned about, and the run goes on",
    )


@pytest.mark.slow
def test_more_skipped_steps_than_allowed_stop_the_run(mesh, tmp_path, poisoned):
    poisoned.update({2, 3})
    task = make_tiny_method("vapi", mesh, on_nonfinite="skip", max_skipped=1, **NAN)
    with pytest.raises(HealthError, match=r"step 3.*max_skipped=1"):
        fit(task, tmp_path)
    observe(
        "gradient: more such steps than `max_skipped`",
        "the run stops with an error at the first one too many",
    )


@pytest.mark.slow
def test_a_policy_that_always_says_the_same_is_stopped_and_not_saved(mesh, tmp_path):
    """Collapse for real: at this temperature all samples of a group are the likeliest tokens."""
    task = make_tiny_method("vapi", mesh)
    start = with_random_head(jax.jit(task.init)(jax.random.key(0)), 1)
    save_safetensors(tmp_path / "start.safetensors", start)
    collapsed = make_tiny_method(
        "vapi",
        mesh,
        vapi={"temperature": 1e-6},
        init={"gpt": str(tmp_path / "start.safetensors")},
        checkpoint={"every": 1},
        eval={"every": 5, "images": 8},
        steps=5,
    )
    with pytest.raises(HealthError, match="step 1.*samples"):
        fit(collapsed, tmp_path / "run")
    assert not [p for p in (tmp_path / "run" / "checkpoints").iterdir() if p.name.isdigit()]
    assert not (tmp_path / "run" / "weights").exists()


def test_a_generator_needs_a_tokenizer(mesh, tmp_path):
    with pytest.raises(WeightsError, match=r"config\.init\.vq"):
        fit(make_tiny_method("base", mesh, init={"vq": ""}), tmp_path)
    missing = str(tmp_path / "no.safetensors")
    with pytest.raises(WeightsError, match="no.safetensors"):
        fit(make_tiny_method("base", mesh, init={"vq": missing}), tmp_path)


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
    run = fit(make_tiny_method("tokenizer", mesh, steps=4, **changes), tmp_path)
    rows = read_history(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert rows[4]["reconstruction_loss"] < rows[1]["reconstruction_loss"]
    assert run.last.keys() == {"reward", "mse", "lpips", "psnr", "codebook_usage"}
    assert run.last["reward"] == pytest.approx(-run.last["mse"] - run.last["lpips"], abs=1e-5)
    assert sorted(run.weights) == ["discriminator.safetensors", "tokenizer.safetensors"]
    # With its checkpoint of step 2 alone, the last two steps are taken again.
    shutil.rmtree(tmp_path / "checkpoints" / "4")
    again = fit(make_tiny_method("tokenizer", mesh, steps=4, **changes), tmp_path)
    assert again.weights == run.weights
    # The file starts another run: its tokenizer, with a fresh discriminator.
    path = str(tmp_path / "weights" / "tokenizer.safetensors")
    base = make_tiny_method("base", mesh, image_size=16, init={"vq": path})
    loaded = flatten(base.load_frozen()["tokenizer"])
    for name, leaf in flatten(jax.device_get(run.params["tokenizer"])).items():
        np.testing.assert_array_equal(loaded[name], leaf)
