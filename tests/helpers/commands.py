"""Commands as a user runs them: in a process of their own, from the root of the repository."""

import os
import subprocess
import sys

from tests.helpers.paths import ROOT

PATIENCE = " ".join(
    f"--xla_cpu_collective_{name}timeout_seconds=900" for name in ("", "call_terminate_")
)
"""For XLA_FLAGS. Devices of a busy CPU wait long for each other; after 40 s XLA ends the process."""


def environment(**more):
    """This process's environment for a command, which sees one CPU device."""
    names = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in f]
    flags = {"XLA_FLAGS": " ".join(flags)} if flags else {}
    found = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]  # compilers for targets
    path = {"PYTHONPATH": os.pathsep.join(found)}
    return {**names, **flags, **path, "JAX_PLATFORMS": "cpu", **more}


def python(*arguments, options=(), env=None, check=False, **more):
    """What `python OPTIONS ARGUMENTS` printed, and its status, which `check` wants to be 0."""
    done = subprocess.run(
        [sys.executable, *options, *map(str, arguments)],
        env=environment() if env is None else env,
        **{"cwd": ROOT, "capture_output": True, "text": True, "timeout": 300} | more,
    )
    assert not check or done.returncode == 0, done.stderr
    return done


def module(name, *arguments, **more):
    """What `python -m vapi_jax.NAME ARGUMENTS` printed, and its status."""
    return python("-m", f"vapi_jax.{name}", *arguments, **more)


def show_help(name):
    """`python -m vapi_jax.NAME --help`: (what it printed, names of the modules that it imported)."""
    done = module(name, "--help", options=("-X", "importtime"))
    lines = [line for line in done.stderr.splitlines() if "|" in line]
    return done.stdout, {line.split("|")[-1].strip() for line in lines}
