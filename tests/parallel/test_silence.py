"""Processes that are not heard of any more: frozen, behind a broken network, told to go at a bad moment.

What was seen goes into docs/reliability.md.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.helpers.observations import observe
from tests.helpers.processes import WORK, free_port, main, started
from vapi_jax.parallel import distributed, links

pytestmark = pytest.mark.slow
SOON = """
from vapi_jax.parallel import distributed
distributed.BEAT, distributed.STILL, distributed.HEARTBEAT = 1.0, 4.0, 12
"""
BEAT, SILENCE = 2.0, 6
SHORT = f"""
from vapi_jax.parallel import distributed, links
distributed.BEAT, links.SILENCE = {BEAT}, {SILENCE}
"""


def at_work_then(commands, act):
    """Two processes that wait, something that happens to them, and [(seconds, status, output)]."""
    with started(commands) as processes:
        for process in processes:
            for line in process.stdout:
                if "at work" in line:
                    break
        begun, found = time.monotonic(), []
        for process in act(processes):
            output, _ = process.communicate(timeout=90)
            found.append((time.monotonic() - begun, process.returncode, output))
    return found


def test_a_frozen_process_is_said_to_be_and_ends_the_other_and_itself_when_it_wakes():
    address = f"127.0.0.1:{free_port()}"
    commands = [[sys.executable, "-c", SOON + WORK, i, 2, address, "never"] for i in (0, 1)]

    def freeze(processes):
        processes[1].send_signal(signal.SIGSTOP)
        yield processes[0]
        processes[1].send_signal(signal.SIGCONT)
        yield processes[1]

    (seconds, status, output), (_, woken, _) = at_work_then(commands, freeze)
    assert seconds < 12 + 10
    assert status != 0 and woken != 0
    assert "process 1 on" in output
    assert "no sign of life for 4 s" in output
    observe(
        "process: frozen (SIGSTOP)",
        "said after 80 s; JAX aborts the others after 100 s, and the frozen one ends with status 1 when "
        "it wakes",
    )


def ip(*words):
    return subprocess.run(["ip", *words], capture_output=True, check=False).returncode == 0


@pytest.fixture
def network():
    """Two network namespaces with a cable between them: their names, and what takes it away."""
    names = [f"vj{os.getpid() % 100_000}{side}" for side in "ab"]
    with contextlib.ExitStack() as made:
        for name in names:
            if not ip("netns", "add", name):
                pytest.skip("only root can make network namespaces")
            made.callback(ip, "netns", "del", name)
        a, b = names
        assert ip("link", "add", a, "netns", a, "type", "veth", "peer", "name", b, "netns", b)
        for number, name in enumerate(names, 1):
            assert ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", name)
            assert ip("-n", name, "link", "set", name, "up") and ip(
                "-n", name, "link", "set", "lo", "up"
            )
        yield names, lambda: ip("-n", b, "link", "set", b, "down")


def test_a_network_that_goes_away_ends_both_sides_with_a_sentence(network):
    names, cut = network
    commands = [
        # Gloo listens at the address of the machine's name.
        ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c",
         f'hostname 10.77.0.{i + 1}; exec "$@"', "sh",
         sys.executable, "-c", SHORT + WORK, i, 2, "10.77.0.1:12345", "never"]
        for i, name in enumerate(names)
    ]  # fmt: skip

    def disconnect(processes):
        assert cut()
        yield from processes

    found = at_work_then(commands, disconnect)
    for other, (seconds, status, output) in zip((1, 0), found, strict=True):
        assert seconds < BEAT + SILENCE + 10  # silence is counted from the next word that is sent
        assert status == 1
        assert f"error: process {other} on 10.77.0.{other + 1}" in output
        assert "network is gone" in output
    observe(
        "network: gone between two processes (network namespaces)",
        "both sides end with a sentence and status 1 within "
        f"{links.SILENCE + distributed.BEAT:g} s",
    )


@pytest.mark.parametrize("moment", ["before the first step", "in the final evaluation"])
def test_a_preemption_notice_outside_of_steps(moment, tmp_path):
    more = ["--config.cpu_devices=1", f"--coordinator=localhost:{free_port()}", "--num_processes=2"]
    more += ["--config.mesh.data=1", "--config.mesh.fsdp=2"]
    commands = [main(tmp_path / "run", 3, *more, f"--process_id={i}") for i in (0, 1)]
    early = moment == "before the first step"
    sign = tmp_path / "run" / ("config.json" if early else "weights/policy.safetensors")
    with started(commands) as processes:
        deadline = time.monotonic() + 200
        while not sign.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        processes[1].send_signal(signal.SIGTERM)
        found = [(process.communicate(timeout=200)[0], process.returncode) for process in processes]
    assert [status for _, status in found] == [0, 0], found
    assert ("a preemption notice: stopped at step 1 of 3" in found[0][0]) == early
    assert (tmp_path / "run" / "summary.json").exists() == (not early)
    observe(
        f"signal: SIGTERM to one of two processes, {moment}",
        "both stop after step 1, save together and exit with 0"
        if early
        else "it is without effect: the run ends well, with 0",
    )
