"""What a configuration will do, told before it is done: `python -m vapi_jax.main --config=... --check`.

Sizes come from shapes, so nothing is allocated, and nothing is written.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from vapi_jax.common.errors import exit_status
from vapi_jax.common.tables import format_table
from vapi_jax.methods import Method, make_method
from vapi_jax.methods.classes import labels_option, with_classes
from vapi_jax.methods.config import TrainConfig, to_dict
from vapi_jax.methods.resolve import examine, raise_all
from vapi_jax.parallel.sharding import make_mesh
from vapi_jax.training import memory, train
from vapi_jax.training.preflight import (
    LOOKED_AT,
    SCRATCH,
    DataFound,
    WeightsFound,
    look_at_conditions,
    look_at_data,
    look_at_memory,
    look_at_weights,
    look_at_workdir,
    notes_on_weights,
    open_mesh,
)
from vapi_jax.weights.names import WeightsError

_FILES = (
    "report.html, summary.json, metrics.jsonl, config.json, classes.txt, parameters.txt, *.png, "
    "tensorboard/"
)
_SHOWN = 6  # classes and their labels


@dataclasses.dataclass(frozen=True)
class Network:
    """One network of a run."""

    name: str
    parameters: int
    trained: bool
    weights: WeightsFound


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run before it is run.

    Attributes:
      config: the resolved options.
      title: of the method.
      mesh: axis -> devices; None where it does not fit the devices.
      device, processes: what it would run on, here.
      data: what is there to train on.
      networks: all that it loads or makes.
      trained_parts: what of a published model is trained, and what is not; "" where that needs no saying.
      memory: parts of a device's memory in a training step; empty without a mesh.
      counts: steps, images and so on, by name.
      saved: steps of the checkpoints, and those that stay.
      checkpoint_bytes: of each.
      weight_bytes: file in WORKDIR/weights -> its size.
      problems: all that is in the way of running it here.
    """

    config: TrainConfig
    title: str
    mesh: dict[str, int] | None
    device: str
    processes: int
    data: DataFound
    networks: list[Network]
    trained_parts: str
    memory: list[memory.Part]
    counts: dict[str, int]
    saved: list[int]
    kept: list[int]
    controls: int
    checkpoint_bytes: int
    weight_bytes: dict[str, int]
    problems: list[str]


def check(
    raw: Any,
    workdir: str | None = None,
    as_json: bool = False,
    resume_with_changes: bool = False,
) -> int:
    """Prints the plan of a recipe, and on standard error all that is in its way.

    Args:
      raw: the recipe.
      workdir: of the run, where it is decided.
      as_json: print JSON instead of text.
      resume_with_changes: what of the configuration differs from the workdir's checkpoints is fine.

    Returns:
      The exit status: 0 where it can run here, 1 where not. Of options that are wrong in themselves no
      plan is made, nor where a reward model's files, which tell its sizes, cannot be read.
    """
    config, errors = examine(raw)
    broken = len(errors)
    mesh = open_mesh(config, errors)
    config = with_classes(config, errors)
    data = look_at_data(config, errors, images=LOOKED_AT)
    weights = look_at_weights(config, mesh, errors, thorough=True)
    look_at_conditions(config, mesh, errors)
    data.notes += [*notes_on_weights(config), *look_at_memory(config, mesh, errors)]
    if workdir is not None and not broken:
        look_at_workdir(config, Path(workdir), errors, resume_with_changes, mesh)
    if not broken:
        try:
            plan = make_plan(config, mesh, data, weights, list(errors))
        except WeightsError:
            if not errors:
                raise
        else:
            print(json.dumps(_to_json(plan), indent=2) if as_json else render(plan, workdir))
    return exit_status(lambda: raise_all(errors))


def make_plan(
    config: TrainConfig,
    mesh: Mesh | None,
    data: DataFound,
    weights: dict[str, WeightsFound],
    problems: list[str],
) -> Plan:
    """The plan of a configuration whose options are possible in themselves."""
    alone = make_mesh(1, 1, jax.devices()[:1])
    method = make_method(config, mesh or alone)
    state = train.abstract_state(
        method, train.make_optimizer(config.optimizer, config.steps), config.seed
    )
    frozen = method.frozen_shapes()
    trained = method.weights_of(state.params, state.extra)
    networks = [
        Network(name, _count(tree), True, weights.get(name, SCRATCH))
        for name, tree in trained.items()
    ]
    networks += [
        Network(found.name, _count(found.shapes()), False, weights.get(found.name, SCRATCH))
        for found in method.networks()
        if found.name not in trained
    ]
    saved = checkpoint_steps(config)
    whole = (state.params, state.opt_state, state.extra, state.rng)
    return Plan(
        config=config,
        title=method.title,
        mesh=None if mesh is None else dict(mesh.shape),
        device=jax.devices()[0].device_kind,
        processes=jax.process_count(),
        data=data,
        networks=networks,
        trained_parts=method.trained_parts,
        memory=[] if mesh is None else memory.estimate(method, state, frozen),
        counts=_counts(method, data),
        saved=saved,
        kept=kept_steps(config, saved),
        controls=len(method.controls()) if config.eval.compare and config.eval.controls else 0,
        checkpoint_bytes=memory.tree_bytes(whole),
        weight_bytes={f"{name}.safetensors": memory.tree_bytes(trained[name]) for name in trained},
        problems=problems,
    )


def _count(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def checkpoint_steps(config: TrainConfig) -> list[int]:
    """Steps after which the state is saved: every so often, and the last."""
    every = config.checkpoint.every
    return sorted({config.steps, *(range(every, config.steps + 1, every) if every else ())})


def kept_steps(config: TrainConfig, saved: list[int]) -> list[int]:
    """Those of them that are still there at the end."""
    policy = config.checkpoint
    stay = {step for step in saved if policy.keep_every and step % policy.keep_every == 0}
    return sorted(stay | set(saved[-policy.keep_last :]))


def _counts(method: Method, data: DataFound) -> dict[str, int]:
    config = method.config
    micro = config.microbatch_size or config.batch_size
    counts = {
        "steps": config.steps,
        "images": config.steps * config.batch_size,
        "microbatches": config.batch_size // micro,
        "evaluations": _times(config.eval.every, config.steps),
    }
    if method.sampled() is not None and config.eval.sampled_every:
        counts["sampled"] = _times(config.eval.sampled_every, config.steps)
    if method.samples_per_image:
        counts["samples_per_image"] = method.samples_per_image
        counts["samples"] = counts["images"] * method.samples_per_image
    if "train" in data.images:
        counts["images_of_an_epoch"] = data.images["train"]
    return counts


def _times(every: int, steps: int) -> int:
    """Of what is done at step 0, every so many steps, and at the last."""
    return 1 + len({steps, *range(every, steps + 1, every)})


# --- words ----------------------------------------------------------------------------------------


def size(count: int) -> str:
    """1536 -> '1.5 KiB'."""
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:,.1f} GiB"


def render(plan: Plan, workdir: str | None = None) -> str:
    """The plan as text for a terminal."""
    config = plan.config
    title = f'{config.name}: {plan.title}, preset "{config.preset}"'
    parts = [title, "\n".join(f"{name:<12}{text}" for name, text in _facts(plan, workdir))]
    rows = [
        [
            f"{n.name}, {'trained' if n.trained else 'frozen'}, {_weights(n.weights)}",
            f"{n.parameters:,}",
        ]
        for n in plan.networks
    ]
    parts.append(format_table(rows, ["network", "parameters"]))
    if plan.memory:
        rows = [[f"{part.name}: {part.what}", size(part.bytes)] for part in plan.memory]
        rows.append([f"in all, about ({_LEFT_OUT})", size(sum(p.bytes for p in plan.memory))])
        parts.append(format_table(rows, ["memory of a device in a step", "estimate"]))
    if plan.data.notes:
        parts.append("\n".join(f"note: {note}" for note in plan.data.notes))
    return "\n\n".join(parts)


_LEFT_OUT = "not counted: communication, recomputation, the compiler's own room"


def _weights(found: WeightsFound) -> str:
    return f"from {found.origin} ({found.state})" if found.state else found.origin


def _facts(plan: Plan, workdir: str | None) -> list[tuple[str, str]]:
    config, counts = plan.config, plan.counts
    micro = config.microbatch_size or config.batch_size
    facts = [("devices", _devices(plan)), ("data", _data(plan))]
    if labels_option(config) and plan.data.labels:
        facts.append(("classes", _classes(plan)))
    step = f"{config.batch_size} images"
    if counts["microbatches"] > 1:
        step += f" in {counts['microbatches']} microbatches of {micro}"
    if "samples_per_image" in counts:
        step += f", {counts['samples_per_image']} samples of each"
    run = f"{config.steps:,} steps: {counts['images']:,} images"
    if "images_of_an_epoch" in counts:
        run += f" ({counts['images'] / counts['images_of_an_epoch']:.3g} epochs)"
    if "samples" in counts:
        run += f", {counts['samples']:,} samples decoded and rewarded"
    if plan.trained_parts:
        facts.append(("trained", plan.trained_parts))
    facts += [("step", step), ("run", run), ("evaluation", _evaluation(config, counts))]
    stay = len(plan.kept) * plan.checkpoint_bytes
    kept = f"{len(plan.saved)} of {size(plan.checkpoint_bytes)} each, {len(plan.kept)} stay ({size(stay)})"
    if plan.controls:
        all_of_them = size(stay * (1 + plan.controls))
        kept += f", and as many of each of {plan.controls} controls ({all_of_them} in all)"
    facts.append(("checkpoints", kept))
    where = workdir or "WORKDIR"
    weights = ", ".join(f"{name} ({size(count)})" for name, count in plan.weight_bytes.items())
    facts.append(("outputs", f"{where}: {_FILES}"))
    facts.append(("", f"{where}/weights: {weights}"))
    return facts


def _devices(plan: Plan) -> str:
    if plan.mesh is None:
        return f"{jax.device_count()} x {plan.device}; the mesh does not fit them"
    axes = " x ".join(f"{name} {count}" for name, count in plan.mesh.items())
    return f"mesh {axes} of {plan.device} in {plan.processes} process(es)"


def _data(plan: Plan) -> str:
    data, found = plan.config.data, plan.data
    own = data.name == "tfds" or ":" in data.name  # others have no data sets by name
    text = " ".join(filter(None, (data.name, data.dataset if own else "", data.path)))
    text += f" at {data.image_size} px"
    what = f"{found.classes:,} classes" if found.classes else "captions"
    if found.classes is None:
        return f"{text}; not found"
    images = ", ".join(f"{split} {count:,}" for split, count in found.images.items())
    return f"{text}; {what}; images: {images or 'not found'}"


def _classes(plan: Plan) -> str:
    config, found = plan.config, plan.data.labels
    option = labels_option(config)
    names = ", ".join(f"{name} = {label}" for name, label in list(found.items())[:_SHOWN])
    more = f", and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    count = config.policy.get(option or "", len(found))
    return f"{len(found)} of {count} labels, data.classes={config.data.classes}: {names}{more}"


def _evaluation(config: TrainConfig, counts: dict[str, int]) -> str:
    judged = config.eval
    text = f'{judged.images} images of "{judged.split}", {counts["evaluations"]} times'
    if "sampled" in counts:
        text += f"; {judged.sampled} samples, {counts['sampled']} times"
    if judged.compare:
        rows = "table of base, sharpened base and result"
        rows += " and controls (each trained anew)" if judged.controls else ""
        text += f"; at the end a {rows}, {judged.seeds} x {judged.samples} samples a row"
    return text


def _to_json(plan: Plan) -> dict[str, Any]:
    """The options under "config", the rest of the plan beside them."""
    fields = {**dataclasses.asdict(plan), "config": to_dict(plan.config)}
    found: dict[str, Any] = json.loads(json.dumps(fields, default=str))
    found["memory_bytes"] = sum(part.bytes for part in plan.memory)
    return found
