"""checkpoint.py: what is saved comes back exactly, on any mesh, or is refused by name."""

import gc
import json
import logging
import re
import shutil
import signal
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.helpers import commands
from tests.helpers.observations import observe
from vapi_jax.checkpoint import main as command
from vapi_jax.training.checkpoint import (
    Checkpointer,
    CheckpointError,
    abstract_like,
    array_digest,
    digests,
)
from vapi_jax.training.checkpoint.manifest import facts_digest, read_manifest

# Noise of this size (128 KB) neither compresses nor is copied into orbax's index, so the largest file
# of a step holds the very bytes of `kernel` that a restore reads.
KERNEL = (1024, 32)


def mesh_of(*shape, devices=None):
    axes = {"axis_types": (AxisType.Auto,) * 2, "devices": devices}
    return jax.make_mesh(shape, ("data", "fsdp"), **axes)


def make_state(seed, mesh=None):
    mesh = mesh or mesh_of(2, 4)
    rng = np.random.default_rng(seed)

    def place(value, *spec):
        return jax.device_put(value, NamedSharding(mesh, P(*spec)))

    params = {
        "layer": {"kernel": place(rng.standard_normal(KERNEL).astype(np.float32), "fsdp", "data")},
        "scale": place(jnp.asarray(rng.standard_normal(3), jnp.bfloat16)),
    }
    return {
        "params": params,
        "opt_state": optax.adamw(1e-3, mask={"layer": True, "scale": False}).init(params),
        "extra": {"step": place(np.int32(seed)), "rng": jax.random.key_data(jax.random.key(seed))},
    }


def facts_of(seed):
    return {"data": {"position": seed}, "config": {"name": "ξ", "betas": (0.9, 0.999)}}


def abstract_of(state):
    return {item: abstract_like(tree) for item, tree in state.items()}


def assert_same(got, want):
    assert got.keys() == want.keys()
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype and array_digest(a) == array_digest(b)


def files_of(directory):
    return [path for path in directory.rglob("*") if path.is_file()]


def flip(path, count=64):
    data = bytearray(path.read_bytes())
    start = (len(data) - count) // 2
    data[start : start + count] = bytes(byte ^ 0xFF for byte in data[start : start + count])
    path.write_bytes(data)


def test_what_is_saved_comes_back_item_by_item(tmp_path):
    with Checkpointer(tmp_path / "c", keep_last=2) as checkpointer:
        assert checkpointer.latest_step() is None
        for step in (1, 2, 3):
            checkpointer.save(step, make_state(step), facts_of(step))
    with Checkpointer(tmp_path / "c") as checkpointer:
        assert checkpointer.steps() == [2, 3] and checkpointer.latest_step() == 3
        want = make_state(3)
        step, got = checkpointer.restore(None, abstract_of(want), ["data", "config"])
        assert step == 3
        assert (got.pop("data"), got.pop("config")) == (
            {"position": 3},
            {"name": "ξ", "betas": [0.9, 0.999]},
        )
        assert_same(got, want)
        # One item alone, of an older step; facts alone.
        step, got = checkpointer.restore(2, {"params": abstract_of(want)["params"]})
        assert step == 2
        assert_same(got, {"params": make_state(2)["params"]})
        assert checkpointer.restore(2, {}, ["data"]) == (2, {"data": {"position": 2}})


def test_the_newest_stay_and_every_so_manieth_for_good(tmp_path):
    with Checkpointer(tmp_path, keep_last=2, keep_every=3) as checkpointer:
        for step in range(1, 9):
            checkpointer.save(step, {"params": {"a": jnp.full(3, step)}})
        checkpointer.wait()
        assert checkpointer.steps() == [3, 6, 7, 8]


def test_restores_onto_another_mesh(tmp_path):
    saved = make_state(1, mesh_of(2, 4))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, saved)
        for mesh in (mesh_of(8, 1), mesh_of(1, 1, devices=jax.devices()[:1])):
            want = make_state(1, mesh)
            _, got = checkpointer.restore(1, abstract_of(want))
            assert_same(got, saved)
            kernel, wanted = (s["params"]["layer"]["kernel"] for s in (got, want))
            assert kernel.sharding.is_equivalent_to(wanted.sharding, 2)
    observe(
        "checkpoint: restored onto another mesh (2x4 to 8x1 and to 1 device)",
        "every array has the values that were saved, in the new layout",
    )


def test_the_digest_of_a_state_does_not_depend_on_its_mesh(tmp_path):
    meshes = (mesh_of(2, 4), mesh_of(8, 1), mesh_of(1, 1, devices=jax.devices()[:1]))
    digests = []
    for number, mesh in enumerate(meshes):
        with Checkpointer(tmp_path / str(number)) as checkpointer:
            checkpointer.save(1, make_state(1, mesh))
        digests.append(read_manifest(tmp_path / str(number) / "1").digest)
    assert digests[0] == digests[1] == digests[2]
    with Checkpointer(tmp_path / "other") as checkpointer:
        state = make_state(1)
        state["params"]["scale"] = state["params"]["scale"].at[1].add(1e-2)
        checkpointer.save(1, state)
    assert read_manifest(tmp_path / "other" / "1").digest != digests[0]


def test_restores_without_a_sharding_on_one_device(tmp_path):
    state = {"params": make_state(1)["params"]}
    plain = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state)
        _, got = checkpointer.restore(None, plain)
    assert_same(got, state)
    assert len(got["params"]["layer"]["kernel"].devices()) == 1


def test_a_save_compiles_nothing(tmp_path):
    """What both rows of a mesh hold is written by one of them, uncut."""
    compiled = []

    def listen(event, *_, **__):
        if "backend_compile" in event:
            compiled.append(event)

    mesh = mesh_of(2, 4)
    params = {
        name: jax.device_put(np.ones((count, 24), np.float32), NamedSharding(mesh, P("fsdp")))
        for name, count in {"a": 8, "b": 40}.items()
    }
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        with Checkpointer(tmp_path) as checkpointer:
            compiled.clear()
            checkpointer.save(1, {"params": params})
            checkpointer.wait()
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not compiled


def test_state_may_be_donated_right_after_save(tmp_path):
    """The background write must not see the values of the next step."""
    update = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    params = {"kernel": jnp.zeros((512, 512))}
    abstract = {"params": abstract_like(params)}
    with Checkpointer(tmp_path) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, {"params": params})
            for _ in range(5):
                params = update(params)
        step, got = checkpointer.restore(None, abstract)
    assert step == 3 and (np.asarray(got["params"]["kernel"]) == 10).all()


def test_flipped_bytes_fall_back_with_a_warning(tmp_path, caplog):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, make_state(1))
        checkpointer.save(2, make_state(2))
    flip(max(files_of(tmp_path / "2"), key=lambda path: path.stat().st_size))
    with Checkpointer(tmp_path) as checkpointer:
        with caplog.at_level(logging.WARNING):
            step, got = checkpointer.restore(None, abstract_of(make_state(2)))
        assert step == 1
        assert_same(got, make_state(1))
        assert "DAMAGED CHECKPOINT: step 2" in caplog.text and str(tmp_path) in caplog.text
        assert "params/layer/kernel" in caplog.text and "Restored step 1" in caplog.text
        # The run repeats step 2 and saves it in the place of the damaged one.
        assert checkpointer.latest_step() == 1
        checkpointer.save(2, make_state(20))
        step, got = checkpointer.restore(None, abstract_of(make_state(20)))
        assert step == 2
        assert_same(got, make_state(20))


def damage(kind, path):
    if kind == "deleted":
        path.unlink()
    elif kind == "emptied":
        path.write_bytes(b"")
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        flip(path, min(8, path.stat().st_size))


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    directory = tmp_path_factory.mktemp("two_steps")
    with Checkpointer(directory) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, make_state(step), facts_of(step))
    return directory


# Orbax leaves the coroutines of the other reads unawaited when one of them fails.
unawaited = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@unawaited
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["deleted", "emptied", "truncated", "altered in 8 bytes"])
def test_no_damage_to_any_file_gives_other_values(kind, two_steps, tmp_path, caplog):
    """Every file of a step in turn: the very values, or the step before and a message that says so."""
    abstract = abstract_of(make_state(1))
    wanted = {step: make_state(step) for step in (1, 2)}
    names = sorted(path.relative_to(two_steps) for path in files_of(two_steps / "2"))
    passed_over = set()
    for name in names:
        copy = tmp_path / "copy"
        shutil.copytree(two_steps, copy)
        damage(kind, copy / name)
        caplog.clear()
        with caplog.at_level(logging.WARNING), Checkpointer(copy) as checkpointer:
            step, got = checkpointer.restore(None, abstract, ["data", "config"])
        facts = {name: got.pop(name) for name in ("data", "config")}
        assert facts == json.loads(json.dumps(facts_of(step)))  # a tuple comes back as a list
        assert_same(got, wanted[step])
        if step == 1:
            passed_over.add(name.parts[1])
            (line,) = [r.getMessage() for r in caplog.records if "DAMAGED" in r.getMessage()]
            # The file itself, its folder, or the array that it held.
            item = name.parts[1]
            assert str(copy / "2" / item) in line or f"the values of {item}" in line, line
        shutil.rmtree(copy)
    gc.collect()
    assert passed_over == {"params", "opt_state", "extra", "data", "config", "manifest"}
    observe(
        f"checkpoint: a file is {kind}",
        f"each of the {len(names)} files of a step in turn: the run goes on from the step before "
        "with a message that names file or array, or the file was of no importance and every value "
        "is right; never another value",
    )


def rewritten(path, change):
    """A manifest after a change, with a digest of itself that is right."""
    document = json.loads(path.read_text())
    change(document["manifest"])
    document["sha256"] = facts_digest(document["manifest"])
    path.write_text(json.dumps(document))


def test_every_array_and_fact_is_checked_against_its_digest(two_steps, tmp_path):
    """Values that orbax reads without complaint but that are not those saved: named one by one."""
    state = make_state(1)
    for name in ("params/scale", "opt_state/0/mu/layer/kernel", "extra/rng"):
        copy = tmp_path / name.replace("/", "_")
        shutil.copytree(two_steps / "1", copy / "1")

        def forge(manifest, name=name):
            manifest["arrays"][name]["blocks"][0]["sha256"] = "0" * 64

        rewritten(copy / "1" / "manifest" / "process_0.json", forge)
        with (
            Checkpointer(copy) as checkpointer,
            pytest.raises(CheckpointError, match=f"step 1.*{name}.*{copy}/1"),
        ):
            checkpointer.restore(1, abstract_of(state))
    shutil.copytree(two_steps / "1", tmp_path / "facts" / "1")
    data = tmp_path / "facts" / "1" / "data" / "metadata"
    data.write_text(data.read_text().replace("1", "7"))
    with (
        Checkpointer(tmp_path / "facts") as checkpointer,
        pytest.raises(CheckpointError, match="values of data"),
    ):
        checkpointer.restore(1, {}, ["data"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["arrays"].pop("params/scale"), "digest"),
        (lambda m: m["arrays"]["params/scale"].update(shape=[4]), "digest"),
        (lambda m: m.pop("arrays"), "digest"),
    ],
)
def test_a_damaged_manifest_is_damage_and_no_other_model(change, message, two_steps, tmp_path):
    shutil.copytree(two_steps / "1", tmp_path / "1")
    path = tmp_path / "1" / "manifest" / "process_0.json"
    document = json.loads(path.read_text())
    change(document["manifest"])
    path.write_text(json.dumps(document))
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(CheckpointError, match=message):
        checkpointer.restore(1, abstract_of(make_state(1)))


def test_a_manifest_that_leaves_out_a_part_of_an_array_is_refused(two_steps, tmp_path):
    shutil.copytree(two_steps / "1", tmp_path / "1")

    def shorten(manifest):
        manifest["arrays"]["params/layer/kernel"]["blocks"][0]["shape"] = [1, 32]

    rewritten(tmp_path / "1" / "manifest" / "process_0.json", shorten)
    with (
        Checkpointer(tmp_path) as checkpointer,
        pytest.raises(CheckpointError, match="params/layer/kernel"),
    ):
        checkpointer.restore(1, abstract_of(make_state(1)))


@unawaited
def test_error_when_nothing_verifies(two_steps, tmp_path):
    shutil.copytree(two_steps, tmp_path / "c")
    for step in ("1", "2"):
        max(files_of(tmp_path / "c" / step), key=lambda path: path.stat().st_size).unlink()
    with (
        Checkpointer(tmp_path / "c") as checkpointer,
        pytest.raises(CheckpointError, match=r"(?s)step 2.*step 1") as error,
    ):
        checkpointer.restore(None, abstract_of(make_state(5)))
    assert str(tmp_path) in str(error.value)
    observe(
        "checkpoint: every one is damaged",
        "the run ends with an error that says what is wrong with each",
    )


def test_another_model_is_refused_at_once(tmp_path):
    state = {"params": make_state(1)["params"]}
    abstract = abstract_of(state)
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(CheckpointError, match="holds no checkpoint"):
            checkpointer.restore(None, abstract)
        checkpointer.save(1, state)
        wrong = {"params": abstract["params"] | {"scale": jax.ShapeDtypeStruct((4,), jnp.bfloat16)}}
        with pytest.raises(ValueError, match=r"params/scale.*\[3\]"):
            checkpointer.restore(1, wrong)
        wrong = {"params": {"scale": abstract["params"]["scale"]}}
        with pytest.raises(ValueError, match="params/layer/kernel"):
            checkpointer.restore(1, wrong)
        with pytest.raises(ValueError, match="'data'"):
            checkpointer.restore(1, {}, ["data"])
        # None of that is damage.
        assert checkpointer.latest_step() == 1


def test_save_refuses_what_would_be_lost(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(3, {"params": {"a": jnp.ones(2)}})
        for step in (2, 3):
            with pytest.raises(ValueError, match="step 3"):
                checkpointer.save(step, {"params": {"a": jnp.ones(2)}})
        for taken in ({"manifest": {"a": jnp.ones(2)}}, {"data": {"a": jnp.ones(2)}}):
            with pytest.raises(ValueError, match="is taken"):
                checkpointer.save(4, taken, {"data": 1})
        with pytest.raises(ValueError, match="params/rng.*JAX"):
            checkpointer.save(4, {"params": {"rng": jax.random.key(0)}})
        with pytest.raises(ValueError, match="no array"):
            checkpointer.save(4, {"params": {}})


def test_a_step_that_cannot_fit_is_refused_before_it_is_begun(tmp_path, monkeypatch):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, make_state(1))
        checkpointer.wait()
        before = sorted(files_of(tmp_path))
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        with pytest.raises(CheckpointError, match=r"step 2.*1,000.*steps: 1"):
            checkpointer.save(2, make_state(2))
        assert sorted(files_of(tmp_path)) == before
        assert checkpointer.damage(1) == ""


def test_a_save_that_fails_is_told_and_loses_nothing(tmp_path, monkeypatch):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, make_state(1))
        checkpointer.wait()

        def fail(*_):
            raise OSError(122, "Disk quota exceeded")

        monkeypatch.setattr(digests, "write_part", fail)
        checkpointer.save(2, make_state(2))
        with pytest.raises(CheckpointError, match=r"step 2.*quota.*steps: 1"):
            checkpointer.wait()
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.steps() == [1]
        assert checkpointer.damage(1) == ""


KILLED = """
import os, signal, sys
import jax.numpy as jnp
from vapi_jax.training.checkpoint import Checkpointer

checkpointer = Checkpointer(sys.argv[1])
checkpointer.save(1, {"params": {"a": jnp.ones(4)}})
checkpointer.wait()

def kill_before_commit(event, arguments):
    # The rename of the step's temporary folder is what commits a save.
    if event == "os.rename" and "2.orbax-checkpoint-tmp" in os.path.basename(str(arguments[0])):
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(kill_before_commit)
checkpointer.save(2, {"params": {"a": jnp.full(4, 2.0)}})
checkpointer.close()
"""


def test_a_kill_in_mid_save_leaves_only_what_is_ignored(tmp_path):
    process = commands.python("-c", KILLED, tmp_path)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert [p for p in tmp_path.iterdir() if p.name.startswith("2.")], "it was not in mid-save"
    abstract = {"params": {"a": jax.ShapeDtypeStruct((4,), jnp.float32)}}
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.steps() == [1]
        step, got = checkpointer.restore(None, abstract)
        assert step == 1 and got["params"]["a"].tolist() == [1.0] * 4
        checkpointer.save(2, {"params": {"a": jnp.full(4, 3.0)}})
    assert sorted(p.name for p in tmp_path.iterdir() if p.name[0].isdigit()) == ["1", "2"]


# --- for people -----------------------------------------------------------------------------------


def test_inspect_tells_steps_digests_and_items(two_steps, tmp_path, capsys):
    (tmp_path / "checkpoints").symlink_to(two_steps)
    assert command(["inspect", str(tmp_path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [entry["step"] for entry in told["steps"]] == [1, 2]
    one, two = told["steps"]
    assert one["digest"] != two["digest"] and len(one["digest"]) == 64
    assert list(one["items"]) == ["params", "opt_state", "extra", "data", "config"]
    numbers = KERNEL[0] * KERNEL[1] + 3
    nbytes = 4 * KERNEL[0] * KERNEL[1] + 2 * 3
    assert one["items"]["params"] == {
        "kind": "arrays", "arrays": 2, "numbers": numbers, "bytes": nbytes
    }  # fmt: skip
    assert one["bytes"] > nbytes and one["saved"].endswith("+00:00") and one["damage"] == ""
    assert command(["inspect", str(two_steps)]) == 0
    text = capsys.readouterr().out
    assert one["digest"][:16] in text and two["digest"][:16] in text and "opt_state" in text


@unawaited
def test_verify_says_what_is_damaged_and_fails(two_steps, tmp_path, capsys):
    shutil.copytree(two_steps, tmp_path / "c")
    assert command(["verify", str(tmp_path / "c")]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "step 1: 9 arrays, whole",
        "step 2: 9 arrays, whole",
    ]
    flip(max(files_of(tmp_path / "c" / "1"), key=lambda path: path.stat().st_size))
    assert command(["verify", str(tmp_path / "c")]) == 1
    first, second = capsys.readouterr().out.splitlines()
    assert f"DAMAGED: the values of params/layer/kernel in {tmp_path}/c/1 differ" in first
    assert second == "step 2: 9 arrays, whole"
    (tmp_path / "c" / "2" / "opt_state" / "_METADATA").unlink()
    assert command(["verify", str(tmp_path / "c"), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)["steps"]
    assert f"{tmp_path}/c/2/opt_state" in told[1]["damage"]


def test_a_damaged_manifest_and_unfinished_saves_are_shown(two_steps, tmp_path, capsys):
    shutil.copytree(two_steps, tmp_path / "c")
    (tmp_path / "c" / "2" / "manifest" / "process_0.json").unlink()
    (tmp_path / "c" / "3.orbax-checkpoint-tmp").mkdir()
    assert command(["inspect", str(tmp_path / "c")]) == 1
    text = capsys.readouterr().out
    assert "step 2 is DAMAGED" in text and re.search(r"no file .*process_0.json", text)
    assert "3.orbax-checkpoint-tmp" in text


def test_a_folder_without_checkpoints_is_an_error(tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "absent"):
        assert command(["verify", str(folder)]) == 2
        assert f"error: {folder} holds no checkpoints" in capsys.readouterr().err


def test_help_has_examples():
    assert "verify runs/demo" in commands.module("checkpoint", "--help").stdout


# --- what a save costs ----------------------------------------------------------------------------


@pytest.mark.slow
def test_a_save_holds_the_loop_for_a_copy_and_no_longer(tmp_path):
    """Hashing and writing happen behind the loop's back."""
    noise = np.random.default_rng(0).standard_normal((64, 1 << 20), np.float32)
    state = {"params": {str(i): jnp.asarray(noise[i]) for i in range(64)}}  # 268 MB
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"params": {"warm": jnp.ones(1)}})
        checkpointer.wait()
        begin = time.perf_counter()
        checkpointer.save(2, state)
        held = time.perf_counter() - begin
        checkpointer.wait()
        whole = time.perf_counter() - begin
    assert held < 0.8 * whole
    observe(
        "checkpoint: what saving 268 MB costs the loop (CPU, 2 cores)",
        f"the loop was held for {held:.2f} s of the {whole:.2f} s that hashing and writing took",
    )
