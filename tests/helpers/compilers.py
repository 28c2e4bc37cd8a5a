"""Compilers for devices that are not here, and how much the compiler of tests does."""

import contextlib
import functools
import importlib.util
import os

import jax
import pytest
from jax._src import compiler  # nothing public has options for every program

from tests.helpers.commands import QUICK

_PACKAGES = {"compile-cuda": "jax_cuda12_plugin", "compile-tpu": "libtpu"}


def need_compiler(extra):
    """Skips a test where an extra is not installed; `launch/test.sh --targets` brings them all."""
    if importlib.util.find_spec(_PACKAGES[extra]) is None:
        tell = pytest.fail if "VAPI_COMPILERS" in os.environ else pytest.skip
        tell(f"the extra {extra} is not installed: launch/test.sh --targets runs this test")


def compile_quickly():
    """In this process, CPU programs that are not optimised are compiled with the options QUICK."""
    get = compiler.get_compile_options

    @functools.wraps(get)
    def get_quick(*arguments, backend=None, **more):
        found = get(*arguments, backend=backend, **more)
        on_cpu = backend is not None and backend.platform == "cpu"
        if on_cpu and jax.config.values["jax_disable_most_optimizations"]:
            found.env_option_overrides = [*found.env_option_overrides, *QUICK.items()]
        return found

    compiler.get_compile_options = get_quick


@contextlib.contextmanager
def optimised():
    """Compiles as for users, where memory, kernels or many numbers are asked for.

    What devices send each other is settled before code is generated, and so the same either way.
    """
    lean = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", lean)
