"""Several processes compute what one process computes."""

import contextlib
import json
import random
import socket
import sys
import time

import numpy as np
import pytest

from tests.helpers.processes import ends, environment, free_port, main, one_run, program, started


def history(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    changing = ("time", "images_per_second")
    return [{k: v for k, v in row.items() if k not in changing} for row in rows]


LIBRARY = "--xla_cpu_experimental_ynn_fusion_type=" + ",".join(
    f"LIBRARY_FUSION_TYPE_{kind}" for kind in ("INDIVIDUAL_DOT", "REDUCE", "INDIVIDUAL_CONVOLUTION")
)
"""For XLA_FLAGS: the same convolutions on any number of CPU devices a process (`compiler.OPTIONS`)."""

SRUN = """#!/usr/bin/env bash
while [[ "$1" == -* ]]; do shift; done
export SLURM_STEP_ID=0 SLURM_STEP_NODELIST=localhost SLURM_STEP_NUM_TASKS=2 SLURM_NTASKS=2
export SLURM_STEP_TASKS_PER_NODE=2 SLURM_JOB_ID=$JOB
for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & done
wait -n && wait -n
"""


@pytest.mark.slow
def test_two_processes_of_four_devices_compute_what_one_of_eight_does(tmp_path):
    """As launch/slurm.sbatch starts them; and one process goes on from what the two have saved."""
    for _ in range(100):
        job = random.randrange(10**6)
        with contextlib.suppress(OSError), socket.create_server(("", 61440 + job % 4096)):
            break
    path = program(tmp_path / "bin", "srun", SRUN)
    slurm = environment(PATH=path, PYTHON=sys.executable, JOB=str(job))
    flags = main(tmp_path / "two", 2, "--config.cpu_devices=4")[3:]
    output = one_run(["bash", "launch/slurm.sbatch", *flags], slurm)
    assert output.count("2 steps of") == 1  # one process of them tells
    summary = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert summary["devices"]["processes"] == 2
    assert summary["devices"]["mesh"] == {"data": 2, "fsdp": 4}
    saved = tmp_path / "two" / "checkpoints" / "2" / "manifest"
    assert {file.name for file in saved.glob("process*")} == {"process_0.json", "process_1.json"}

    one_run(main(tmp_path / "two", 3))  # goes on from step 2
    one_run(main(tmp_path / "one", 3))
    two, one = history(tmp_path / "two"), history(tmp_path / "one")
    # The first life of the two ended, and was judged, at step 2.
    two = [row for row in two if row["step"] != 2 or "held_out/reward" not in row]
    assert [row["step"] for row in two] == [row["step"] for row in one] == [0, 1, 2, 3, 3]
    for ours, theirs in zip(two, one, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_two_processes_train_on_captions_as_one_does(tmp_path):
    """A T5 in front of the generator: each process encodes the captions of its own rows."""
    env = environment(XDG_CACHE_HOME=str(tmp_path / "cache"))
    env["XLA_FLAGS"] += f" {LIBRARY}"  # two processes have a device each, the one has two
    words = [
        sys.executable, "-m", "vapi_jax.main", "--config=configs/t2i_xl.py:tiny", "--config.steps=2",
        "--config.vapi.group_size=2", "--config.eval.grid_classes=1", "--config.policy.n_layer=1",
        "--config.mesh.data=1", "--config.mesh.fsdp=2", "--config.policy.dtype=float32",
        "--config.condition.options.dtype=float32",
    ]  # fmt: skip
    port = free_port()
    common = ["--config.cpu_devices=1", f"--coordinator=localhost:{port}", "--num_processes=2"]
    commands = [
        [*words, *common, f"--process_id={i}", f"--workdir={tmp_path / 'two'}"] for i in (0, 1)
    ]
    with started(commands, env) as processes:
        found = [ends(process, within=300) for process in processes]
    assert [status for status, _ in found] == [0, 0], found
    one_run([*words, "--config.cpu_devices=2", f"--workdir={tmp_path / 'one'}"], env)
    two, one = history(tmp_path / "two"), history(tmp_path / "one")
    assert [row["step"] for row in two] == [row["step"] for row in one]
    for ours, theirs in zip(two, one, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_a_run_whose_second_process_is_killed_ends_and_leaves_a_checkpoint(tmp_path):
    more = ["--config.cpu_devices=4", f"--coordinator=localhost:{free_port()}", "--num_processes=2"]
    commands = [main(tmp_path, 10**6, *more, f"--process_id={i}") for i in (0, 1)]
    with started(commands) as (first, second):
        deadline = time.monotonic() + 240
        while not (tmp_path / "checkpoints" / "2").exists() and time.monotonic() < deadline:
            assert first.poll() is None, first.communicate()[0]
            time.sleep(0.1)
        second.kill()
        before = time.monotonic()
        status, output = ends(first)
    assert time.monotonic() - before < 10
    assert status == 1, output
    assert "error: process 1 on" in output
    assert "has ended without saying why: killed" in output
    assert (tmp_path / "checkpoints" / "2").exists()
