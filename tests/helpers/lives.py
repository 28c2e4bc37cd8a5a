"""Processes that run a tiny training and can be killed: made by fork, so that a life costs seconds.

A server process imports everything once, without starting JAX's devices; every life is a fork of it,
and all lives share a cache of compiled code. A life runs what `python -m vapi_jax.main` runs, after a
hook from this file has laid its mine.
"""

import contextlib
import dataclasses
import functools
import gc
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import tensorboardX  # noqa: F401  (imports torch where it is installed; once for all lives)
from absl import logging as absl_logging

from tests.helpers.commands import LEAN, LEAN_FLAGS, PATIENCE
from tests.helpers.paths import ROOT
from tests.helpers.tracing import trace_quickly
from vapi_jax.common import progress
from vapi_jax.evaluation import held_out
from vapi_jax.methods.config import TrainConfig
from vapi_jax.training import command, loop, run
from vapi_jax.training import logging as metrics
from vapi_jax.training.checkpoint import checkpointer

ENVIRONMENT = {
    "XLA_FLAGS": f"--xla_force_host_platform_device_count=2 {PATIENCE} {LEAN_FLAGS}",
    "JAX_PLATFORMS": "cpu",
    **LEAN,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "PYTHONPATH": str(ROOT),
}
KILLED = -signal.SIGKILL


@dataclasses.dataclass(frozen=True)
class Life:
    """What a life is to do.

    Attributes:
      config: of the run.
      workdir: of the run.
      log: a file that takes its output.
      cache: a folder of compiled code.
      hook: a name in `HOOKS`, and its arguments.
      pictures: False leaves out the evaluation after the training, which takes longest.
      cluster: (address, processes, index) of one of several processes.
      stopped_status: what it is to end with where a signal stops it.
    """

    config: TrainConfig
    workdir: Path
    log: Path
    cache: Path
    hook: tuple = ()
    pictures: bool = True
    cluster: tuple[str, int, int] | tuple[()] = ()
    stopped_status: int = 0


@contextlib.contextmanager
def _environment():
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ.update(ENVIRONMENT)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def begin(life):
    """Starts a life; a `multiprocessing.Process`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=_live, args=(life,))
    with _environment():  # for the server, which the first life starts
        process.start()
    return process


def live(life, timeout=240):
    """A life from birth to death; its exit status."""
    process = begin(life)
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(
            f"still alive after {timeout} s; see {life.log}:\n{life.log.read_text()}"
        )
    return process.exitcode


def _live(life):
    trace_quickly()
    gc.freeze()
    gc.set_threshold(100_000, 50, 50)
    with life.log.open("ab", buffering=0) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", closefd=False, buffering=1) for n in (1, 2))
    absl_logging.set_verbosity(absl_logging.FATAL)
    jax.config.update("jax_compilation_cache_dir", str(life.cache))
    if life.cluster:
        jax.distributed.initialize(*life.cluster)
    if not life.pictures:
        run._evaluate = lambda *_: ({}, [])
    if life.hook:
        name, *arguments = life.hook
        HOOKS[name](life, *arguments)
    status = command.execute(life.config, life.workdir, stopped_status=life.stopped_status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


# --- mines ----------------------------------------------------------------------------------------

HOOKS = {}


def _hook(function):
    HOOKS[function.__name__] = function
    return function


def _die():
    os.kill(os.getpid(), signal.SIGKILL)


def _at_event(wanted, said):
    """Dies where the interpreter is about to do something whose arguments say a text."""

    def look(event, arguments):
        if event == wanted and said in " ".join(map(str, arguments)):
            _die()

    sys.addaudithook(look)


def _before_call(owner, name, number=1, act=_die):
    """Acts before the n-th call of a function or method."""
    original, calls = getattr(owner, name), []

    @functools.wraps(original)
    def counting(*args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            act()
        return original(*args, **kwargs)

    setattr(owner, name, counting)


@_hook
def in_a_step(life):
    """The device is at work on the third step of this life."""
    make = loop.train.make_train_step

    def make_deadly(*args):
        step, calls = make(*args), []

        def deadly(*args):
            out = step(*args)
            calls.append(1)
            if len(calls) == 3:
                _die()
            return out

        return deadly

    loop.train.make_train_step = make_deadly


@_hook
def writing_a_manifest(life):
    _at_event("open", "process_0.json w ")


@_hook
def before_a_commit(life):
    _at_event("os.rename", ".orbax-checkpoint-tmp")


@_hook
def after_a_commit(life):
    """A step is complete, and the one that it replaces is about to go."""
    _at_event("shutil.rmtree", f"{life.workdir}/checkpoints/")


@_hook
def in_an_evaluation(life):
    _before_call(held_out.HeldOut, "__call__")


def _half(name):
    """The third write to a file stops in its middle."""
    original, calls = metrics.write_all, []

    def half(file, data, path):
        if name in str(path):
            calls.append(1)
            if len(calls) == 3:
                original(file, data[: len(data) // 2], path)
                _die()
        original(file, data, path)

    metrics.write_all = half


@_hook
def in_a_row(life):
    _half("metrics.jsonl")


@_hook
def in_an_event(life):
    _half("tfevents")


@_hook
def cutting_rows_back(life):
    _at_event("os.rename", "metrics.jsonl.partial")


@_hook
def writing_weights(life):
    _at_event("os.rename", ".safetensors.partial")


@_hook
def in_the_final_evaluation(life):
    _before_call(run, "_samples")


@_hook
def writing_the_summary(life):
    _at_event("os.rename", "summary.json.partial")


@_hook
def writing_the_report(life):
    from vapi_jax.report import page  # matplotlib, which other lives do without

    _before_call(page, "write_report")


@_hook
def telling_phases(life, path):
    """Writes down the phase it is in, for whoever kills it."""
    original = progress.Timer.phase
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)

    @contextlib.contextmanager
    def phase(self, name):
        with original(self, name):
            os.pwrite(file, name.ljust(20).encode(), 0)
            yield

    progress.Timer.phase = phase


@_hook
def announcing(life, path, owner, name, number=1):
    """Makes a file before the n-th call of a function, so that a signal can be timed."""
    owner = {"HeldOut": held_out.HeldOut, "_Trainer": loop._Trainer, "run": run, "loop": loop}[
        owner
    ]
    _before_call(owner, name, number, lambda: Path(path).touch())


@_hook
def clock_going_back(life):
    """An hour less at every look."""
    start = time.time()
    looks = iter(range(10**9))
    time.time = lambda: start - 3600.0 * next(looks)


@_hook
def slow_saving(life, path):
    """Makes a file when a save begins, which then takes a minute."""

    def dawdle():
        Path(path).touch()
        time.sleep(60)

    _before_call(loop._Trainer, "_save", 1, dawdle)


@_hook
def stopping_after(life, steps, name="SIGTERM"):
    """A signal to itself in the given step of this life."""
    _before_call(loop._Trainer, "_step", steps, lambda: os.kill(os.getpid(), signal.Signals[name]))


@_hook
def filling_the_disk(life, folder):
    """Takes away all that is left of a file system, in the third step of this life."""
    _before_call(loop._Trainer, "_step", 3, lambda: fill(Path(folder), 0))


def fill(folder, leave):
    """Takes away all but `leave` bytes of a file system."""
    with (folder / "ballast").open("wb") as file:
        free = os.statvfs(folder)
        file.write(bytes(max(0, free.f_bavail * free.f_frsize - leave)))


@_hook
def before_a_save(life, number):
    _before_call(loop._Trainer, "_save", number)


@_hook
def controls_alone(life, number):
    """Trains the run and its controls and ends well, before anything is drawn or compared."""

    def compare(judge, base, tuned, controls, known):
        for train in controls.values():
            train()
        os._exit(0)

    run._pictures, run.compare = (lambda *_: {}), compare
    before_a_save(life, number)


@_hook
def blind_to_free_space(life):
    """As where a quota and not the disk is used up."""
    checkpointer.shutil.disk_usage = lambda path: SimpleNamespace(free=1 << 60)
