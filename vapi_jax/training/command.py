"""What `python -m vapi_jax.main` does once its flags are read: other processes, training, exit status."""

from pathlib import Path
from typing import Any

from vapi_jax.common.errors import exit_status
from vapi_jax.common.progress import announce
from vapi_jax.methods.config import TrainConfig
from vapi_jax.parallel import compiler, distributed
from vapi_jax.parallel.preemption import Stopped, StopRequest
from vapi_jax.training import plan, run
from vapi_jax.training.preflight import require


def check(recipe: Any, workdir: str | None, as_json: bool, resume_with_changes: bool) -> int:
    """Prints the plan and all that is in its way; the exit status."""
    return exit_status(lambda: plan.check(recipe, workdir, as_json, resume_with_changes))


def train(
    recipe: Any,
    workdir: Path,
    resume_with_changes: bool,
    profile: range | None = None,
    stopped_status: int = 0,
    **process: Any,
) -> int:
    """Finds the other processes of the run, if there are any, and trains; the exit status.

    Args:
      recipe: a ConfigDict.
      workdir: of the run, the same for all processes.
      resume_with_changes: go on though the configuration has changed.
      profile: steps to trace for TensorBoard.
      stopped_status: the exit status where a signal has stopped it before its end.
      process: which one this is, as far as flags say; see `distributed.as_one`.
    """
    compiler.reserve_memory()
    return distributed.as_one(
        lambda: execute(require(recipe), workdir, resume_with_changes, profile, stopped_status),
        preemption=True,
        **process,
    )


def execute(
    config: TrainConfig,
    workdir: Path,
    resume_with_changes: bool = False,
    profile: range | None = None,
    stopped_status: int = 0,
) -> int:
    """Runs to the end, or to a signal; says what went wrong, and returns the exit status."""
    stop = StopRequest()
    compiler.enable_compilation_cache(workdir / "compilation_cache")

    def work() -> None:
        with stop.listening(), distributed.telling():
            run.run(
                config,
                workdir,
                stop=stop,
                resume_with_changes=resume_with_changes,
                profile=profile,
            )

    try:
        return exit_status(work)
    except Stopped as stopped:
        announce(f"{stopped}. The same command goes on from there")
        return stopped_status
