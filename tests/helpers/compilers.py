"""Compilers for devices that are not here, and how much the compiler of tests does."""

import contextlib
import importlib.util
import os

import jax
import pytest

_PACKAGES = {"compile-cuda": "jax_cuda12_plugin", "compile-tpu": "libtpu"}


def need_compiler(extra):
    """Skips a test where an extra is not installed; `launch/test.sh --targets` brings them all."""
    if importlib.util.find_spec(_PACKAGES[extra]) is None:
        tell = pytest.fail if "VAPI_COMPILERS" in os.environ else pytest.skip
        tell(f"the extra {extra} is not installed: launch/test.sh --targets runs this test")


@contextlib.contextmanager
def optimised():
    """Compiles as for users, where memory, collectives, kernels or many numbers are asked for."""
    lean = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", lean)
