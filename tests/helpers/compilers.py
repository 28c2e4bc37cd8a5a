"""Compilers for devices that are not here: what tests do without them."""

import importlib.util
import os

import pytest

_PACKAGES = {"compile-cuda": "jax_cuda12_plugin", "compile-tpu": "libtpu"}


def need_compiler(extra):
    """Skips the test where an extra is not installed; `launch/test.sh --targets` brings them all."""
    if importlib.util.find_spec(_PACKAGES[extra]) is None:
        tell = pytest.fail if "VAPI_COMPILERS" in os.environ else pytest.skip
        tell(f"the extra {extra} is not installed: launch/test.sh --targets runs this test")
