"""Train what a recipe describes: `python -m vapi_jax.main --config=RECIPE --workdir=DIR`.

Flags and devices only; the work begins in `vapi_jax.training.run`. Recipes are under configs/; a variant
follows a colon, and any option can be overridden:

  python -m vapi_jax.main --config=configs/c2i_demo.py:tiny --workdir=/tmp/tiny
  python -m vapi_jax.main --config=configs/c2i_xxl.py --workdir=runs/xxl --config.vapi.ce_weight=0.2

Everything a run makes is in its workdir: report.html (open it), summary.json, metrics.jsonl,
tensorboard/, weights/*.safetensors, checkpoints/ and compilation_cache/. The same command goes on
from the last checkpoint there; SIGTERM or Ctrl-C saves one first (twice: ends at once).
"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from absl import app, flags
from absl import logging as absl_logging

from vapi_jax.common import recipe_flags
from vapi_jax.common.errors import exit_status
from vapi_jax.common.paths import FOLDER
from vapi_jax.common.recipe_flags import CONFIG, parse_flags
from vapi_jax.parallel import compiler

if TYPE_CHECKING:
    from vapi_jax.methods.config import TrainConfig

flags.adopt_module_key_flags(recipe_flags)
_WORKDIR = flags.DEFINE(FOLDER, "workdir", None, "Where the run writes; made if absent")
_RESUME_WITH_CHANGES = flags.DEFINE_bool(
    "resume_with_changes", False, "Go on from a checkpoint though the configuration has changed"
)
_CHECK = flags.DEFINE_bool("check", False, "Print the plan and all that is in its way, and stop")
_JSON = flags.DEFINE_bool("json", False, "With --check: the plan as JSON")
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "Several processes: HOST:PORT at which process 0 listens"
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Several processes: how many")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Several processes: which one, from 0")
_MEETING = flags.DEFINE_float(
    "meeting_timeout", 300.0, "Several processes: seconds to wait for each other", lower_bound=1.0
)


def main(argv: list[str]) -> int:
    """Sets devices up before JAX starts, then hands over."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    if _JSON.value and not _CHECK.value:
        raise app.UsageError("--json is a form of --check")
    recipe, workdir = CONFIG.value, _WORKDIR.value
    if recipe is None or (workdir is None and not _CHECK.value):
        raise app.UsageError("--config and --workdir are needed; see --help")
    logging.getLogger("vapi_jax").setLevel(logging.INFO)
    # Orbax tells every rename, and the frames of a failed save that is reported in a sentence.
    absl_logging.set_verbosity(absl_logging.FATAL)
    compiler.apply_here()

    from vapi_jax.parallel import distributed
    from vapi_jax.parallel.cluster import find_place
    from vapi_jax.training import plan
    from vapi_jax.training.readiness import require

    if workdir is None or _CHECK.value:
        return exit_status(
            lambda: plan.check(recipe, workdir and str(workdir), as_json=_JSON.value)
        )

    def train() -> int:
        with distributed.telling():
            config = require(recipe)
        return execute(config, workdir, _RESUME_WITH_CHANGES.value)

    def meet() -> int:
        place = find_place(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
        return distributed.together(place, lambda: exit_status(train), _MEETING.value)

    return exit_status(meet)


def execute(config: "TrainConfig", workdir: Path, resume_with_changes: bool = False) -> int:
    """Runs to the end, or to a signal; says what went wrong, and returns the exit status."""
    from vapi_jax.parallel import distributed
    from vapi_jax.parallel.preemption import Stopped, StopRequest
    from vapi_jax.training import run

    stop = StopRequest()
    compiler.enable_compilation_cache(workdir / "compilation_cache")

    def train() -> None:
        with stop.listening(), distributed.telling():
            run.run(config, workdir, stop=stop, resume_with_changes=resume_with_changes)

    try:
        return exit_status(train)
    except Stopped as stopped:
        print(f"{stopped}. The same command goes on from there", flush=True)
        return 0


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
