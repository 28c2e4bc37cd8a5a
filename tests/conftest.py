"""Test setup: eight CPU devices, and the golden arrays of `--golden DIR`."""

import collections
import gc
import os
import re
import signal
import tempfile
from pathlib import Path

from tests.helpers.commands import PATIENCE

os.environ["XLA_FLAGS"] = " ".join((
    os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8", PATIENCE,
))  # fmt: skip
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest
from hypothesis import settings

from tests.helpers.compare import comparing
from tests.helpers.compilers import compile_quickly, need_compiler
from tests.helpers.golden import Golden
from tests.helpers.paths import GOLDEN
from tests.helpers.tracing import trace_quickly

# The same examples every time, however long they take.
settings.register_profile("tests", deadline=None, derandomize=True)
settings.load_profile("tests")

compile_quickly()
trace_quickly()


def pytest_configure(config):
    """One compilation cache for the session: its workers and the commands it starts share it.

    And Ctrl-C, which shells have background jobs ignore, is heard by the commands that tests start.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        config.compilation_cache = tempfile.TemporaryDirectory(prefix="vapi_jax_tests_")
        os.environ["JAX_COMPILATION_CACHE_DIR"] = config.compilation_cache.name
    # Programs of tests are small and many.
    least = os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", float(least))


def pytest_unconfigure(config):
    if hasattr(config, "compilation_cache"):
        config.compilation_cache.cleanup()


def pytest_collection_finish():
    """Tracing makes objects by the million, and garbage is looked for among all of them."""
    gc.freeze()
    gc.set_threshold(100_000, 50, 50)


def pytest_collection_modifyitems(config, items):
    """Marks what compares floats, for runs on other processors; files of slow tests come first.

    Processes that take one file after the other, so that none makes another's fixtures again, then
    end together.
    """
    lengths = collections.Counter()
    for item in items:
        name, *_ = re.split(r"\[|_\(|__", item.name)  # absl adds _(case), chex __with_jit
        if name in comparing(item.path):
            item.add_marker("floats")
        lengths[item.path] += 20 if item.get_closest_marker("slow") else 1
    items.sort(key=lambda item: -lengths[item.path])
    if cases := config.getoption("--cases"):
        ordered = items if cases == "last" else reversed(items)
        kept = set(
            {item.nodeid.split("[")[0]: item for item in ordered}.values()
        )  # the last of each
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = [item for item in items if item in kept]


def pytest_runtest_setup(item):
    for mark in item.iter_markers("targets"):
        need_compiler(*mark.args)


def pytest_addoption(parser):
    parser.addoption(
        "--golden",
        type=Path,
        default=GOLDEN,
        help="directory of golden arrays for the parity tests (default: tests/golden)",
    )
    parser.addoption(
        "--cases",
        choices=("first", "last"),
        help="run one case alone of every function that has several",
    )


@pytest.fixture(scope="session")
def golden(request) -> Golden:
    directory = request.config.getoption("--golden")
    if not directory.is_dir():
        raise pytest.UsageError(f"--golden {directory}: no such directory")
    return Golden(directory)


@pytest.fixture(scope="session", autouse=True)
def eight_devices():
    assert jax.device_count() == 8, "the tests want eight (virtual) devices"


@pytest.fixture(scope="module", autouse=True)
def compile_effort(request):
    """Compiling takes most of the tests' time, and unoptimised code of tiny models a third less.

    The parity tests measure the code that users run.
    """
    lean = "parity" not in request.path.parts
    jax.config.update("jax_disable_most_optimizations", lean)
