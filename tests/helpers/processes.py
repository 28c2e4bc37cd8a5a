"""Processes of one run: started, spoken to, ended."""

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
import time

from tests.helpers.commands import LEAN, LEAN_FLAGS, PATIENCE
from tests.helpers.paths import ROOT
from tests.helpers.tiny import SIDE, TOKENIZER, tokenizer_file
from vapi_jax.parallel import distributed

KEPT = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")


WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % 10
_PORTS = itertools.cycle(range(21_000 + 1000 * WORKER, 22_000 + 1000 * WORKER))


def free_port():
    """One that neither another worker's tests nor connections, which have ports above these, take."""
    for port in _PORTS:
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError


def environment(**more):
    """One that says nothing of a cluster, and has the tests' cache of compiled code."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM_", "JAX_", "XLA_")) or name in KEPT
    }
    flags = f"{PATIENCE} {LEAN_FLAGS}"
    ours = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags, **LEAN}
    return {**kept, **ours, "PYTHONUNBUFFERED": "1", **more}


@contextlib.contextmanager
def started(commands, env=None, cwd=ROOT):
    """Processes with their output in `.log`, and none of them or theirs afterwards."""
    processes = []
    try:
        for command in commands:
            process = subprocess.Popen(
                list(map(str, command)),
                cwd=cwd,
                env=env or environment(),
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


@contextlib.contextmanager
def at_work(count, ending):
    address = f"127.0.0.1:{free_port()}"
    with started([work(i, count, address, ending) for i in range(count)]) as processes:
        for process in processes:
            for line in process.stdout:
                if "at work" in line:
                    break
        yield processes


def ends(process, within=distributed.PAUSE + distributed.UNWINDING + 5.0):
    output, _ = process.communicate(timeout=within)
    return process.returncode, output


def main(workdir, steps, *more):
    """A VA-π run of a few seconds over eight devices."""
    return [
        sys.executable, "-m", "vapi_jax.main", "--config=configs/bench_cpu.py:tiny",
        f"--workdir={workdir}", f"--config.steps={steps}", f"--config.data.image_size={SIDE}",
        f"--config.init.vq={tokenizer_file()}",
        *(f"--config.tokenizer.{name}={value}" for name, value in TOKENIZER.items()),
        "--config.vapi.group_size=2", "--config.eval.every=100", "--config.eval.grid_classes=1",
        "--config.eval.grid_per_class=1", "--config.policy.n_layer=1", "--config.policy.dim=32",
        "--config.policy.n_head=2", "--config.init.gpt=", "--config.checkpoint.every=1",
        "--config.rewards=mse", *more,
    ]  # fmt: skip


def program(folder, name, text):
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(text)
    path.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def one_run(command, env=None, timeout=300):
    with started([command], env) as (process,):
        output, _ = process.communicate(timeout=timeout)
    assert process.returncode == 0, output
    return output
