"""One benchmark of a recipe: everything that is measured and counted, as one dictionary."""

from __future__ import annotations

import dataclasses
import os
import sys
from typing import Any

import jax
from jax.sharding import Mesh

from vapi_jax.bench import hlo
from vapi_jax.bench import setup as setups
from vapi_jax.bench.devices import PLANNED, peak, peak_memory, planned_memory
from vapi_jax.bench.flops import step_flops
from vapi_jax.bench.hlo_flops import matmul_flops
from vapi_jax.bench.kernels import top_kernels
from vapi_jax.bench.phases import PhaseTimer, spreads
from vapi_jax.bench.scaling import H100, count_parameters, predict
from vapi_jax.common.progress import ProgressBar
from vapi_jax.common.versions import versions
from vapi_jax.methods.config import TrainConfig
from vapi_jax.parallel.fsdp import AXIS

WARM_UP = 2


def say(text: str) -> None:
    """A line about what goes on, to standard error: standard output is for results."""
    print(text, file=sys.stderr, flush=True)


def environment(mesh: Mesh) -> dict[str, Any]:
    """Device and versions that figures belong to."""
    device = jax.devices()[0]
    return {
        "device": {
            "kind": device.device_kind,
            "platform": device.platform,
            "count": mesh.size,
            "mesh": dict(mesh.shape),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        },
        "versions": versions(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "compilation_cache": jax.config.values["jax_compilation_cache_dir"],
    }


def counted(setup: setups.Setup, compiled: Any) -> dict[str, Any]:
    """FLOPs and communication of a compiled step, over all devices unless said otherwise."""
    config, devices = setup.method.config, setup.method.mesh.size
    text = compiled.as_text()
    analytic, found = step_flops(config, setup.method.policy), matmul_flops(text)
    xla = (compiled.cost_analysis() or {}).get("flops")
    return {
        "model_flops": analytic.model,
        "model_flops_by_phase": {
            name: value for name, value in dataclasses.asdict(analytic).items() if value
        },
        "compiled_flops": found.total * devices,
        "compiled_flops_exact": found.exact,
        "compiled_flops_uncounted_calls": found.uncounted,
        "cost_analysis_flops": None if xla is None else xla * devices,
        "parameters": dataclasses.asdict(count_parameters(setup.state.params, setup.method.mesh)),
        "collectives_per_device": {
            kind: dataclasses.asdict(total)
            for kind, total in hlo.totals(hlo.collectives(text)).items()
        },
    }


def scaling(setup: setups.Setup) -> list[dict[str, Any]] | None:
    """Seconds of a step on more H100s by the model of `bench/scaling.py`.

    The recipe's batch on 1, 8 and 64 devices, and as many images for each device on 64 and 512 as on 8.
    None unless the mesh splits parameters over a node of 8, for which the model is made.
    """
    config, mesh = setup.method.config, setup.method.mesh
    if mesh.shape[AXIS] != H100.node or mesh.size != H100.node:
        return None
    batch = config.batch_size
    cases = [(1, batch), (8, batch), (64, batch), (64, 8 * batch), (512, 64 * batch)]
    parameters = count_parameters(setup.state.params, mesh)
    flops = step_flops(config, setup.method.policy).hardware / batch
    own = (config.microbatch_size or batch) // mesh.size
    dtype = setup.method.policy.compute_dtype
    return [
        dataclasses.asdict(found) | {"hidden": found.hidden, "exposed": found.exposed}
        for devices, images in cases
        if images % devices == 0
        for found in (predict(parameters, dtype, flops, images, devices, own),)
    ]


def _seconds(name: str, laps: setups.Laps) -> dict[str, Any]:
    wall = setups.spread(laps.wall)
    return {
        f"{name}_per_step": wall.median,
        f"{name}_quartiles": [wall.low, wall.high],
        f"{name}_of_processor_per_step": setups.spread(laps.processor).median,
    }


def compile_only(config: TrainConfig, mesh: Mesh) -> dict[str, Any]:
    """What the compiler says of a step of shapes alone; nothing is run and no weights exist."""
    setup = setups.abstract(config, mesh)
    say("compiling")
    compiled, seconds = setups.compile_step(setup, config.options.fused)
    return {
        "name": config.name,
        **environment(mesh),
        "notes": setup.notes,
        **counted(setup, compiled),
        "scaling": scaling(setup),
        "compile_seconds": seconds,
        "peak_memory_bytes": planned_memory(compiled),
        "peak_memory_source": PLANNED,
    }


def _two_steps(setup: setups.Setup, compiled: Any) -> Any:
    for _ in range(2):
        setup.state, metrics = compiled(setup.state, setup.frozen, setup.batch)
    return metrics


def measure(
    config: TrainConfig, mesh: Mesh, steps: int, plain: bool, kernels: int = 0
) -> dict[str, Any]:
    """Times the recipe's step, its phases and, in turns with it, the B·G oracle.

    Args:
      config: of method "vapi".
      mesh: devices.
      steps: timed steps of each kind.
      plain: also time the step with `vapi.fused` False.
      kernels: how many of the longest to list, from a profile of two more steps; 0 for no profile.

    Returns:
      What --json writes; see docs/performance.md for the keys.

    Raises:
      ConfigError, WeightsError: as `setup.build`.
    """
    say("weights and data")
    setup = setups.build(config, mesh)
    config, fused = setup.method.config, setup.method.config.options.fused
    say("compiling the step")
    compiled, compile_seconds = setups.compile_step(setup, fused)
    result: dict[str, Any] = {"name": config.name, **environment(mesh), "notes": setup.notes}
    result |= counted(setup, compiled) | {"compile_seconds": compile_seconds, "steps": steps}
    (setup.state, _), _ = setups.timed(compiled, setup.state, setup.frozen, setup.batch)
    memory, source = peak_memory(compiled)  # before anything else has used any
    timed = {"ours": compiled}
    if plain:
        say("compiling the plain step")
        timed["plain"], result["plain_compile_seconds"] = setups.compile_step(setup, False)
    rounds: list[dict[str, float]] = []
    timer = PhaseTimer(setup) if fused else None

    def phase_round(timed: bool) -> None:
        if timer is not None:
            found = timer.once(setup.state)
            if timed:
                rounds.append(found)

    with ProgressBar((steps + WARM_UP) * len(timed) + steps, config.name) as progress:
        done = 0

        def tick() -> None:
            nonlocal done
            done += 1
            progress.update(done)

        laps = setups.time_steps(setup, timed, steps, WARM_UP, tick, phase_round)
        result["input_wait_seconds"] = setups.input_wait(setup, compiled, steps, tick)
    phases = spreads(rounds) if rounds else {}
    result |= _seconds("seconds", laps["ours"]) | {
        "plain_seconds_per_step": None,
        "ratio": None,
        "peak_memory_bytes": memory,
        "peak_memory_source": source,
        "phases": {name: value.median for name, value in phases.items()},
        "phase_quartiles": {name: [value.low, value.high] for name, value in phases.items()},
        "phases_sum": sum(value.median for value in phases.values()) if phases else None,
    }
    if kernels:
        result["kernels"] = top_kernels(lambda: _two_steps(setup, compiled), kernels)
    if plain:
        result |= _seconds("plain_seconds", laps["plain"])
        pairs = zip(laps["plain"].wall, laps["ours"].wall, strict=True)
        ratios = setups.spread([other / own for other, own in pairs])
        result["ratio"] = result["plain_seconds_per_step"] / result["seconds_per_step"]
        result["ratio_quartiles"] = [ratios.low, ratios.high]
        result["ratio_of_processor_seconds"] = (
            result["plain_seconds_of_processor_per_step"] / result["seconds_of_processor_per_step"]
        )
    say("the device's peak")
    most, peak_source = peak(setup.method.policy.compute_dtype, mesh.size)
    achieved = result["model_flops"] / result["seconds_per_step"]
    return result | {
        "images_per_second": config.batch_size / result["seconds_per_step"],
        "achieved_flops_per_second": achieved,
        "peak_flops_per_second": most,
        "peak_source": peak_source,
        "peak_share": achieved / most,
    }
