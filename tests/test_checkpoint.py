"""checkpoint.py: what is saved comes back exactly, on any mesh, or is refused by name."""

import json
import logging
import os
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from vapi_jax.checkpoint import Checkpointer, CheckpointError, abstract_like, array_digest

# Noise of this size (128 KB) neither compresses nor is copied into orbax's index, so the largest file
# of a step holds the very bytes of `kernel` that a restore reads.
KERNEL = (1024, 32)


def mesh_of(*shape):
    return jax.make_mesh(shape, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


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
        "extra": {"step": place(np.int32(seed)), "rng": jax.random.key(seed)},
        "data": json.dumps({"position": seed}).encode(),
    }


def abstract_of(state):
    return {k: bytes if isinstance(v, bytes) else abstract_like(v) for k, v in state.items()}


def assert_same(got, want):
    assert got.keys() == want.keys()
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        if isinstance(b, bytes):
            assert a == b
        else:
            assert a.dtype == b.dtype and array_digest(a) == array_digest(b)


def files_of(directory):
    return [path for path in directory.rglob("*") if path.is_file()]


def flip(path, count=64):
    data = bytearray(path.read_bytes())
    start = (len(data) - count) // 2
    data[start : start + count] = bytes(byte ^ 0xFF for byte in data[start : start + count])
    path.write_bytes(data)


def test_round_trip_keeps_the_last_two(tmp_path):
    with Checkpointer(tmp_path / "c", keep_last=2) as checkpointer:
        assert checkpointer.latest_step() is None
        for step in (1, 2, 3):
            checkpointer.save(step, make_state(step))
    with Checkpointer(tmp_path / "c") as checkpointer:
        assert checkpointer.steps() == [2, 3] and checkpointer.latest_step() == 3
        want = make_state(3)
        step, got = checkpointer.restore(None, abstract_of(want))
        assert step == 3
        assert_same(got, want)
        assert json.loads(got["data"]) == {"position": 3}
        # One item alone, of an older step.
        step, got = checkpointer.restore(2, {"params": abstract_of(want)["params"]})
        assert step == 2
        assert_same(got, {"params": make_state(2)["params"]})


def test_restores_onto_another_mesh(tmp_path):
    saved = make_state(1, mesh_of(2, 4))
    want = make_state(1, mesh_of(8, 1))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, saved)
        _, got = checkpointer.restore(1, abstract_of(want))
    assert_same(got, saved)
    kernel = got["params"]["layer"]["kernel"]
    assert kernel.sharding.is_equivalent_to(want["params"]["layer"]["kernel"].sharding, 2)
    assert kernel.addressable_data(0).shape == (KERNEL[0], KERNEL[1] // 8)


def test_restores_without_a_sharding_on_one_device(tmp_path):
    state = {"params": make_state(1)["params"]}
    plain = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state)
        _, got = checkpointer.restore(None, plain)
    assert_same(got, state)
    assert len(got["params"]["layer"]["kernel"].devices()) == 1


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


def test_every_item_is_checked_against_its_digest(tmp_path):
    """Values that orbax reads without complaint but that are not those saved: named array by array."""
    state = make_state(1)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state)
    manifest = tmp_path / "1" / "manifest" / "metadata"
    content = json.loads(manifest.read_text())
    for name in ("params/scale", "opt_state/0/mu/layer/kernel", "extra/rng"):
        changed = json.loads(json.dumps(content))
        changed["arrays"][name]["sha256"] = "0" * 64
        manifest.write_text(json.dumps(changed))
        with (
            Checkpointer(tmp_path) as checkpointer,
            pytest.raises(CheckpointError, match=f"step 1: the values of {name} differ"),
        ):
            checkpointer.restore(1, abstract_of(state))
    manifest.write_text(json.dumps(content))
    data = tmp_path / "1" / "data" / "metadata"
    data.write_text(data.read_text().replace("1", "7"))
    with (
        Checkpointer(tmp_path) as checkpointer,
        pytest.raises(CheckpointError, match="the values of data differ"),
    ):
        checkpointer.restore(1, abstract_of(state))


# Orbax leaves the coroutines of the other reads unawaited when one of them fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", ["delete", "truncate", "manifest"])
def test_error_when_nothing_verifies(tmp_path, damage):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(5, make_state(5))
    largest = max(files_of(tmp_path / "5"), key=lambda path: path.stat().st_size)
    if damage == "delete":
        largest.unlink()
    elif damage == "truncate":
        largest.write_bytes(largest.read_bytes()[:100])
    else:
        (tmp_path / "5" / "manifest" / "metadata").write_text("{")
    with (
        Checkpointer(tmp_path) as checkpointer,
        pytest.raises(CheckpointError, match=r"(?s)step 5: .*another work directory") as error,
    ):
        checkpointer.restore(None, abstract_of(make_state(5)))
    assert str(tmp_path) in str(error.value)


def test_another_model_is_refused_at_once(tmp_path):
    state = {"params": make_state(1)["params"]}
    abstract = abstract_of(state)
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(CheckpointError, match="holds no checkpoint"):
            checkpointer.restore(None, abstract)
        checkpointer.save(1, state)
        wrong = {"params": abstract["params"] | {"scale": jax.ShapeDtypeStruct((4,), jnp.bfloat16)}}
        with pytest.raises(ValueError, match=r"another model: params/scale was saved as .*\[3\]"):
            checkpointer.restore(1, wrong)
        wrong = {"params": {"scale": abstract["params"]["scale"]}}
        with pytest.raises(ValueError, match="params/layer/kernel is only in the checkpoint"):
            checkpointer.restore(1, wrong)
        with pytest.raises(ValueError, match="no text item 'data'"):
            checkpointer.restore(1, {"data": bytes})
        # None of that is damage.
        assert checkpointer.latest_step() == 1


def test_save_refuses_what_would_be_lost(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(3, {"params": {"a": jnp.ones(2)}})
        for step in (2, 3):
            with pytest.raises(ValueError, match="already holds step 3"):
                checkpointer.save(step, {"params": {"a": jnp.ones(2)}})
        with pytest.raises(ValueError, match="reserved"):
            checkpointer.save(4, {"manifest": {"a": jnp.ones(2)}})
        with pytest.raises(ValueError, match="no array"):
            checkpointer.save(4, {"params": {}})


KILLED = """
import os, signal, sys
import jax.numpy as jnp
from vapi_jax.checkpoint import Checkpointer

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
    process = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        check=False,
        env=os.environ,
        capture_output=True,
        text=True,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert [p for p in tmp_path.iterdir() if p.name.startswith("2.")], "it was not in mid-save"
    abstract = {"params": {"a": jax.ShapeDtypeStruct((4,), jnp.float32)}}
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.steps() == [1]
        step, got = checkpointer.restore(None, abstract)
        assert step == 1 and got["params"]["a"].tolist() == [1.0] * 4
        checkpointer.save(2, {"params": {"a": jnp.full(4, 3.0)}})
    assert sorted(p.name for p in tmp_path.iterdir() if p.name[0].isdigit()) == ["1", "2"]
