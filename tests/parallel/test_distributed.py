"""Several processes: finding each other, ending together, and computing what one process computes."""

import contextlib
import json
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from tests.helpers.paths import ROOT
from vapi_jax.parallel import cluster, distributed
from vapi_jax.parallel.cluster import DistributedError, Place, find_place, first_host


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def environment(**more):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "JAX_", "XLA_"))}
    return kept | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | more


@contextlib.contextmanager
def started(commands, env, cwd=ROOT):
    """Processes with their output in `.log`, and none of them or theirs afterwards."""
    processes = []
    try:
        for command in commands:
            process = subprocess.Popen(
                list(map(str, command)),
                cwd=cwd,
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
            processes.append(process)  # at once, so that it is ended if the next cannot start
        yield processes
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


# --- which process is this? -----------------------------------------------------------------------

STEP = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NODELIST": "gpu[007-009]",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_TASKS_PER_NODE": "1(x3)",
    "SLURM_NTASKS": "3",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        ({"JAX_NUM_PROCESSES": "1"}, None),
        (STEP, Place("gpu007:61443", 3, 2)),
        (STEP | {"JAX_COORDINATOR_ADDRESS": "other:99"}, Place("other:99", 3, 2)),
        (STEP | {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
        # A batch script is told of the job's tasks, but is none of them.
        ({k: v for k, v in STEP.items() if k != "SLURM_STEP_NODELIST"}, None),
        (
            STEP | {"SLURM_STEP_TASKS_PER_NODE": "3", "SLURM_LOCALID": "2"},
            Place("gpu007:61443", 3, 2, (2,)),
        ),
        (
            STEP | {"SLURM_STEP_TASKS_PER_NODE": "3", "CUDA_VISIBLE_DEVICES": "2"},
            Place("gpu007:61443", 3, 2),
        ),
        (
            {
                "JAX_COORDINATOR_ADDRESS": "[::1]:80",
                "JAX_NUM_PROCESSES": "8",
                "JAX_PROCESS_ID": "0",
            },
            Place("[::1]:80", 8, 0),
        ),
    ],
)
def test_a_process_finds_its_place_in_the_environment(environ, expected):
    assert find_place(environ=environ) == expected


def test_flags_go_before_the_environment():
    assert find_place("a:1", 5, 0, environ=STEP) == Place("a:1", 5, 0)
    assert find_place(process_id=1, environ=STEP) == Place("gpu007:61443", 3, 1)


@pytest.mark.parametrize(
    ("arguments", "environ", "message"),
    [
        (("a:1", None, None), {}, "--num_processes .* and --process_id .* are missing"),
        (
            (None, 2, 0),
            {},
            r"here --coordinator=HOST:PORT \(or JAX_COORDINATOR_ADDRESS\) is missing",
        ),
        (("a:1", 2, 2), {}, "process_id=2 of num_processes=2: .* the last is 1"),
        (("a:1", 2, -1), {}, "process_id=-1 of"),
        (("a:1", 0, 0), {}, "num_processes=0"),
        (("a", 2, 0), {}, "coordinator='a': give HOST:PORT"),
        (("a:99999", 2, 0), {}, "coordinator='a:99999'"),
        ((None, None, None), {"JAX_PROCESS_ID": "first"}, "JAX_PROCESS_ID='first'.* no number"),
    ],
)
def test_what_is_missing_or_impossible_is_named(arguments, environ, message):
    with pytest.raises(DistributedError, match=message):
        find_place(*arguments, environ=environ)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node001", "node001"),
        ("node001,other", "node001"),
        ("gpu[007-9,12],login", "gpu007"),
        ("gpu[7,12-14]", "gpu7"),
        ("rack[1-2]node[03-04]-ib,x", "rack1node03-ib"),
    ],
)
def test_the_first_host_of_a_slurm_list(nodes, host):
    assert first_host(nodes) == host


def test_cloud_tpu_is_asked_where_nothing_else_is_known(monkeypatch):
    from jax._src.clusters import ClusterEnv

    assert {cluster.name for cluster in ClusterEnv._cluster_types} >= set(cluster._TPU_CLUSTERS)

    class Pod:
        name = "gketpu"
        is_env_present = staticmethod(lambda: True)
        get_coordinator_address = staticmethod(lambda timeout_secs, port: "worker-0:8482")
        get_process_count = staticmethod(lambda: 4)
        get_process_id = staticmethod(lambda: 3)

    monkeypatch.setattr(ClusterEnv, "_cluster_types", [Pod])
    assert find_place(environ={}) == Place("worker-0:8482", 4, 3)
    assert find_place("a:1", 2, 0, environ={}) == Place("a:1", 2, 0)


# --- the meeting ----------------------------------------------------------------------------------


def meet(places, timeout=10.0):
    """What each of several processes, here threads, gets from the meeting: links and port, or error."""
    found = [None] * len(places)

    def one(number, where):
        try:
            join = distributed._welcome if where.process == 0 else distributed._call
            found[number] = join(where, timeout)
        except DistributedError as error:
            found[number] = str(error)

    threads = [threading.Thread(target=one, args=item) for item in enumerate(places)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for result in found:
        if isinstance(result, tuple):
            for link in result[0]:
                link.close()
    return found


def test_all_meet_and_learn_one_port_though_a_stranger_calls():
    address = f"127.0.0.1:{free_port()}"

    def stranger():
        for said in (b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 10000, b'{"hello": "vapi_jax"}\n', b""):
            for _ in range(100):
                with contextlib.suppress(OSError):
                    with socket.create_connection(("127.0.0.1", int(address[10:]))) as caller:
                        caller.sendall(said)
                    break
                time.sleep(0.01)

    calling = threading.Thread(target=stranger)
    calling.start()
    found = meet([Place(address, 3, process) for process in (0, 1, 2)])
    calling.join(10)
    assert sorted(link.process for link in found[0][0]) == [1, 2]
    assert found[1][0][0].process == 0
    assert len({port for _, port in found}) == 1


def test_who_does_not_come_is_named_to_all_who_came():
    address = f"127.0.0.1:{free_port()}"
    found = meet([Place(address, 4, 0), Place(address, 4, 2)], timeout=1.5)
    assert "2 of 4 processes did not come within 1.5 s: 1, 3." in found[0]
    assert found[1] == found[0]


def test_a_coordinator_out_of_reach_is_named():
    address = f"127.0.0.1:{free_port()}"
    (said,) = meet([Place(address, 2, 1)], timeout=1.0)
    assert (
        f"process 1 could not reach process 0 at {address} within 1 s (Connection refused)" in said
    )


def test_two_processes_with_one_number_are_refused():
    address = f"127.0.0.1:{free_port()}"
    found = meet([Place(address, 3, process) for process in (0, 1, 1)])
    assert all("two processes call themselves process 1" in said for said in found)


def test_runs_of_another_size_are_refused():
    address = f"127.0.0.1:{free_port()}"
    found = meet([Place(address, 2, 0), Place(address, 3, 1)])
    assert all("in a run of 3 processes, process 0 in one of 2" in said for said in found)


def test_a_port_in_use_is_named():
    with socket.create_server(("127.0.0.1", 0)) as server:
        (said,) = meet([Place(f"127.0.0.1:{server.getsockname()[1]}", 2, 0)])
    assert "cannot listen on port" in said
    assert "Give another port" in said


# --- one end for all ------------------------------------------------------------------------------

WORK = """
import sys, time
from vapi_jax.parallel import distributed
from vapi_jax.parallel.cluster import Place

number, count, address, ending = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]

def work():
    from jax.experimental import multihost_utils
    multihost_utils.sync_global_devices("all are here")
    print("at work", flush=True)
    if ending == "well":
        return 0
    if number == count - 1 and ending == "error":
        with distributed.telling():
            raise ValueError("the disk is full")
    if number == 0 and ending == "status":
        return 3
    time.sleep(100)  # as in a collective that nobody else enters
    return 0

sys.exit(distributed.together(Place(address, count, number), work, 60.0))
"""


@contextlib.contextmanager
def at_work(count, ending):
    address = f"127.0.0.1:{free_port()}"
    commands = [[sys.executable, "-c", WORK, i, count, address, ending] for i in range(count)]
    with started(commands, environment()) as processes:
        for process in processes:
            for line in process.stdout:
                if "at work" in line:
                    break
        yield processes


def ends(process, within=distributed.PAUSE + distributed.UNWINDING + 5.0):
    output, _ = process.communicate(timeout=within)
    return process.returncode, output


def test_processes_that_are_done_end_with_0():
    with at_work(2, "well") as processes:
        assert [ends(process)[0] for process in processes] == [0, 0]


def test_an_error_in_one_process_ends_all_with_its_reason():
    with at_work(3, "error") as processes:
        found = [ends(process, within=distributed.PAUSE + 5.0) for process in processes]
    assert [status for status, _ in found] == [1, 1, 1]
    for _, output in found[:2]:
        assert "error: process 2 on" in output
        assert "has failed with ValueError: the disk is full" in output
        assert "Traceback" not in output
    assert "ValueError: the disk is full" in found[2][1]


def test_a_status_of_process_0_ends_all():
    with at_work(2, "status") as processes:
        found = [ends(process) for process in processes]
    assert [status for status, _ in found] == [3, 1]
    assert "process 0 on" in found[1][1]
    assert "has failed with status 3; its own output says why" in found[1][1]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_is_killed_ends_the_other_at_once(victim):
    with at_work(2, "never") as processes:
        processes[victim].kill()
        status, output = ends(processes[1 - victim], within=5.0)
    assert status != 0
    # Process 0 takes JAX's service with it, and JAX may be the first to say so.
    said = f"error: process {victim} on"
    assert said in output or (victim == 0 and "leader task" in output), output


# --- whole runs -----------------------------------------------------------------------------------


def main(workdir, steps, *more):
    """A VA-π run of a few seconds over eight devices."""
    return [
        sys.executable, "-m", "vapi_jax.main", "--config=configs/bench_cpu.py:tiny",
        f"--workdir={workdir}", f"--config.steps={steps}", "--config.data.image_size=16",
        "--config.vapi.group_size=2", "--config.eval.every=100", "--config.eval.grid_classes=1",
        "--config.eval.grid_per_class=1", "--config.policy.n_layer=1", "--config.policy.dim=32",
        "--config.policy.n_head=2", "--config.init.gpt=", "--config.checkpoint.every=1", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def lean(tmp_path_factory):
    """An environment in which whole runs share what they compile."""
    return environment(
        JAX_COMPILATION_CACHE_DIR=str(tmp_path_factory.mktemp("compiled")),
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
        JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES="-1",
        JAX_DISABLE_MOST_OPTIMIZATIONS="1",
    )


SRUN = """#!/usr/bin/env bash
while [[ "$1" == -* ]]; do shift; done
export SLURM_STEP_ID=0 SLURM_STEP_NODELIST=localhost SLURM_STEP_NUM_TASKS=2 SLURM_NTASKS=2
export SLURM_STEP_TASKS_PER_NODE=2 SLURM_JOB_ID=$JOB
for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & done
wait -n && wait -n
"""


def program(folder, name, text):
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(text)
    path.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def history(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    changing = ("time", "images_per_second")
    return [{k: v for k, v in row.items() if k not in changing} for row in rows]


def one_run(command, env, timeout=300):
    with started([command], env) as (process,):
        output, _ = process.communicate(timeout=timeout)
    assert process.returncode == 0, output
    return output


@pytest.mark.slow
def test_two_processes_of_four_devices_compute_what_one_of_eight_does(tmp_path, lean):
    """As launch/slurm.sbatch starts them; and one process goes on from what the two have saved."""
    for _ in range(100):
        job = random.randrange(10**6)
        with contextlib.suppress(OSError), socket.create_server(("", 61440 + job % 4096)):
            break
    path = program(tmp_path / "bin", "srun", SRUN)
    slurm = lean | {"PATH": path, "PYTHON": sys.executable, "JOB": str(job)}
    flags = main(tmp_path / "two", 2, "--config.cpu_devices=4")[3:]
    one_run(["bash", "launch/slurm.sbatch", *flags], slurm)
    summary = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert summary["devices"]["processes"] == 2
    assert summary["devices"]["mesh"] == {"data": 2, "fsdp": 4}
    saved = tmp_path / "two" / "checkpoints" / "2" / "manifest"
    assert {file.name for file in saved.glob("process*")} == {"process_0.json", "process_1.json"}

    one_run(main(tmp_path / "two", 3), lean)  # goes on from step 2
    one_run(main(tmp_path / "one", 3), lean)
    two, one = history(tmp_path / "two"), history(tmp_path / "one")
    # The first life of the two ended, and was judged, at step 2.
    two = [row for row in two if row["step"] != 2 or "held_out/reward" not in row]
    assert [row["step"] for row in two] == [row["step"] for row in one] == [0, 1, 2, 3, 3]
    for ours, theirs in zip(two, one, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_a_run_whose_second_process_is_killed_ends_and_leaves_a_checkpoint(tmp_path, lean):
    more = ["--config.cpu_devices=4", f"--coordinator=localhost:{free_port()}", "--num_processes=2"]
    commands = [main(tmp_path, 10**6, *more, f"--process_id={i}") for i in (0, 1)]
    with started(commands, lean) as (first, second):
        deadline = time.monotonic() + 240
        while not (tmp_path / "checkpoints" / "2").exists() and time.monotonic() < deadline:
            assert first.poll() is None, first.communicate()[0]
            time.sleep(0.1)
        second.kill()
        before = time.monotonic()
        status, output = ends(first)
    assert time.monotonic() - before < 10
    assert status == 1
    assert "error: process 1 on" in output
    assert "has ended without saying why: killed" in output
    assert (tmp_path / "checkpoints" / "2").exists()


# --- launch scripts -------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["slurm.sbatch", "tpu_pod.sh"])
def test_launch_scripts_parse_and_tell_their_usage(script):
    subprocess.run(["bash", "-n", f"launch/{script}"], cwd=ROOT, check=True)
    done = subprocess.run(
        ["bash", f"launch/{script}", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("usage: ")
    assert done.stderr == ""
    none = subprocess.run(
        ["bash", f"launch/{script}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (none.returncode, none.stdout) == (2, "")
    assert none.stderr.startswith("usage: ")


def test_words_reach_every_machine_of_a_pod_as_they_were_given(tmp_path):
    path = program(tmp_path / "bin", "gcloud", '#!/usr/bin/env bash\nprintf "%s\\0" "$@"\n')
    words = ["--config=a b.py:tiny", "--workdir=/mnt/$HOME/'x'", "--config.name=a;b"]
    done = subprocess.run(
        ["bash", "launch/tpu_pod.sh", "my-slice", *words],
        cwd=ROOT,
        env=environment(PATH=path, ZONE="us-1"),
        capture_output=True,
        text=True,
        check=True,
    )
    *options, command, _ = done.stdout.split("\0")
    assert options[-3:] == ["my-slice", "--worker=all", "--zone=us-1"]
    there = command.removeprefix("--command=")
    assert shlex.split(there) == [
        "cd", "vapi_jax", "&&", "exec", ".venv/bin/python", "-m", "vapi_jax.main", *words,
    ]  # fmt: skip
