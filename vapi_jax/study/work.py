"""A study's work: trainings, which are ordinary runs, and their judgement, a file each.

Whatever is finished is not done again, so that a study that was killed goes on. Several processes, on one
machine or on several that share the folder, take arms that no other one is at.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from vapi_jax.common import locks
from vapi_jax.common.files import make_folder, write_atomically
from vapi_jax.common.options import Errors
from vapi_jax.common.progress import announce
from vapi_jax.data import labels_of
from vapi_jax.evaluation.compare import match_entropy
from vapi_jax.evaluation.frechet import frechet_distance, gaussian_statistics
from vapi_jax.evaluation.kernel_distance import kernel_distance
from vapi_jax.evaluation.precision_recall import precision_recall
from vapi_jax.evaluation.samples import Judged, SampleJudge, even_batch, on_judging_devices
from vapi_jax.methods import make_method
from vapi_jax.models.lpips import load_lpips_params, lpips
from vapi_jax.parallel.preemption import StopRequest
from vapi_jax.study.spec import Arm, Draw, Study, StudyError, recipe_of
from vapi_jax.training.loop import Run, fit
from vapi_jax.training.preflight import raise_all, require, with_classes
from vapi_jax.training.run import prepare_devices, run

RESULTS = "results"
PROTOCOL = "study.json"
_PAIRS = 512  # of samples whose LPIPS is taken
_MATCHING = 10_000  # seed of the samples by which entropies are matched

Metrics = dict[str, float]


def result_path(workdir: Path, slug: str, seed: int) -> Path:
    """Where the judgement of one training is kept; the base's is seed 0 of "base"."""
    return workdir / RESULTS / f"{slug}_{seed}.json"


def protocol(study: Study) -> dict[str, Any]:
    """What all results of a folder have to have in common."""
    return {
        "study": study.name,
        "recipe": study.recipe,
        "changes": dict(study.changes),
        "samples": study.samples,
        "sampling_seeds": study.sampling_seeds,
        "features": list(study.features),
        "draws": {name: dataclasses.asdict(draw) for name, draw in study.draws.items()},
    }


def settle(study: Study, workdir: Path) -> None:
    """Begins a folder, or goes on with one of the same protocol.

    Raises:
      StudyError: it holds results of another.
    """
    path, asked = workdir / PROTOCOL, protocol(study)
    make_folder(workdir / RESULTS)
    if path.exists():
        found = json.loads(path.read_bytes())
        different = [name for name, value in asked.items() if found.get(name) != value]
        if different:
            raise StudyError(
                f"{workdir} holds results with other {', '.join(different)}; choose another --workdir"
            )
    write_atomically(path, json.dumps(asked, indent=2, default=str) + "\n")


def work(study: Study, workdir: Path, stop: StopRequest | None = None) -> bool:
    """Does all that is left to do; whether nothing is left, also not with other processes.

    Raises:
      Stopped: it was asked to stop, and a training has saved.
    """
    settle(study, workdir)
    todo = [(arm, seed) for seed in range(study.seeds) for arm in study.trained]
    busy = 0
    for number, (arm, seed) in enumerate(todo, 1):
        if _finished(study, workdir, arm, seed):
            continue
        announce(f"{study.name}: {arm.name}, seed {seed} ({number} of {len(todo)} trainings)")
        with contextlib.suppress(locks.LockedError), locks.hold(_place(workdir, arm, seed)):
            _train_and_judge(study, workdir, arm, seed, stop)
            continue
        busy += 1
    return not busy


def _place(workdir: Path, arm: Arm, seed: int) -> Path:
    return workdir / "arms" / arm.slug / f"seed_{seed}"


def _finished(study: Study, workdir: Path, arm: Arm, seed: int) -> bool:
    path = result_path(workdir, arm.slug, seed)
    if not path.exists():
        return False
    found = json.loads(path.read_bytes())
    if found["changes"] != json.loads(json.dumps(dict(arm.changes), default=str)):
        raise StudyError(
            f"{path} is of another arm {arm.name!r}, with changes {found['changes']}: rename the arm or "
            "remove the file and the arm's folder"
        )
    return True


def _train_and_judge(
    study: Study, workdir: Path, arm: Arm, seed: int, stop: StopRequest | None
) -> None:
    config = require(recipe_of(study, arm, seed))
    place = _place(workdir, arm, seed) / "run"
    if not (place / "summary.json").exists():
        run(config, place, stop=stop)
    errors = Errors()
    config = with_classes(config, errors)
    raise_all(errors)
    method = make_method(config, prepare_devices(config))
    done = fit(method, place, keep_start=True, stop=stop)  # finished: its last step is read
    judge = StudyJudge(study, done)
    base = result_path(workdir, "base", 0)
    if not base.exists():
        _write(base, judge.base(done))
    summary = json.loads((place / "summary.json").read_bytes())
    found = {
        "arm": arm.name,
        "seed": seed,
        "changes": dict(arm.changes),
        "steps": config.steps,
        "train_seconds": summary["seconds"]["train"],
        "held_out": done.last,
        "draws": {name: judge.tuned(done, draw) for name, draw in study.draws.items()},
    }
    _write(result_path(workdir, arm.slug, seed), found)


def _write(path: Path, found: Mapping[str, Any]) -> None:
    write_atomically(path, json.dumps(found, indent=1, default=str, allow_nan=False) + "\n")


class StudyJudge:
    """Samples, their features and what is measured of them, the same for all arms.

    Args:
      study: the protocol.
      done: a finished run.
    """

    def __init__(self, study: Study, done: Run):
        self._study = study
        method, frozen = on_judging_devices(done.method, done.frozen)
        batch = even_batch(study.samples, method.mesh.size)
        self._judge = SampleJudge(method, frozen, batch, study.features)
        self._reference = self._judge.features(self._judge.real(study.samples, 0))
        self._classes = len(labels_of(method.config.data))
        self._lpips = jax.jit(partial(_lpips_of, load_lpips_params("vgg")))

    def tuned(self, done: Run, draw: Draw) -> dict[str, Any]:
        """A trained policy, and the base at the temperature of its entropy."""
        judge = self._judge.with_settings(**draw.settings)
        sets = self._sets(judge, done.params, draw.temperature)
        entropy = float(np.mean([one["entropy"] for one in sets]))
        entropy_at = judge.entropies(done.start_params, _MATCHING)
        matched = match_entropy(entropy_at, entropy, most=draw.temperature)
        return {
            "sets": sets,
            "matched_temperature": matched,
            "matched": self._sets(judge, done.start_params, matched),
        }

    def base(self, done: Run) -> dict[str, Any]:
        """The base in every way that the study draws it, the tokenizer's floor and other real crops."""
        arms = {arm.name: arm.draw for arm in self._study.arms if arm.draw is not None}
        found = {}
        for name, draw in {**self._study.draws, **arms}.items():
            judge = self._judge.with_settings(**draw.settings)
            found[name] = self._sets(judge, done.start_params, draw.temperature)
        count, seeds = self._study.samples, range(1, self._study.sampling_seeds + 1)
        floor = [self._measure(self._judge.reconstructed(count, seed)) for seed in seeds]
        real = [self._measure(self._judge.real(count, seed)) for seed in seeds]
        return {"held_out": done.first, "draws": found, "floor": floor, "real": real}

    def _sets(self, judge: SampleJudge, params: Any, temperature: float) -> list[Metrics]:
        """What is measured of each sampling seed's images."""
        found = []
        for seed in range(self._study.sampling_seeds):
            shown = self._classes + _PAIRS
            drawn = judge.samples(params, self._study.samples, seed, temperature, shown)
            found.append({**self._of(drawn.features), **self._spread(drawn)})
        return found

    def _measure(self, images: Iterator[UInt8[np.ndarray, "B H W 3"]]) -> Metrics:
        return self._of(self._judge.features(images))

    def _of(self, features: Mapping[str, Float[np.ndarray, "N D"]]) -> Metrics:
        found: Metrics = {}
        for name, theirs in features.items():
            real = self._reference[name]
            if min(len(real), len(theirs)) > theirs.shape[1]:
                both = gaussian_statistics(theirs), gaussian_statistics(real)
                found[f"frechet/{name}"] = frechet_distance(*both[0], *both[1])
            found[f"kernel/{name}"] = kernel_distance(theirs, real).distance
        first = self._study.features[0]
        shares = precision_recall(self._reference[first], features[first])
        return {**found, "precision": shares.precision, "recall": shares.recall}

    def _spread(self, drawn: Judged) -> Metrics:
        """Entropy, and the mean LPIPS of two samples of one class: classes come in turn."""
        images, step = drawn.images, self._classes
        pairs = min(_PAIRS, len(images) - step)
        found = {"entropy": drawn.entropy}
        if pairs > 0:
            apart = self._lpips(images[:pairs], images[step : step + pairs])
            found["diversity"] = float(np.mean(np.asarray(apart), dtype=np.float64))
        return found


def _lpips_of(params: Any, a: UInt8[Array, "N H W 3"], b: UInt8[Array, "N H W 3"]) -> Array:
    a, b = (x.astype(jnp.float32) / 127.5 - 1.0 for x in (a, b))
    return lpips(params, a, b, "vgg")


def read_results(study: Study, folder: Path) -> tuple[Any, dict[str, list[Any]]]:
    """The base's result, and every arm's by seed, as far as they are there.

    Raises:
      StudyError: the base's is not there, or a file cannot be read.
    """

    def read(path: Path) -> Any:
        try:
            return json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise StudyError(f"{path}: {error}") from error

    base = read(folder / "base_0.json")
    found: dict[str, Sequence[Any]] = {}
    for arm in study.trained:
        paths = [folder / f"{arm.slug}_{seed}.json" for seed in range(study.seeds)]
        found[arm.name] = [read(path) for path in paths if path.exists()]
    return base, {name: list(rows) for name, rows in found.items() if rows}
