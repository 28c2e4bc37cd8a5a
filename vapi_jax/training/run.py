"""One run from configuration to report: devices, task, training, evaluation, summary, report."""

import contextlib
import json
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, UInt8
from PIL import Image

from vapi_jax.common import locks
from vapi_jax.common.files import write_atomically
from vapi_jax.common.images import image_grid, to_uint8
from vapi_jax.common.options import Errors
from vapi_jax.common.progress import announce, format_duration
from vapi_jax.common.tables import format_table
from vapi_jax.data import class_names, classes_of, fixed_batch
from vapi_jax.evaluation.compare import (
    BASE,
    REAL,
    TUNED,
    Judge,
    compare,
)
from vapi_jax.evaluation.embeddings import Plane, planes_of
from vapi_jax.evaluation.features import FEATURES
from vapi_jax.evaluation.held_out import HELD_OUT
from vapi_jax.evaluation.samples import (
    SEEN,
    SampleJudge,
    asked_of,
    by_label,
    decoder_of,
    judged_features,
    judging_batch,
    on_judging_devices,
    sampler_of,
    table_batch,
)
from vapi_jax.generation.sampler import Sampler, in_batches
from vapi_jax.methods import Method, make_method
from vapi_jax.methods.classes import class_names_of, labels_option, with_classes
from vapi_jax.methods.config import TrainConfig, to_dict
from vapi_jax.methods.resolve import raise_all
from vapi_jax.models.classes import FILE as CLASSES
from vapi_jax.models.classes import write_class_list
from vapi_jax.parallel import compiler
from vapi_jax.parallel.preemption import StopRequest
from vapi_jax.parallel.sharding import host_array, shard_whole
from vapi_jax.report.verdict import show, show_distance, show_score, too_few_samples
from vapi_jax.training.logging import MetricsWriter, read_history
from vapi_jax.training.loop import Run, fit
from vapi_jax.training.preflight import open_mesh
from vapi_jax.training.resume import code_facts

logger = logging.getLogger(__name__)

SHOWN = 24
"""Held-out images in the report, at most."""
_LETTERS = 40  # of a caption beside a picture
DISTANCES = ("frechet", "frechet_unseen")
"""What a summary calls the table's distances, in the order of `judged_features`."""


def prepare_devices(config: TrainConfig) -> Mesh:
    """The mesh, with virtual devices where the platform is CPU; before any other use of JAX.

    Raises:
      ConfigError: if the devices do not fit the mesh or the batch.
    """
    errors = Errors()
    mesh = open_mesh(config, errors)
    raise_all(errors)
    assert mesh is not None, "without a mesh there is an error"
    return mesh


def run(
    config: TrainConfig,
    workdir: Path,
    *,
    stop: StopRequest | None = None,
    resume_with_changes: bool = False,
    profile: range | None = None,
) -> dict[str, Any]:
    """Trains, evaluates and reports; returns what is written to `workdir`/summary.json.

    The same call goes on from what an earlier one has saved, wherever that one ended.

    Args:
      config: the run.
      workdir: made if absent; no other live run may use it.
      stop: asked after every step whether to save and stop; the default never is.
      resume_with_changes: go on also where the configuration is not that of the checkpoint.
      profile: steps to trace for TensorBoard, in `workdir`/tensorboard.
    """
    mesh = prepare_devices(config)
    with contextlib.ExitStack() as held:
        if jax.process_index() == 0:
            held.enter_context(locks.hold(workdir))
        fitting: dict[str, Any] = {"stop": stop, "resume_with_changes": resume_with_changes}
        return _run(config, mesh, workdir, fitting, profile)


def _run(
    config: TrainConfig,
    mesh: Mesh,
    workdir: Path,
    fitting: Mapping[str, Any],
    profile: range | None,
) -> dict[str, Any]:
    errors = Errors()
    config = with_classes(config, errors)
    raise_all(errors)
    method = make_method(config, mesh)
    if jax.process_index() == 0 and (names := class_names_of(config)) is not None:
        classes = classes_of(config.data)
        logger.info("labels by data.classes=%s: %s", config.data.classes, classes.rows(12))
        write_class_list(workdir / CLASSES, names)
    announce(
        f"{config.name}: {config.steps} steps of {config.batch_size} images on {mesh.size} "
        f"{jax.devices()[0].device_kind} device(s), mesh {dict(mesh.shape)}; writing to {workdir}"
    )
    if method.trained_parts:
        announce(f"{config.name} trains {method.trained_parts}")
    done = fit(method, workdir, keep_start=config.eval.compare, profile=profile, **fitting)
    summary = _summary(method, done)
    with done.timer.phase("evaluation"):
        judge = _judge(method, done) if config.eval.compare else None
        images = _pictures(method, done, summary, judge)
        planes = _compare(done, judge, workdir, summary, fitting) if judge else []
    summary["seconds"] = _seconds(done)
    if jax.process_index() == 0:
        _finish(workdir, summary, images, planes)
    return summary


def _summary(method: Method, done: Run) -> dict[str, Any]:
    config, mesh = method.config, method.mesh
    curves = [list(curve) for curve in method.curves]
    summary: dict[str, Any] = {
        "method": {"name": config.method, "title": method.title, "curves": curves},
        "name": config.name,
        "config": to_dict(config),
        "directory": str(Path.cwd()),  # what relative paths in it mean
        "devices": {
            "kind": jax.devices()[0].device_kind,
            "count": jax.device_count(),
            "processes": jax.process_count(),
            "mesh": dict(mesh.shape),
        },
        "versions": code_facts(),
        "steps": config.steps,
        "skipped_steps": done.skipped,
        "parameters": done.parameters,
        "weights": done.weights,
        "labels": classes_of(config.data).by_name if labels_option(config) else {},
        "held_out": {"split": config.eval.split, "images": config.eval.images},
        "precision": method.precision,
    }
    if condition := method.describe():
        summary["condition"] = condition
    if config.eval.sampled_every:
        feature = FEATURES[SEEN].description
        summary["sampled"] = {"feature": feature, "samples": config.eval.sampled}
    for name in done.last:
        summary[name] = {"first": done.first.get(name), "last": done.last[name]}
    return summary


def _seconds(done: Run) -> dict[str, float]:
    seconds = dict(done.timer.summary())
    return {"total": seconds.pop("total"), "train": seconds.get("step", 0.0), **seconds}


# --- what is shown and compared at the end --------------------------------------------------------


def _judge(method: Method, done: Run) -> Judge:
    """Of the table; with the programs that judged samples in training, where they were the same."""
    method, frozen = on_judging_devices(method, done.frozen)
    batch, names = table_batch(method), judged_features(method.config)
    judge = done.judge
    if judge is None or (judge.batch, judge.names) != (batch, names):
        judge = SampleJudge(method, frozen, batch, names)
    return Judge(method, done.held_out, judge)


def _pictures(
    method: Method, done: Run, summary: dict[str, Any], judge: Judge | None
) -> dict[str, UInt8[np.ndarray, "N H W 3"]]:
    """Held-out images, what the tokenizer makes of them, and samples, before and after where kept."""
    config, images = method.config, {}
    if method.wants_images:
        count = min(SHOWN, config.eval.images)
        real = fixed_batch(config.data, config.eval.split, count, config.seed)["image"]
        images["real"] = to_uint8(real)
        again = (
            judge.judge.reconstruct(real, done.params)
            if judge
            else _reconstruct(method, done, real)
        )
        if again is not None:
            images["reconstructions"] = to_uint8(again)
    if method.sampled() is None:
        return images
    names, per_class = class_names(config.data), config.eval.grid_per_class
    asked = asked_of(config, config.eval.grid_classes)
    labels = np.repeat(asked[: config.eval.grid_classes], per_class)
    shown = [names[x] if names else method.raw_name(x)[:_LETTERS] for x in labels]
    summary["sample_classes"] = shown
    if judge is None:
        # Thousands are drawn in large batches; a picture alone needs no more than it shows.
        judged = on_judging_devices(method, done.frozen)
        sampler = sampler_of(*judged, judging_batch(judged[0], len(labels)))
        return {"samples": _samples(*judged, sampler, labels, done.params), **images}
    draw = partial(_samples, judge.judge.method, judge.judge.frozen, judge.judge.sampler, labels)
    samples = draw(done.params)
    images["samples_after"] = samples
    images |= _real_of_classes(config, labels)
    images["samples_before"] = draw(done.start_params)
    return images


def _samples(
    method: Method, frozen: Mapping[str, Any], sampler: Sampler, labels: np.ndarray, params: Any
) -> UInt8[np.ndarray, "N H W 3"]:
    """A sample of each label, or caption."""
    found = method.sampled()
    assert found is not None, "asked before"
    batches = in_batches(len(labels), sampler.rows)
    decoder, params = decoder_of(method, params), found.params(params, frozen)
    drawn = sampler(params, by_label(method, labels), batches, 7, 1.0, decoder)
    return np.concatenate([part.images for part in drawn])


def _reconstruct(
    method: Method, done: Run, real: Float[np.ndarray, "N H W 3"]
) -> Float[np.ndarray, "N H W 3"] | None:
    missing = -len(real) % method.mesh.size
    padded = shard_whole(np.pad(real, ((0, missing), (0, 0), (0, 0), (0, 0))), method.mesh)
    reconstruct = jax.jit(method.reconstruct, compiler_options=compiler.options(method.mesh))
    again = reconstruct(done.params, done.frozen, padded)
    return None if again is None else host_array(again)[: len(real)]


def _real_of_classes(config: TrainConfig, labels: np.ndarray) -> dict[str, np.ndarray]:
    """A real training crop for each label, where a small batch has them all."""
    batch = fixed_batch(config.data, "train", config.eval.images, config.seed)
    places = {label: list(np.flatnonzero(batch["condition"] == label)) for label in set(labels)}
    if any(len(places[label]) < np.sum(labels == label) for label in places):
        return {}
    return {"real_of_classes": to_uint8(batch["image"][[places[i].pop(0) for i in labels]])}


def _compare(
    done: Run,
    judge: Judge,
    workdir: Path,
    summary: dict[str, Any],
    fitting: Mapping[str, Any],
) -> list[Plane]:
    """The table of base and post-trained policy into the summary; planes of their features."""
    method = done.method
    wanted = method.controls() if method.config.eval.controls else {}

    def control(name: str, config: TrainConfig) -> Any:
        place = workdir / "controls" / name.replace(" ", "_").lower()
        return fit(make_method(config, method.mesh), place, **fitting).params

    controls = {name: partial(control, name, config) for name, config in wanted.items()}
    # The run has judged its first and last parameters already, at the temperature that it trains with.
    known = {BASE: done.first, TUNED: done.last} if method.temperature == 1.0 else {}
    rows, features = compare(judge, done.start_params, done.params, controls, known)
    summary["table"] = rows
    by_kind = {row["kind"]: row for row in rows}
    for key, feature in zip(DISTANCES, judged_features(method.config), strict=True):
        summary[key] = {
            "feature": FEATURES[feature].description,
            "dim": FEATURES[feature].dim,
            "samples": method.config.eval.samples,
            "before": by_kind["base"][key],
            "after": by_kind["vapi"][key],
            "floor": by_kind["floor"][key],
            "base_at_equal_entropy": by_kind["matched"][key],
        }
    if changes := judge.scene_changes():
        scored = ("base", "vapi", "matched", "floor")
        summary["scenes"] = {kind: by_kind[kind]["scenes"] for kind in scored}
        summary["scenes"]["changes"] = changes  # of "vapi" from each of two others
    summary["free_running_entropy"] = {
        "first": by_kind["base"]["entropy"],
        "last": by_kind["vapi"]["entropy"],
    }
    # A thread for each network: most of the time one core is all that t-SNE takes.
    with ThreadPoolExecutor() as threads:
        titles = [FEATURES[name].description for name in features]
        planes = threads.map(planes_of, features.values(), features, titles)
        return [plane for found in planes for plane in found]


# --- what is written ------------------------------------------------------------------------------


def _write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=2, allow_nan=False, default=str)
    write_atomically(path, f"{text}\n")


def _finish(
    workdir: Path,
    summary: dict[str, Any],
    images: dict[str, np.ndarray],
    planes: Sequence[Plane],
) -> None:
    """summary.json, report.html, pictures as PNG, and the table on the terminal."""
    from vapi_jax.report import figures  # matplotlib: not while the run trains
    from vapi_jax.report.page import write_report
    from vapi_jax.report.pictures import side_by_side

    _write_json(workdir / "summary.json", summary)
    grids = {name: image_grid(array, columns=8) for name, array in images.items()}
    if {"samples_before", "samples_after", "real_of_classes"} <= images.keys():
        columns = {
            REAL: images["real_of_classes"],
            BASE: images["samples_before"],
            TUNED: images["samples_after"],
        }
        grids["overview"] = side_by_side(columns, summary["sample_classes"])
    drawn = {plane.name: figures.plane(plane) for plane in planes}
    grids |= {name: figures.pixels(figure) for name, figure in drawn.items()}
    for name, grid in grids.items():
        Image.fromarray(grid).save(workdir / f"{name}.png")
    with MetricsWriter(workdir) as writer:
        writer.write_images(summary["steps"], grids)
    history = read_history(workdir / "metrics.jsonl")
    report = write_report(workdir, summary, history, images, list(drawn.values()))
    print_results(summary)
    print(f"\n{format_duration(summary['seconds']['total'])} in all. Open {report.resolve()}")


def print_results(summary: dict[str, Any]) -> None:
    """The final table, or the held-out metrics of a run without one."""
    if "table" in summary:
        headers = ["", "T", "reward", "CE", "entropy"]
        headers += [f"Fréchet {summary[key]['feature'].split()[0]}" for key in DISTANCES]
        rows = [
            [
                row["name"],
                show(row["temperature"], 3),
                *(show(row[key]) for key in ("reward", "ce", "entropy")),
                *(show_distance(row[key]) for key in DISTANCES),
            ]
            for row in summary["table"]
        ]
        print("\n" + format_table(rows, headers))
        if "scenes" in summary:
            tasks = summary["scenes"]["base"]
            scored = [
                [row["name"], *(show_score(row["scenes"][task]) for task in tasks)]
                for row in summary["table"]
            ]
            print("\n" + format_table(scored, ["", *tasks]))
        if too_few_samples(summary):
            print("\nA trial: with no more samples than features, these distances mean nothing.")
        print(
            f"\nFréchet distance of {summary['frechet']['samples']} free-running samples to real "
            "crops in the named features, mean ± sd over sampling seeds; not FID. Reward and "
            f"CE: held-out images ({summary['held_out']['split']})."
        )
        return
    names = [name for name, value in summary.items() if isinstance(value, dict) and "last" in value]
    rows = [[HELD_OUT + n, show(summary[n]["first"]), show(summary[n]["last"])] for n in names]
    print("\n" + format_table(rows, ["", "before", "after"]))
