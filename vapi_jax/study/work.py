"""A study's work: trainings, which are ordinary runs, and their judgement, a file each.

Whatever is finished is not done again, so that a study that was killed goes on. Several processes, on one
machine or on several that share the folder, take arms that no other one is at.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

from vapi_jax.common import locks
from vapi_jax.common.files import make_folder, write_atomically
from vapi_jax.common.progress import announce
from vapi_jax.generation.loading import SUMMARY
from vapi_jax.generation.sampler import BrokenSamplesError
from vapi_jax.methods import HealthError
from vapi_jax.methods.resolve import raise_all
from vapi_jax.parallel.preemption import StopRequest
from vapi_jax.study.files import add_detected
from vapi_jax.study.judge import StudyJudge, settled_method
from vapi_jax.study.spec import BASE, Arm, Results, Study, StudyError, recipe_of
from vapi_jax.training.loop import fit
from vapi_jax.training.preflight import look, require
from vapi_jax.training.run import run

RESULTS = "results"
PROTOCOL = "study.json"


def result_path(workdir: Path, slug: str, seed: int) -> Path:
    """Where the judgement of one seed of an arm is kept; the base's slug is "base"."""
    return workdir / RESULTS / f"{slug}_{seed}.json"


def protocol(study: Study) -> dict[str, Any]:
    """What all results of a folder have to have in common."""
    facts = {
        "study": study.name,
        "recipe": study.recipe,
        "changes": dict(study.changes),
        "samples": study.samples,
        "sampling_seeds": study.sampling_seeds,
        "features": list(study.features),
        "draws": {name: dataclasses.asdict(draw) for name, draw in study.draws.items()},
        "untrained": {a.name: dataclasses.asdict(a.draw) for a in study.arms if a.draw is not None},
        "files": None if study.files is None else dataclasses.asdict(study.files),
    }
    found: dict[str, Any] = json.loads(json.dumps(facts, default=str))  # as it is read again
    return found


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
    write_atomically(path, json.dumps(asked, indent=2) + "\n")


def work(study: Study, workdir: Path, stop: StopRequest | None = None) -> bool:
    """Does all that is left to do; whether nothing is left, also not with other processes.

    Raises:
      Stopped: it was asked to stop, and a training has saved.
    """
    settle(study, workdir)
    arms = (Arm(BASE), *study.trained)
    todo = [(arm, seed) for seed in range(study.seeds) for arm in arms]
    judge, busy = StudyJudge(study, workdir), 0
    for number, (arm, seed) in enumerate(todo, 1):
        if _finished(workdir, arm, seed):
            continue
        announce(f"{study.name}: {arm.name}, seed {seed} ({number} of {len(todo)})")
        with contextlib.suppress(locks.LockedError), locks.hold(_place(workdir, arm, seed)):
            if not _finished(workdir, arm, seed):  # by now, by another process
                found = _found(study, workdir, arm, seed, judge, stop)
                text = json.dumps(found, indent=1, default=str, allow_nan=False)
                write_atomically(result_path(workdir, arm.slug, seed), f"{text}\n")
            continue
        busy += 1
    return not busy


def require_all(study: Study) -> None:
    """Looks whether all arms can run here.

    Raises:
      StudyError: a file of the published way of judging is not there.
      ConfigError: listing once what is in their way, with the arms that it is in the way of.
    """
    if study.files is not None:
        named = (study.files.reference, study.files.inception, study.files.prompts)
        if gone := [name for name in named if name and not Path(name).exists()]:
            raise StudyError(f"study {study.name}: there is no {' and no '.join(gone)}")
    found: dict[str, list[str]] = {}
    for arm in (Arm(BASE), *study.trained):
        for error in look(recipe_of(study, arm))[1]:
            found.setdefault(error, []).append(arm.name)
    everywhere = 1 + len(study.trained)
    raise_all(
        [
            error if len(arms) == everywhere else f"{error} (of {', '.join(arms)})"
            for error, arms in found.items()
        ]
    )


def _place(workdir: Path, arm: Arm, seed: int) -> Path:
    return workdir / "arms" / arm.slug / f"seed_{seed}"


def _finished(workdir: Path, arm: Arm, seed: int) -> bool:
    path = result_path(workdir, arm.slug, seed)
    if not path.exists():
        return False
    found = json.loads(path.read_bytes())
    if different := [name for name, fact in _facts(arm).items() if found[name] != fact]:
        raise StudyError(
            f"{path} is of another arm {arm.name!r} "
            f"({', '.join(f'{name}: {found[name]}' for name in different)}): rename the arm, or remove "
            "the file and the arm's folder"
        )
    return True


def _facts(arm: Arm) -> dict[str, Any]:
    """What a result has to have in common with its arm, as it is read again."""
    facts = {"recipe": arm.recipe, "changes": dict(arm.changes), "average": arm.average}
    found: dict[str, Any] = json.loads(json.dumps(facts, default=str))
    return found


def _found(
    study: Study, workdir: Path, arm: Arm, seed: int, judge: StudyJudge, stop: StopRequest | None
) -> dict[str, Any]:
    """The result of one seed of an arm, or of the base."""
    found: dict[str, Any] = {"arm": arm.name, "seed": seed, **_facts(arm)}
    if arm.name == BASE:
        return {**found, **judge.base(seed)}
    config, place = require(recipe_of(study, arm, seed)), _place(workdir, arm, seed) / "run"
    found["steps"] = config.steps
    try:
        if not (place / SUMMARY).exists():
            run(config, place, stop=stop)
        done = fit(settled_method(config), place, stop=stop)  # finished: its last step is read
        draws = {name: judge.tuned(done, place, seed, name, arm.average) for name in study.draws}
    except (HealthError, BrokenSamplesError) as error:  # an answer, too
        return {**found, "failed": str(error)}
    summary = json.loads((place / SUMMARY).read_bytes())
    seconds = summary["seconds"]["train"]
    return {**found, "train_seconds": seconds, "held_out": done.last, "draws": draws}


def read_results(study: Study, folder: Path) -> Results:
    """The results of a study as far as they are there, with GenEval's scores of what was detected since.

    Raises:
      StudyError: there is none of the base, or a file cannot be read.
    """
    files = study.files

    def read(slug: str, seed: int) -> Any:
        path = folder / f"{slug}_{seed}.json"
        try:
            return json.loads(path.read_bytes()) if path.exists() else None
        except (OSError, ValueError) as error:
            raise StudyError(f"{path}: {error}") from error

    base, failed = [], []
    arms: dict[str, list[dict[str, Any]]] = {}
    for seed in range(study.seeds):
        if (found := read(BASE, seed)) is not None:
            base.append(found)
            for name, sets in found["draws"].items():
                add_detected(files, folder.parent, f"{BASE}_{seed}", name, sets)
    if not base:
        raise StudyError(f"{folder} holds no results of the base ({BASE}_0.json)")
    for arm in study.trained:
        for seed in range(study.seeds):
            if (found := read(arm.slug, seed)) is None:
                continue
            if "failed" in found:
                failed.append(f"{arm.name}, seed {seed}: {found['failed']}")
                continue
            for name, draw in found["draws"].items():
                who = f"{arm.slug}_{seed}"
                add_detected(files, folder.parent, who, name, draw["sets"])
                add_detected(files, folder.parent, who, f"{name}_matched", draw["matched"])
            arms.setdefault(arm.name, []).append(found)
    return Results(base, arms, failed)
