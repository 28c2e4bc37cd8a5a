"""Times a recipe's training step, whole and by phase, and counts what it computes and sends; or how
fast its generator draws images, or how fast evaluation judges them; or compiles it for devices that are
not here.

  python -m vapi_jax.bench --config=configs/bench_cpu.py --plain
  python -m vapi_jax.bench --config=configs/c2i_xxl.py --steps=10 --json=xxl.json
  python -m vapi_jax.bench --config=configs/bench_cpu.py --sweep --docs=docs
  python -m vapi_jax.bench --config=configs/bench_cpu.py --vary=policy.remat=full,dots --vary=decode_chunk=4
  python -m vapi_jax.bench --config=configs/c2i_xxl.py --compile_only --config.cpu_devices=8
  python -m vapi_jax.bench --mode=sample --config=configs/c2i_xxl.py --batch=64 --cfg=1.75
  python -m vapi_jax.bench --mode=evaluate --config=configs/c2i_demo.py --features=vgg
  python -m vapi_jax.bench --mode=targets --config=configs/c2i_xxl.py --target=h100:8 --docs=docs

The real task and step; weights and images are the recipe's where they can be had and random where not,
which changes no speed. Any option of the recipe can be overridden as for vapi_jax.main. What --json
holds is told in docs/performance.md, vapi_jax/bench/sampling.py and vapi_jax/bench/evaluation.py.
"""

import json
import math
from typing import Any

import jax
from absl import app, flags
from absl import logging as absl_logging

from vapi_jax.bench import batches, evaluation, measure, report, sampling, sweep, targets_report
from vapi_jax.bench.targets import PROGRAMS
from vapi_jax.common import recipe_flags
from vapi_jax.common.errors import ExpectedError, exit_status
from vapi_jax.common.paths import FOLDER, PATH
from vapi_jax.common.recipe_flags import CONFIG, parse_flags
from vapi_jax.common.tables import format_table
from vapi_jax.methods.config import ConfigError, TrainConfig
from vapi_jax.methods.resolve import resolve
from vapi_jax.parallel import compiler
from vapi_jax.parallel.targets import parse
from vapi_jax.training import run

flags.adopt_module_key_flags(recipe_flags)
_MODE = flags.DEFINE_enum(
    "mode",
    "step",
    ["step", "sample", "evaluate", "targets"],
    "What is timed: training, drawing or judging; targets: nothing, but all are compiled for --target",
)
_STEPS = flags.DEFINE_integer("steps", 10, "Timed steps or batches of each kind", lower_bound=1)
_PLAIN = flags.DEFINE_bool(
    "plain", False, "Also time the oracle of G sequences an image, taking turns with our step"
)
_JSON = flags.DEFINE(PATH, "json", None, "File that receives all figures")
_SWEEP = flags.DEFINE_bool(
    "sweep", False, "Vary batch, group and microbatch one at a time instead of phases"
)
_VARY = flags.DEFINE_multi_string(
    "vary", [], "OPTION=VALUE,VALUE: time these beside the recipe, one at a time, in one run"
)
_DOCS = flags.DEFINE(
    FOLDER,
    "docs",
    None,
    "With --sweep: folder whose performance.md and performance.svg are written; targets: targets.md",
)
_COMPILE_ONLY = flags.DEFINE_bool(
    "compile_only", False, "Compile shapes alone: FLOPs, memory and collectives, nothing is run"
)
_KERNELS = flags.DEFINE_integer(
    "kernels", 0, "Also profile two steps, and list so many of what took longest", lower_bound=0
)
_BATCH = flags.DEFINE_integer(
    "batch",
    None,
    "Images at once (sample: default the recipe's; evaluate: default 64)",
    lower_bound=1,
)
_CFG = flags.DEFINE_float("cfg", 1.0, "sample: guidance scale; 1 is none")
_FEATURES = flags.DEFINE_string(
    "features", "inception", "evaluate: inception, vgg, alex, or MODULE:ATTRIBUTE of one's own"
)
_INCEPTION = flags.DEFINE(
    PATH, "inception", None, "evaluate: file of weights; without one they are random"
)
_VECTORS = flags.DEFINE_integer(
    "vectors", 2048, "evaluate: vectors in each set that distances are taken of", lower_bound=4
)

_TARGETS = flags.DEFINE_list(
    "target", [], "targets: devices to compile for, such as h100:8,v5e:2x4"
)

_PROGRAMS = flags.DEFINE_list(
    "programs", list(PROGRAMS), f"targets: what is compiled, of {', '.join(PROGRAMS)}"
)
_FASTEST = flags.DEFINE_bool(
    "fastest",
    False,
    "targets: look for the fastest setting of the step where the recipe's fits, too",
)

_BELONGS = {
    "target": ("targets",),
    "programs": ("targets",),
    "fastest": ("targets",),
    "plain": ("step",),
    "sweep": ("step",),
    "vary": ("step",),
    "docs": ("step", "targets"),
    "kernels": ("step",),
    "compile_only": ("step",),
    "batch": ("sample", "evaluate"),
    "cfg": ("sample",),
    "features": ("evaluate",),
    "inception": ("evaluate",),
    "vectors": ("evaluate",),
}
"""Flag -> the modes that read it, for those which not all modes read."""


def _check_flags(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    if CONFIG.value is None:
        raise app.UsageError("--config is needed; see --help")
    for name, modes in _BELONGS.items():
        if flags.FLAGS[name].present and _MODE.value not in modes:
            raise app.UsageError(f"--{name} belongs to --mode={' or '.join(modes)}")
    if not math.isfinite(_CFG.value):
        raise app.UsageError(f"--cfg={_CFG.value} must be finite; 1 is no guidance")
    if _SWEEP.value and _VARY.value:
        raise app.UsageError("--sweep varies batch, group and microbatch: leave --vary out")
    if (_SWEEP.value or _VARY.value) and _COMPILE_ONLY.value:
        raise app.UsageError("--compile_only runs no steps to compare: leave it out")
    if _COMPILE_ONLY.value and _PLAIN.value:
        raise app.UsageError("--plain times steps and --compile_only runs none: choose one")
    if _JSON.value is not None and not _JSON.value.absolute().parent.is_dir():
        raise app.UsageError(f"--json={_JSON.value}: there is no folder {_JSON.value.parent}")
    if _MODE.value == "targets" and not _TARGETS.value:
        raise app.UsageError("--mode=targets wants --target, such as --target=h100:8")
    if unknown := set(_PROGRAMS.value) - set(PROGRAMS):
        raise app.UsageError(f"--programs={','.join(unknown)}: choose of {', '.join(PROGRAMS)}")
    if _DOCS.value is not None and not _SWEEP.value and _MODE.value == "step":
        raise app.UsageError("--docs writes the table of a sweep: add --sweep")


def main(argv: list[str]) -> int:
    """Measures and prints; an expected error is a sentence and exit status 1."""
    _check_flags(argv)
    absl_logging.set_verbosity(absl_logging.WARNING)  # JAX tells of every backend it lacks
    compiler.reserve_memory()
    return exit_status(_run)


def _run() -> None:
    config = resolve(CONFIG.value)
    if _MODE.value == "targets":
        _compile_for_targets(config)
        return
    if _PLAIN.value and not getattr(config.options, "fused", True):
        raise ConfigError("config.vapi.fused=False is the plain step already: leave --plain out")
    result = _measure(config, run.prepare_devices(config))
    _write_json(result)
    if wrong := batches.problem(result):
        raise ExpectedError(wrong)


def _write_json(result: Any) -> None:
    if _JSON.value is not None:
        text = json.dumps(result, indent=2, allow_nan=False, default=str)
        _JSON.value.write_text(f"{text}\n", encoding="utf-8")


def _compile_for_targets(config: TrainConfig) -> None:
    """What --mode=targets does: one target after the other, the document written after each."""
    jax.config.update("jax_platforms", "cpu")
    verdicts = []
    for target in [parse(name) for name in _TARGETS.value]:
        verdicts.append(targets_report.judge(config, target, _PROGRAMS.value, _FASTEST.value))
        print(targets_report.render(verdicts[-1]), flush=True)
        if _DOCS.value is not None:
            targets_report.write_docs(verdicts, config, _DOCS.value / "targets.md")
    _write_json([targets_report.to_json(verdict) for verdict in verdicts])


def _measure_batches(config: Any, mesh: Any) -> dict[str, Any]:
    """What --mode=sample or --mode=evaluate measures."""
    with batches.fitting():
        if _MODE.value == "sample":
            result = sampling.measure(config, mesh, _STEPS.value, _BATCH.value, _CFG.value)
            print(sampling.text_report(result))
        else:
            chosen = _FEATURES.value, _BATCH.value, _INCEPTION.value, _VECTORS.value
            result = evaluation.measure(config, mesh, _STEPS.value, *chosen)
            print(evaluation.text_report(result))
    return result


def _measure(config: Any, mesh: Any) -> dict[str, Any]:
    if _MODE.value != "step":
        return _measure_batches(config, mesh)
    if _SWEEP.value or _VARY.value:
        recipe = CONFIG.value.to_dict()
        result = sweep.sweep(config, mesh, _STEPS.value, _PLAIN.value, recipe, _VARY.value)
        print(format_table(sweep.table(result), sweep.HEADERS))
        if _DOCS.value is not None:
            for path in sweep.write_docs(result, _DOCS.value):
                print(f"wrote {path}")
        return result
    if _COMPILE_ONLY.value:
        result = measure.compile_only(config, mesh)
    else:
        result = measure.measure(config, mesh, _STEPS.value, _PLAIN.value, _KERNELS.value)
    print(report.text_report(result))
    return result


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
