"""How the cost of a step changes with the batch, the group and the microbatch, or with any option."""

from __future__ import annotations

import ast
import copy
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vapi_jax.bench import setup as setups
from vapi_jax.bench.devices import planned_memory
from vapi_jax.bench.flops import step_flops
from vapi_jax.bench.measure import WARM_UP, environment, say
from vapi_jax.bench.phases import POLICY_PHASES, PhaseTimer, spreads
from vapi_jax.bench.report import markdown, quantity, replace_block
from vapi_jax.common.progress import ProgressBar
from vapi_jax.methods.config import ConfigError, TrainConfig
from vapi_jax.methods.resolve import changed, resolve
from vapi_jax.parallel.sharding import shard_batch
from vapi_jax.parallel.targets import memory_of
from vapi_jax.training import train

AXES = ("batch", "group", "microbatch")
HEADERS = ("varied", "batch", "G", "microbatch", "model FLOP", "seconds", "images/s", "memory")


_FIXED = ("mesh", "cpu_devices", "data", "init", "checkpoint", "eval", "method")


def points(config: TrainConfig, devices: int) -> list[tuple[str, TrainConfig]]:
    """(what is varied, configuration): the recipe itself, and one change at a time."""
    batch, group = config.batch_size, config.options.group_size
    whole = dataclasses.replace(config, microbatch_size=0)

    def fits(images: int) -> bool:
        return images >= devices and images % devices == 0

    found = [("recipe", config)]
    found += [
        ("batch", dataclasses.replace(whole, batch_size=images))
        for images in (batch // 4, batch // 2, 2 * batch)
        if fits(images)
    ]
    for size in (2, 4, 8, 16):
        if size != group:
            found.append(("group", changed(config, group_size=size)))
    for images in (batch // 4, batch // 2, batch):
        given = config.microbatch_size or batch
        if fits(images) and batch % images == 0 and images != given:
            found.append(("microbatch", dataclasses.replace(config, microbatch_size=images)))
    return found


def variants(
    recipe: Mapping[str, Any], config: TrainConfig, options: Sequence[str]
) -> list[tuple[str, TrainConfig]]:
    """(what is varied, configuration): the recipe itself, and each value of each option alone.

    Args:
      recipe: as it was given, before its defaults and presets.
      config: the same, resolved.
      options: such as "policy.remat=none,full"; values are Python literals, or words.

    Raises:
      ConfigError: for an option without values, or one that does not exist or fit.
    """
    found = [("recipe", config)]
    for option in options:
        path, _, values = option.partition("=")
        if not values:
            raise ConfigError(f"--vary={option}: give values, as in --vary=policy.remat=none,full")
        *sections, name = path.removeprefix("config.").split(".")
        top = (*sections, name)[0]
        if top in _FIXED:
            raise ConfigError(f"--vary={option}: one benchmark has one {top}")
        for value in values.split(","):
            changed = copy.deepcopy(dict(recipe))
            place = changed
            for section in sections:
                place = place.setdefault(section, {})
            place[name] = _literal(value)
            resolved = resolve(changed)
            # What the setup has filled in (classes of the data, weights that are absent) stays so.
            policy = {**config.policy, **resolved.policy}
            kept = dataclasses.replace(resolved, init=config.init, policy=policy)
            found.append((f"{path}={value}", kept))
    return found


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _resized(setup: setups.Setup, config: TrainConfig, host: dict[str, Any]) -> setups.Setup:
    """The same weights under another configuration, with a batch of its size."""
    rows = np.arange(config.batch_size // jax.process_count()) % len(host["condition"])
    batch = {name: value[rows] for name, value in host.items()}
    method = dataclasses.replace(setup.method, config=config)
    shapes = train.abstract_state(method, setup.optimizer, config.seed).params
    if jax.tree.map(jnp.shape, shapes) != jax.tree.map(jnp.shape, setup.state.params):
        raise ConfigError("an option that changes the generator's size cannot be varied in one run")
    if method.frozen_shapes() != setup.method.frozen_shapes():
        raise ConfigError("an option that changes a frozen network cannot be varied in one run")
    return dataclasses.replace(setup, method=method, batch=shard_batch(batch, method.mesh))


@dataclasses.dataclass
class _Point:
    """One configuration's compiled steps, and what has been measured of them."""

    axis: str
    setup: setups.Setup
    steps: dict[str, Any]
    phases: PhaseTimer | None
    seconds: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    rounds: list[dict[str, float]] = dataclasses.field(default_factory=list)

    @property
    def planned_memory(self) -> int:
        """Bytes, of the largest of its steps."""
        return max(planned_memory(step) for step in self.steps.values())

    def run_steps(self, state: Any, timed: bool) -> Any:
        """Every step once; the state after them."""
        setup = self.setup
        for name, step in self.steps.items():
            (state, _), elapsed = setups.timed(step, state, setup.frozen, setup.batch)
            if timed:
                self.seconds.setdefault(name, []).append(elapsed)
        return state

    def run_phases(self, state: Any, timed: bool) -> None:
        """Every phase once, where they are timed."""
        if self.phases is not None:
            found = self.phases.once(state)
            if timed:
                self.rounds.append(found)

    def row(self) -> dict[str, Any]:
        config, ours = self.setup.method.config, setups.spread(self.seconds["ours"])
        row = {
            "varied": self.axis,
            "batch_size": config.batch_size,
            "group_size": config.options.group_size,
            "microbatch_size": config.microbatch_size or config.batch_size,
            "seconds_per_step": ours.median,
            "seconds_quartiles": [ours.low, ours.high],
            "images_per_second": config.batch_size / ours.median,
            "model_flops": step_flops(config, self.setup.method.policy).model,
            "planned_memory_bytes": planned_memory(self.steps["ours"]),
        }
        if "plain" in self.seconds:
            row["plain_seconds_per_step"] = setups.spread(self.seconds["plain"]).median
        if self.rounds:
            parts = spreads(self.rounds)
            row["policy_seconds"] = sum(parts[name].median for name in POLICY_PHASES)
        return row


def sweep(
    config: TrainConfig,
    mesh: Mesh,
    steps: int,
    plain: bool,
    recipe: Mapping[str, Any] | None = None,
    options: Sequence[str] = (),
) -> dict[str, Any]:
    """Times the recipe's step with one of batch, group and microbatch changed at a time.

    All are compiled first and then take turns, so that what else the machine does falls on all alike.
    With `options` these are varied instead, as in `variants`. What a device has no room for by the
    compiler's plan is not run.

    Returns:
      {"rows": [...], "no_room": [...], device, versions, notes}; a row has the sizes,
      `seconds_per_step`, its quartiles, `model_flops`, `planned_memory_bytes`; of the recipe and where
      the group varies also `policy_seconds`, of forward, sampling and backward alone; and
      `plain_seconds_per_step`. `no_room` has what was left out, as {varied, planned_memory_bytes}.

    Raises:
      ConfigError, WeightsError: as `setup.build`.
    """
    if not config.options.fused:
        raise ConfigError("config.options.fused=False: a sweep varies the fused step")
    variants(recipe or {}, config, options)  # a wrong one is told before weights are made
    say("weights and data")
    setup = setups.build(config, mesh)
    host = {name: np.asarray(value) for name, value in jax.device_get(setup.batch).items()}
    todo = (
        variants(recipe or {}, setup.method.config, options)
        if options
        else points(setup.method.config, mesh.size)
    )
    compiled: list[_Point] = []
    no_room: list[dict[str, Any]] = []
    room = memory_of(mesh.devices.flat[0])
    turns = WARM_UP + steps
    with ProgressBar(len(todo) * (1 + turns), f"{config.name} sweep") as progress:
        for axis, changed in todo:
            point = _compile(axis, _resized(setup, changed, host), plain)
            if room is None or point.planned_memory <= room:
                compiled.append(point)
            else:
                no_room.append({"varied": axis, "planned_memory_bytes": point.planned_memory})
            progress.update(len(compiled) + len(no_room) * (1 + turns))
        done, state = len(compiled) + len(no_room) * (1 + turns), setup.state
        for turn in range(-WARM_UP, steps):
            for point in compiled:
                state = point.run_steps(state, turn >= 0)
                done += 1
                progress.update(done)
            # Not after each one's steps: a phase would pay for the memory that a large step gave back.
            for point in compiled:
                point.run_phases(state, turn >= 0)
    rows = [point.row() for point in compiled]
    return {
        "name": config.name,
        **environment(mesh),
        "notes": setup.notes,
        "steps": steps,
        "rows": rows,
        "no_room": no_room,
    }


def _compile(axis: str, setup: setups.Setup, plain: bool) -> _Point:
    grouped = axis in ("recipe", "group")
    steps = {"ours": setups.compile_step(setup, True)[0]}
    if plain and grouped:
        steps["plain"] = setups.compile_step(setup, False)[0]
    return _Point(axis, setup, steps, PhaseTimer(setup) if grouped else None)


def table(found: dict[str, Any]) -> list[list[str]]:
    """The rows as text, under `HEADERS`."""
    return [
        [
            row["varied"],
            str(row["batch_size"]),
            str(row["group_size"]),
            str(row["microbatch_size"]),
            quantity(row["model_flops"], "FLOP"),
            f"{row['seconds_per_step']:.3f}",
            f"{row['images_per_second']:.1f}",
            quantity(row["planned_memory_bytes"], "B"),
        ]
        for row in found["rows"]
    ]


def group_series(rows: Sequence[dict[str, Any]]) -> dict[str, tuple[list[int], list[float]]]:
    """Group sizes and seconds of a step: whole, the generator's part, and the oracle's where it was timed."""
    along = sorted(
        (row for row in rows if row["varied"] in ("recipe", "group")), key=lambda r: r["group_size"]
    )
    names = {
        "this step": "seconds_per_step",
        "its generator alone": "policy_seconds",
        "plain step": "plain_seconds_per_step",
    }
    series = {}
    for label, key in names.items():
        timed = [row for row in along if key in row]
        if timed:
            series[label] = [row["group_size"] for row in timed], [row[key] for row in timed]
    return series


def write_docs(found: dict[str, Any], folder: Path) -> list[Path]:
    """Puts the table into FOLDER/performance.md, between its marks, and the plot beside it."""
    from vapi_jax.report import figures  # matplotlib: not while steps are timed

    folder.mkdir(parents=True, exist_ok=True)
    plot, page = folder / "performance.svg", folder / "performance.md"
    figure = figures.lines(
        group_series(found["rows"]),
        f"{found['name']}: seconds a step against group size",
        "samples of each image, G",
        "seconds a step",
    )
    plot.write_text(figures.svg(figure), encoding="utf-8")
    device, versions = found["device"], found["versions"]
    lead = (
        f"`configs/{found['name']}.py`, {device['count']} x {device['kind']}, {device['cores']} cores, "
        f"jax {versions['jax']}, median of {found['steps']} steps."
    )
    block = f"{lead}\n\n{markdown(table(found), HEADERS)}\n\n![Cost against G](performance.svg)"
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    page.write_text(replace_block(text, "sweep", block), encoding="utf-8")
    return [page, plot]
