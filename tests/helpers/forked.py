"""`python -m tests.helpers.forked`: commands in forks of one process, which has imported what they need.

To import it anew would take each of them two seconds.
"""

import gc
import json
import os
import runpy
import signal
import sys
import warnings

import vapi_jax.bench.measure
import vapi_jax.generation.sampler
import vapi_jax.training.run  # noqa: F401
from tests.helpers.tracing import trace_quickly


def asked():
    """What a line on stdin asks for, in a process for it alone, whose status is told on stdout."""
    gc.freeze()  # what is imported is looked through for garbage by none of them, and so not copied
    for line in sys.stdin:
        with warnings.catch_warnings(action="ignore"):  # of threads: those of BLAS and JAX are idle
            child = os.fork()
        if child == 0:
            return json.loads(line)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    raise SystemExit


if __name__ == "__main__":
    trace_quickly()
    given = asked()
    os.environ.clear()
    os.environ.update(given["env"])
    os.chdir(given["cwd"])
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        os.dup2(os.open(given[name], os.O_RDWR), number)
    signal.alarm(given["timeout"])
    sys.path[0] = given["cwd"]
    sys.argv[1:] = given["arguments"]
    runpy.run_module(given["module"], run_name="__main__", alter_sys=True)
