"""Train what a recipe describes: `python -m vapi_jax.main --config=RECIPE --workdir=DIR`.

Flags only; the work begins in `vapi_jax.training.command`. A recipe is a file, or the name of
one that ships (--config lists them); a variant follows a colon, and any option can be overridden:

  python -m vapi_jax.main --config=c2i_demo:tiny --workdir=/tmp/tiny
  python -m vapi_jax.main --config=configs/c2i_xxl.py --workdir=runs/xxl --config.vapi.ce_weight=0.2

Everything a run makes is in its workdir: report.html (open it), summary.json, metrics.jsonl,
tensorboard/, weights/*.safetensors, checkpoints/ and compilation_cache/. The same command goes on
from the last checkpoint there; SIGTERM or Ctrl-C saves one first (twice: ends at once).
"""

import logging

from absl import app, flags
from absl import logging as absl_logging

from vapi_jax.common import process_flags as several
from vapi_jax.common import recipe_flags
from vapi_jax.common.paths import FOLDER
from vapi_jax.common.process_flags import process_flags
from vapi_jax.common.ranges import STEPS
from vapi_jax.common.recipe_flags import CONFIG, parse_flags

flags.adopt_module_key_flags(recipe_flags)
flags.adopt_module_key_flags(several)
_WORKDIR = flags.DEFINE(FOLDER, "workdir", None, "Where the run writes; made if absent")
_RESUME_WITH_CHANGES = flags.DEFINE_bool(
    "resume_with_changes", False, "Go on from a checkpoint though the configuration has changed"
)
_CHECK = flags.DEFINE_bool("check", False, "Print the plan and all that is in its way, and stop")
_TARGET = flags.DEFINE_string(
    "target",
    None,
    "With --check: compile for devices that need not be here, such as h100:8 or v5e:2x4, and tell "
    "memory, FLOPs, traffic and kernels instead of the plan (docs/targets.md)",
)
_JSON = flags.DEFINE_bool("json", False, "With --check: the plan as JSON")
_STOPPED_STATUS = flags.DEFINE_integer(
    "stopped_status",
    0,
    "Exit status after a signal has stopped the run before its end; another than 0, such as 75, where "
    "a cluster takes 0 for done",
    lower_bound=0,
    upper_bound=255,
)
_PROFILE = flags.DEFINE(
    STEPS,
    "profile",
    None,
    "START:STOP: trace these steps, STOP left out, for TensorBoard's profiler",
)


def main(argv: list[str]) -> int:
    """Reads the flags and hands over."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    if _JSON.value and not _CHECK.value:
        raise app.UsageError("--json is a form of --check")
    if _TARGET.value is not None and not _CHECK.value:
        raise app.UsageError("--target is a form of --check")
    recipe, workdir = CONFIG.value, _WORKDIR.value
    if recipe is None or (workdir is None and not _CHECK.value):
        raise app.UsageError("--config and --workdir are needed; see --help")
    logging.getLogger("vapi_jax").setLevel(logging.INFO)
    # Orbax tells every rename, and the frames of a failed save that is reported in a sentence.
    absl_logging.set_verbosity(absl_logging.FATAL)
    # JAX and all rooms behind it take about two seconds to import, which --help does not have.
    if _TARGET.value is not None:
        from vapi_jax.bench import targets_report

        return targets_report.check(recipe, _TARGET.value, _JSON.value)
    from vapi_jax.training import command

    if workdir is None or _CHECK.value:
        changes = _RESUME_WITH_CHANGES.value
        return command.check(recipe, workdir and str(workdir), _JSON.value, changes)
    return command.train(
        recipe,
        workdir,
        _RESUME_WITH_CHANGES.value,
        profile=_PROFILE.value,
        stopped_status=_STOPPED_STATUS.value,
        **process_flags(),
    )


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
