"""Several processes: finding each other, ending together, and computing what one process computes."""

import contextlib
import hmac
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
import yaml

from tests.helpers.commands import PATIENCE
from tests.helpers.messages import assert_mentions
from tests.helpers.paths import ROOT
from vapi_jax.__main__ import COMMANDS
from vapi_jax.parallel import distributed, links
from vapi_jax.parallel.cluster import DistributedError, Process, find_process


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def environment(**more):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "JAX_", "XLA_"))}
    ours = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "XLA_FLAGS": PATIENCE}
    return {**kept, **ours, "PYTHONUNBUFFERED": "1", **more}


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
    "SLURM_STEP_NODELIST": "gpu[007-009]",
    "SLURM_STEP_TASKS_PER_NODE": "1(x3)",
    "SLURM_NTASKS": "3",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}
MPI = {
    "OMPI_MCA_orte_hnp_uri": "4096.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
SHARED = STEP | {"SLURM_STEP_TASKS_PER_NODE": "3", "SLURM_LOCALID": "2"}


@pytest.fixture
def environ(monkeypatch):
    """Sets variables in an environment that has none of a scheduler's."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "KUBERNETES_", "CUDA_VISIBLE")):
            monkeypatch.delenv(name)
    return lambda variables: [monkeypatch.setenv(*item) for item in variables.items()]


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        ({"JAX_NUM_PROCESSES": "1"}, None),
        (STEP, Process("gpu007:61441", 3, 2)),
        (STEP | {"JAX_COORDINATOR_ADDRESS": "other:99"}, Process("other:99", 3, 2)),
        (STEP | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
        # A batch script is told of the job's tasks, but is none of them.
        ({k: v for k, v in STEP.items() if k != "SLURM_STEP_NODELIST"}, None),
        (SHARED, Process("gpu007:61441", 3, 2, (2,))),
        (SHARED | {"CUDA_VISIBLE_DEVICES": "2"}, Process("gpu007:61441", 3, 2)),
        (SHARED | {"CUDA_VISIBLE_DEVICES": "2,3"}, Process("gpu007:61441", 3, 2, (2,))),
        (SHARED | {"JAX_LOCAL_DEVICE_IDS": "0,1"}, Process("gpu007:61441", 3, 2)),
        (MPI, Process("10.96.0.1:61441", 2, 1, (1,))),
        (
            {
                "JAX_COORDINATOR_ADDRESS": "[::1]:80",
                "JAX_NUM_PROCESSES": "8",
                "JAX_PROCESS_ID": "0",
            },
            Process("[::1]:80", 8, 0),
        ),
    ],
)
def test_a_process_finds_itself_in_the_environment(environ, variables, expected):
    environ(variables)
    assert find_process() == expected


def test_flags_go_before_the_environment(environ):
    environ(STEP)
    assert find_process("a:1", 5, 0) == Process("a:1", 5, 0)
    assert find_process(process_id=1) == Process("gpu007:61441", 3, 1)
    assert find_process(num_processes=1) is None
    assert find_process(method="deactivate") is None


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
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
        ((), STEP | {"SLURM_JOB_ID": "x"}, "ValueError.* --num_processes=1"),
    ],
)
def test_what_is_missing_or_impossible_is_named(environ, arguments, variables, message):
    environ(variables)
    with pytest.raises(DistributedError, match=message):
        find_process(*arguments)


@pytest.mark.parametrize(("method", "named"), [("slurm", "SLURM_JOB_ID"), ("lsf", "no lsf here")])
def test_a_way_to_find_out_that_does_not_work_is_refused(environ, method, named):
    environ({})
    with pytest.raises(DistributedError, match=named):
        find_process(method=method)


# --- coming together ------------------------------------------------------------------------------


def meet(processes, timeout=10.0, after_an_error=()):
    """What each of several processes, here threads, gets: links, port and address, or an error.

    `after_an_error` come when one of the others has got an error.
    """
    count, processes = len(processes), [*processes, *after_an_error]
    found = [None] * len(processes)

    def one(number, me):
        try:
            with links.joined(me, timeout) as joined:
                found[number] = joined
        except DistributedError as error:
            found[number] = str(error)

    threads = [threading.Thread(target=one, args=item) for item in enumerate(processes)]
    for number, thread in enumerate(threads):
        deadline = time.monotonic() + timeout
        while number >= count and not any(isinstance(said, str) for said in found):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        thread.start()
    for thread in threads:
        thread.join(30)
    for result in found:
        if isinstance(result, tuple):
            for link in result[0]:
                link.close()
    return found


def call(address, said):
    """Connects as soon as it can, says something, and returns the connection."""
    host, port = address.rsplit(":", 1)
    for _ in range(6000):
        with contextlib.suppress(OSError):
            caller = socket.create_connection((host, int(port)))
            caller.sendall(said)
            return caller
        time.sleep(0.01)
    raise TimeoutError


def claim(**said):
    return json.dumps({"process_id": 1, "num_processes": 3, "host": "x", "proof": "é"} | said)


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 10000, b"[" * 4095 + b"\n", b"[]\n", b"{}\n", b"",
        f"{claim()}\n".encode(), f"{claim(process_id='1')}\n".encode(), f"{claim(proof=[])}\n".encode(),
    ],
)  # fmt: skip
def test_strangers_are_closed_and_logged_and_hold_nobody_up(said, caplog):
    address = f"127.0.0.1:{free_port()}"
    found = {}
    gathering = threading.Thread(
        target=lambda: found.update(all=meet([Process(address, 3, i) for i in (0, 1)], 30.0))
    )
    gathering.start()
    strangers = [call(address, said) for _ in range(5)]
    start = time.monotonic()
    meeting = meet([Process(address, 3, 2)], 30.0)
    assert time.monotonic() - start < links._GREETING - 1.0
    gathering.join(10)
    assert sorted(link.process_id for link in found["all"][0][0]) == [1, 2]
    assert len({port for _, port, _ in [*found["all"], *meeting]}) == 1
    for stranger in strangers:
        stranger.settimeout(10)
        with contextlib.suppress(ConnectionResetError):
            while stranger.recv(4096):
                pass
        stranger.close()
    assert caplog.text.count("a connection from 127.0.0.1 was closed") >= 5


def test_who_does_not_come_is_named_to_all_who_came():
    address = f"127.0.0.1:{free_port()}"
    found = meet([Process(address, 4, 0), Process(address, 4, 2)], timeout=1.5)
    assert "2 of 4 processes did not come within 1.5 s: 1, 3." in found[0]
    assert found[0] in found[1]


def test_a_coordinator_out_of_reach_is_named():
    address = f"127.0.0.1:{free_port()}"
    (said,) = meet([Process(address, 2, 1)], timeout=1.0)
    assert (
        f"process 1 could not reach process 0 at {address} within 1 s (Connection refused)" in said
    )


def test_another_program_at_the_port_is_named():
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=lambda: server.accept()[0].close(), daemon=True).start()
        (said,) = meet([Process(f"127.0.0.1:{server.getsockname()[1]}", 2, 1)])
    assert "no run of vapi_jax" in said


def test_a_second_process_of_one_number_is_refused_and_the_run_goes_on(caplog):
    address = f"127.0.0.1:{free_port()}"
    zero, one, two = (Process(address, 3, i) for i in range(3))
    found = meet([zero, one, one], after_an_error=[two])
    (refused,) = [said for said in found if isinstance(said, str)]
    assert refused in found[1:3]
    assert "process 1 has come already" in refused
    assert "process 1 has come already" in caplog.text
    assert sorted(link.process_id for link in found[0][0]) == [1, 2]


@pytest.mark.parametrize("stranger", [(1, 3), (3, 3), (0, 2), (-1, 2)])
def test_a_process_of_a_run_of_another_size_is_refused_and_the_run_goes_on(stranger):
    address = f"127.0.0.1:{free_port()}"
    index, count = stranger
    found = {}
    first = threading.Thread(
        target=lambda: found.update(all=meet([Process(address, 2, 0)], 30.0)), daemon=True
    )
    first.start()
    caller = call(address, b"")
    nonce = json.loads(caller.makefile().readline())["nonce"]
    said = claim(process_id=index, num_processes=count, proof=links._proof(nonce, index))
    caller.sendall(f"{said}\n".encode())
    refused = json.loads(caller.makefile().readline())["refused"]
    caller.close()
    assert f"a run of {count} processes, process 0 in one of 2" in refused
    (mine,) = meet([Process(address, 2, 1)])
    first.join(10)
    assert mine[1] == found["all"][0][1]


def test_a_process_with_another_secret_is_refused(monkeypatch):
    address = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv(links.SECRET, "ours")
    found = {}
    first = threading.Thread(
        target=lambda: found.update(all=meet([Process(address, 2, 0)], 30.0)), daemon=True
    )
    first.start()
    caller = call(address, b"")
    nonce = json.loads(caller.makefile().readline())["nonce"]
    guess = hmac.new(b"theirs", f"{nonce} 1".encode(), "sha256").hexdigest()
    caller.sendall(f"{claim(num_processes=2, proof=guess)}\n".encode())
    assert links.SECRET in json.loads(caller.makefile().readline())["refused"]
    caller.close()
    (mine,) = meet([Process(address, 2, 1)])
    first.join(10)
    assert mine[1] == found["all"][0][1]


def test_a_port_in_use_is_named():
    with socket.create_server(("127.0.0.1", 0)) as server:
        (said,) = meet([Process(f"127.0.0.1:{server.getsockname()[1]}", 2, 0)])
    assert_mentions(said, "listen", "port")


def test_process_0_listens_where_the_others_call_and_nowhere_else():
    port = free_port()
    first = threading.Thread(target=meet, args=([Process(f"localhost:{port}", 2, 0)], 2.0))
    first.start()
    call(f"127.0.0.1:{port}", b"").close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port))
    first.join()


@pytest.mark.parametrize(
    ("coordinator", "expected"),
    [
        ("127.0.0.1:1", ["127.0.0.1"]),
        ("localhost:1", ["127.0.0.1", "::1"]),
        ("192.0.2.1:1", ["::", "0.0.0.0"]),  # an address in front of this machine, not one of it
        ("no-such-host.invalid:1", ["::", "0.0.0.0"]),
    ],
)
def test_the_address_to_listen_at(coordinator, expected, caplog):
    assert links._own_address(Process(coordinator, 2, 0)) in expected
    assert ("listening at all" in caplog.text) == (expected[0] == "::")


def test_nobody_else_gets_the_port_of_jax_before_jax_has_it():
    address = f"127.0.0.1:{free_port()}"
    other = threading.Thread(target=meet, args=([Process(address, 2, 1)],))
    other.start()
    with links.joined(Process(address, 2, 0), 10.0) as (_, port, bound):
        assert bound == "127.0.0.1"
        with pytest.raises(OSError, match="in use"), socket.create_server(("127.0.0.1", port)):
            pass
        with pytest.raises(ConnectionRefusedError):  # nobody listens there yet
            socket.create_connection(("127.0.0.1", port))
    other.join()
    with socket.create_server(("127.0.0.1", port)):
        pass


# --- one end for all ------------------------------------------------------------------------------

WORK = """
import sys, time
from vapi_jax.parallel import distributed
from vapi_jax.parallel.cluster import Process

number, count, address, ending = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]

def work():
    from jax.experimental import multihost_utils
    multihost_utils.sync_global_devices("all are here")
    print("at work", flush=True)
    if ending == "late" and number == 0:
        time.sleep(6)
    if ending in ("well", "late"):
        return 0
    if number == count - 1 and ending == "error":
        with distributed.telling():
            raise ValueError("the disk is full")
    if number == 0 and ending == "status":
        return 3
    time.sleep(100)  # as in a collective that nobody else enters
    return 0

if ending == "late":
    distributed.TIMEOUT = 2.0  # of JAX's barrier at the end
sys.exit(distributed.together(Process(address, count, number), work, 60.0))
"""


def work(index, count, address, ending):
    return [sys.executable, "-c", WORK, index, count, address, ending]


@contextlib.contextmanager
def at_work(count, ending):
    address = f"127.0.0.1:{free_port()}"
    with started(
        [work(i, count, address, ending) for i in range(count)], environment()
    ) as processes:
        for process in processes:
            for line in process.stdout:
                if "at work" in line:
                    break
        yield processes


def ends(process, within=distributed.PAUSE + distributed.UNWINDING + 5.0):
    output, _ = process.communicate(timeout=within)
    return process.returncode, output


@pytest.mark.parametrize("ending", ["well", "late"])
def test_processes_that_are_done_end_with_0_also_where_one_has_much_more_to_do(ending):
    with at_work(2, ending) as processes:
        assert [ends(process)[0] for process in processes] == [0, 0]


def test_neither_strangers_nor_a_second_process_of_one_number_end_a_run():
    address = f"127.0.0.1:{free_port()}"
    first, last = [work(i, 3, address, "well") for i in (0, 1, 1)], work(2, 3, address, "well")
    with started(first, environment()) as processes:
        strangers = [
            call(address, said) for said in (b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 9999, b"")
        ]
        deadline = (
            time.monotonic() + 90.0
        )  # the one that is turned away ends while process 2 is awaited
        while all(process.poll() is None for process in processes[1:]):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        with started([last], environment()) as more:
            found = [ends(process, within=90.0) for process in [*processes, *more]]
    assert [found[0][0], found[3][0]] == [0, 0]
    assert sorted([found[1][0], found[2][0]]) == [0, 1]
    (refused,) = [output for status, output in found if status == 1]
    assert "process 1 has come already" in refused
    assert "process 1 has come already" in found[0][1]
    assert found[0][1].count("a connection from 127.0.0.1 was closed") >= 3
    for stranger in strangers:
        stranger.close()


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
        "--config.policy.n_head=2", "--config.init.gpt=", "--config.checkpoint.every=1",
        "--config.rewards=mse", *more,
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
    output = one_run(["bash", "launch/slurm.sbatch", *flags], slurm)
    assert output.count("2 steps of") == 1  # one process of them tells
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
def test_two_processes_train_on_captions_as_one_does(tmp_path, lean):
    """A T5 in front of the generator: each process encodes the captions of its own rows."""
    env = lean | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
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
    assert status == 1, output
    assert "error: process 1 on" in output
    assert "has ended without saying why: killed" in output
    assert (tmp_path / "checkpoints" / "2").exists()


def test_chunks_are_dealt_out():
    assert distributed.deal(np.array([1, 3, 4]), 6) == [1, 3, 4]
    assert distributed.deal(np.array([], int), 6) == []


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


@pytest.mark.parametrize("command", [[], ["sample"]])
def test_words_reach_every_machine_of_a_pod_as_they_were_given(tmp_path, command):
    path = program(tmp_path / "bin", "gcloud", '#!/usr/bin/env bash\nprintf "%s\\0" "$@"\n')
    words = [*command, "--config=a b.py:tiny", "--workdir=/mnt/$HOME/'x'", "--config.name=a;b"]
    done = subprocess.run(
        ["bash", "launch/tpu_pod.sh", "my-slice", *words],
        cwd=ROOT,
        env=environment(PATH=path, ZONE="us-1"),
        capture_output=True,
        text=True,
        check=True,
    )
    *options, line, _ = done.stdout.split("\0")
    assert options[-3:] == ["my-slice", "--worker=all", "--zone=us-1"]
    there = line.removeprefix("--command=")
    assert shlex.split(there) == [
        "cd", "vapi_jax", "&&", "exec", ".venv/bin/python", "-m", "vapi_jax", *(command or ["main"]),
        *words[len(command):],
    ]  # fmt: skip


def test_slurm_starts_any_command(tmp_path):
    """The script alone: srun says what it was given."""
    path = program(tmp_path / "bin", "srun", '#!/usr/bin/env bash\necho "$@"\n')
    env = environment(PATH=path, PYTHON="python")
    for given, wanted in (("--a=b", "main --a=b"), ("sample --c", "sample --c")):
        told = one_run(["bash", "launch/slurm.sbatch", *given.split()], env)
        assert told.strip().endswith(f"python -m vapi_jax {wanted}")


def test_the_jobset_agrees_with_itself_and_with_the_package():
    """Its schema is JobSet's own, some 800 kB, and is not here."""
    jobset = yaml.safe_load((ROOT / "launch" / "jobset.yaml").read_text(encoding="utf-8"))
    (workers,) = jobset["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    environ = {entry["name"]: entry.get("value", "1") for entry in container["env"]}
    me = find_process(environ=environ, method="deactivate")
    assert me.num_processes == job["parallelism"] == job["completions"]
    name = jobset["metadata"]["name"]
    assert me.address[0] == f"{name}-{workers['name']}-0-0.{name}"
    module, command = container["command"][-1], container["args"][0]
    assert (module, job["completionMode"]) == ("vapi_jax", "Indexed")
    assert command in COMMANDS
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in job["template"]["spec"]["volumes"]}
