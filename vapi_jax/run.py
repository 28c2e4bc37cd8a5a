"""One run from configuration to report: devices, task, training, evaluation, summary, report."""

import dataclasses
import importlib.metadata
import json
import logging
import platform
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vapi_jax import __version__
from vapi_jax.checkpoint import CheckpointError
from vapi_jax.config import ConfigError, TrainConfig, check_devices
from vapi_jax.data import class_names, fixed_batch, num_classes
from vapi_jax.evaluation.compare import SEEN, UNSEEN, Judge, compare
from vapi_jax.evaluation.features import FEATURES
from vapi_jax.loop import HELD_OUT, Run, fit
from vapi_jax.metrics import (
    MetricsWriter,
    format_duration,
    format_table,
    image_grid,
    read_history,
    to_uint8,
)
from vapi_jax.models.lpips import PerceptualWeightsError
from vapi_jax.pictures import overview
from vapi_jax.report import write_report
from vapi_jax.sharding import make_mesh
from vapi_jax.tasks import HealthError, make_task
from vapi_jax.tasks.generator import GeneratorTask, VAPiTask
from vapi_jax.tasks.tokenizer import TokenizerTask
from vapi_jax.verdict import show, show_distance
from vapi_jax.weight_files import CONFIG
from vapi_jax.weights import WeightsError

logger = logging.getLogger(__name__)

EXPECTED_ERRORS = (
    CheckpointError,
    ConfigError,
    FileNotFoundError,
    HealthError,
    ModuleNotFoundError,
    PerceptualWeightsError,
    WeightsError,
)
"""Errors whose message says what to do; shown without a stack of frames."""

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def prepare_devices(config: TrainConfig) -> Any:
    """The mesh, with virtual devices where the platform is CPU; before any other use of JAX.

    Raises:
      ConfigError: if the devices do not fit the mesh or the batch.
    """
    if config.cpu_devices > 1:
        try:
            jax.config.update("jax_num_cpu_devices", config.cpu_devices)
        except RuntimeError:  # the backend is up already: a test, a notebook
            logger.info("devices are fixed already: %d", jax.device_count())
    try:
        mesh = make_mesh(config.mesh.data, config.mesh.fsdp)
    except ValueError as error:
        raise ConfigError(f"config.mesh: {error}") from error
    check_devices(config, mesh.size)
    return mesh


def print_plan(config: TrainConfig) -> None:
    """The resolved configuration, as JSON on standard output."""
    print(json.dumps(dataclasses.asdict(config), indent=2, default=str))


def run(config: TrainConfig, workdir: Path) -> dict[str, Any]:
    """Trains, evaluates and reports; returns what is written to `workdir`/summary.json."""
    mesh = prepare_devices(config)
    task = make_task(_with_classes(config), mesh)
    workdir.mkdir(parents=True, exist_ok=True)
    print(
        f"{config.name}: {config.steps} steps of {config.batch_size} images on {mesh.size} "
        f"{jax.devices()[0].device_kind} device(s), mesh {dict(mesh.shape)}; writing to {workdir}",
        flush=True,
    )
    if jax.process_index() == 0:
        _write_json(workdir / CONFIG, dataclasses.asdict(task.config))
    compared = config.task == "vapi" and config.eval.compare
    done = fit(task, workdir, keep_start=compared)
    summary = _summary(task.config, done, mesh)
    images: dict[str, np.ndarray] = {}
    if isinstance(task, GeneratorTask):
        with done.timer.phase("evaluation"):
            images = _evaluate(task, done, workdir, summary)
    elif isinstance(task, TokenizerTask):
        images = _reconstructions(task, done)
    summary["seconds"] = _seconds(done)
    if jax.process_index() == 0:
        _finish(workdir, summary, images)
    return summary


def _with_classes(config: TrainConfig) -> TrainConfig:
    """The class count of the data, where a class-conditional policy does not name its own."""
    policy = dict(config.policy)
    if config.task == "tokenizer" or policy.get("kind") != "class" or "num_classes" in policy:
        return config
    return dataclasses.replace(config, policy={**policy, "num_classes": num_classes(config.data)})


def _summary(config: TrainConfig, done: Run, mesh: Any) -> dict[str, Any]:
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    summary: dict[str, Any] = {
        "task": config.task,
        "name": config.name,
        "config": json.loads(json.dumps(dataclasses.asdict(config), default=str)),
        "devices": {
            "kind": jax.devices()[0].device_kind,
            "count": jax.device_count(),
            "processes": jax.process_count(),
            "mesh": dict(mesh.shape),
        },
        "versions": {"vapi_jax": __version__, "python": platform.python_version(), **versions},
        "steps": config.steps,
        "parameters": done.parameters,
        "weights": done.weights,
        "held_out": {"split": config.eval.split, "images": config.eval.images},
    }
    for name in done.last:
        summary[name] = {"first": done.first.get(name), "last": done.last[name]}
    return summary


def _seconds(done: Run) -> dict[str, float]:
    seconds = dict(done.timer.summary())
    return {"total": seconds.pop("total"), "train": seconds.get("step", 0.0), **seconds}


def _evaluate(
    task: GeneratorTask, done: Run, workdir: Path, summary: dict[str, Any]
) -> dict[str, np.ndarray]:
    """The report's pictures; for a compared run also the summary's table and distances."""
    config = task.config
    compared = config.task == "vapi" and config.eval.compare
    names, per_class = class_names(config.data), config.eval.grid_per_class
    shown = min(config.eval.grid_classes, len(names))
    labels = np.repeat(np.arange(shown), per_class)
    # A comparison draws thousands in large batches; a picture alone needs no more than it shows.
    batch = 0 if compared else -(-len(labels) // task.mesh.size) * task.mesh.size
    judge = Judge(task, done.frozen, done.held_out, batch)
    real = fixed_batch(config.data, config.eval.split, 24, config.seed)["image"]
    images = {"real": to_uint8(real), "reconstructions": to_uint8(judge.reconstruct(real))}
    summary["sample_classes"] = [names[label] for label in labels]
    samples = to_uint8(judge.sample_labels(done.params, labels, seed=7)[0])
    if not isinstance(task, VAPiTask) or not compared:
        return {"samples": samples, **images}
    images["samples_after"] = samples
    images |= _one_of_each(config, shown)
    images["samples_before"] = to_uint8(judge.sample_labels(done.start_params, labels, seed=7)[0])
    controls = _controls(task, workdir) if config.eval.controls else {}
    rows = compare(judge, done.start_params, done.params, controls)
    summary["table"] = rows
    by_kind = {row["kind"]: row for row in rows}
    for key, feature in (("frechet", SEEN), ("frechet_unseen", UNSEEN)):
        summary[key] = {
            "feature": FEATURES[feature].description,
            "samples": config.eval.samples,
            "before": by_kind["base"][key],
            "after": by_kind["vapi"][key],
            "floor": by_kind["floor"][key],
            "base_at_equal_entropy": by_kind["matched"][key],
        }
    summary["free_running_entropy"] = {
        "first": by_kind["base"]["entropy"],
        "last": by_kind["vapi"]["entropy"],
    }
    return images


def _one_of_each(config: TrainConfig, classes: int) -> dict[str, np.ndarray]:
    """A real training crop of each of the first classes, where a small batch has them all."""
    batch = fixed_batch(config.data, "train", config.eval.images, config.seed)
    labels = list(batch["condition"])
    if not set(range(classes)) <= set(labels):
        return {}
    return {"real_of_classes": to_uint8(batch["image"][[labels.index(c) for c in range(classes)]])}


def _controls(task: VAPiTask, workdir: Path) -> dict[str, Any]:
    """Other trainings from the same base for as many steps: what VA-π has to beat."""
    changes: dict[str, dict[str, Any]] = {
        "CE only": {"policy_gradient": False},
        "shuffled advantages": {"shuffle_advantages": True},
    }
    found = {}
    for name, change in changes.items():
        vapi = dataclasses.replace(task.config.vapi, **change)
        label = name.replace(" ", "_").lower()
        config = dataclasses.replace(task.config, vapi=vapi, name=f"control {name}")
        found[name] = fit(VAPiTask(config, task.mesh), workdir / "controls" / label).params
    return found


def _reconstructions(task: TokenizerTask, done: Run) -> dict[str, np.ndarray]:
    real = fixed_batch(task.config.data, task.config.eval.split, 24, task.config.seed)["image"]
    decode = jax.jit(lambda p, x: task.tokenizer.apply({"params": p}, x).reconstruction)
    again = decode(done.params["tokenizer"], real)
    return {"real": to_uint8(real), "reconstructions": to_uint8(np.asarray(again))}


def _write_json(path: Path, value: Any) -> None:
    partial = path.with_suffix(".partial")
    text = json.dumps(value, indent=2, allow_nan=False, default=str)
    partial.write_text(f"{text}\n", encoding="utf-8")
    partial.replace(path)


def _finish(workdir: Path, summary: dict[str, Any], images: dict[str, np.ndarray]) -> None:
    """summary.json, report.html, pictures as PNG, and the table on the terminal."""
    from PIL import Image

    _write_json(workdir / "summary.json", summary)
    grids = {name: image_grid(array, columns=8, pad=2, scale=3) for name, array in images.items()}
    if {"samples_before", "samples_after", "real_of_classes"} <= images.keys():
        one_each = slice(None, None, summary["config"]["eval"]["grid_per_class"])
        rows = {"real crops": images["real_of_classes"], "base": images["samples_before"][one_each]}
        grids["overview"] = overview({**rows, "post-trained": images["samples_after"][one_each]})
    for name, grid in grids.items():
        Image.fromarray(grid).save(workdir / f"{name}.png")
    with MetricsWriter(workdir) as writer:
        writer.write_images(summary["steps"], grids)
    report = write_report(workdir, summary, read_history(workdir / "metrics.jsonl"), images)
    print_results(summary)
    print(f"\n{format_duration(summary['seconds']['total'])} in all. Open {report.resolve()}")


def print_results(summary: dict[str, Any]) -> None:
    """The final table, or the held-out metrics of a run without one."""
    if "table" in summary:
        headers = ["", "T", "reward", "CE", "entropy"]
        headers += [f"Fréchet {feature}" for feature in (SEEN, UNSEEN)]
        rows = [
            [
                row["name"],
                show(row["temperature"], 3),
                *(show(row[key]) for key in ("reward", "ce", "entropy")),
                *(show_distance(row[key]) for key in ("frechet", "frechet_unseen")),
            ]
            for row in summary["table"]
        ]
        print("\n" + format_table(rows, headers))
        print(
            f"\nFréchet distance of {summary['frechet']['samples']} free-running samples to real "
            "crops in the named LPIPS features, mean ± sd over sampling seeds; not FID. Reward and "
            f"CE: held-out images ({summary['held_out']['split']})."
        )
        return
    names = [name for name, value in summary.items() if isinstance(value, dict) and "last" in value]
    rows = [[HELD_OUT + n, show(summary[n]["first"]), show(summary[n]["last"])] for n in names]
    print("\n" + format_table(rows, ["", "before", "after"]))
