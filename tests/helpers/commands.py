"""Commands as a user runs them: in a process of their own, from the root of the repository."""

import functools
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from tests.helpers.paths import ROOT

PATIENCE = " ".join(
    f"--xla_cpu_collective_{name}timeout_seconds=900" for name in ("", "call_terminate_")
)
"""For XLA_FLAGS. Devices of a busy CPU wait long for each other; after 40 s XLA ends the process."""

LEAN, OPTIMISED = ({"JAX_DISABLE_MOST_OPTIMIZATIONS": flag} for flag in "10")
"""For an environment: compiles quickly; compiles as for users, as `tests.helpers.compilers.optimised`."""

QUICK = {"xla_cpu_parallel_codegen_split_count": 1}
"""Options of XLA: its older emitters, and one thread, compile what is small in half the time."""
if version("jax").startswith("0.10."):  # later ones have no older emitters
    QUICK["xla_cpu_use_fusion_emitters"] = False

LEAN_FLAGS = " ".join(f"--{name}={value}".lower() for name, value in QUICK.items())
"""For XLA_FLAGS, beside `LEAN`."""


def environment(**more):
    """This process's environment for a command, which sees one CPU device and compiles quickly."""
    more = {**LEAN, **more}
    flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in f]
    flags += [LEAN_FLAGS] if LEAN.items() <= more.items() else []
    found = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]  # compilers for targets
    ours = {"XLA_FLAGS": " ".join(flags), "PYTHONPATH": os.pathsep.join(found)}
    return {**os.environ, **ours, "JAX_PLATFORMS": "cpu", **more}


def python(*arguments, options=(), env=None, check=False, **more):
    """What `python OPTIONS ARGUMENTS` printed, and its status, which `check` wants to be 0."""
    done = subprocess.run(
        [sys.executable, *options, *map(str, arguments)],
        env=environment() if env is None else env,
        **{"cwd": ROOT, "capture_output": True, "text": True, "timeout": 300} | more,
    )
    assert not check or done.returncode == 0, done.stderr
    return done


@functools.cache
def _server():
    """The process that commands are forks of; it ends with this one, which closes its stdin."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.helpers.forked"],
        cwd=ROOT, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def _forked(name, *arguments, cwd=ROOT, timeout=300):
    server, arguments = _server(), [*map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        told = {stream: Path(folder) / stream for stream in ("stdout", "stderr")}
        for path in told.values():
            path.touch()
        asked = {
            "module": name, "arguments": arguments, "cwd": str(cwd), "timeout": timeout,
            "env": environment(), "stdin": os.devnull, **{k: str(path) for k, path in told.items()},
        }  # fmt: skip
        print(json.dumps(asked), file=server.stdin, flush=True)
        status = int(server.stdout.readline())
        return subprocess.CompletedProcess(
            [name, *arguments], status, *(path.read_text() for path in told.values())
        )


def module(name, *arguments, check=False, **more):
    """What `python -m vapi_jax.NAME ARGUMENTS` printed, and its status, which `check` wants to be 0.

    In a process of its own either way, and with imports of its own where anything is unusual.
    """
    if sys.platform == "linux" and more.keys() <= {"cwd", "timeout"}:
        done = _forked(f"vapi_jax.{name}", *arguments, **more)
        assert not check or done.returncode == 0, done.stderr
        return done
    return python("-m", f"vapi_jax.{name}", *arguments, check=check, **more)


def show_help(*words):
    """`python WORDS --help`: (what it printed, names of the modules that it imported)."""
    done = python(*words, "--help", options=("-X", "importtime"))
    lines = [line for line in done.stderr.splitlines() if "|" in line]
    return done.stdout, {line.split("|")[-1].strip() for line in lines}
