"""A study's work: trainings, which are ordinary runs, and their judgement, a file each.

Whatever is finished is not done again, so that a study that was killed goes on. Several processes, on one
machine or on several that share the folder, take arms that no other one is at.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from vapi_jax.common import locks
from vapi_jax.common.files import make_folder, read_json, write_atomically
from vapi_jax.common.progress import announce
from vapi_jax.generation.loading import SUMMARY
from vapi_jax.generation.sampler import BrokenSamplesError
from vapi_jax.methods import HealthError
from vapi_jax.methods.resolve import raise_all, resolve
from vapi_jax.parallel.preemption import StopRequest
from vapi_jax.study.files import add_detected, images_of
from vapi_jax.study.judge import StudyJudge, settled_method
from vapi_jax.study.spec import BASE, Arm, Results, Study, StudyError, recipe_of
from vapi_jax.training.loop import fit
from vapi_jax.training.preflight import look, require
from vapi_jax.training.resume import config_changes, config_facts
from vapi_jax.training.run import run
from vapi_jax.weights.store import SHIPPED

RESULTS = "results"
PROTOCOL = "study.json"
PATIENCE = 60.0
"""Seconds to wait for another process that writes to the folder of the study itself."""


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
      StudyError: it holds results of another, or results and no protocol.
    """
    path, results = workdir / PROTOCOL, workdir / RESULTS
    make_folder(results)
    with locks.hold(workdir, patience=PATIENCE):
        if path.exists():
            check_protocol(study, workdir)
            return
        if next(results.glob("*.json"), None) is not None:
            raise StudyError(f"{results} holds results, and there is no {path} that says of what")
        write_atomically(path, json.dumps(protocol(study), indent=2) + "\n")


def check_protocol(study: Study, folder: Path) -> None:
    """Whether a folder's study.json is this study's.

    Raises:
      StudyError: it is of another protocol, or not there.
    """
    asked, found = protocol(study), read_json(folder / PROTOCOL, StudyError)
    if different := [name for name, value in asked.items() if found.get(name) != value]:
        raise StudyError(
            f"{folder} holds results with other {', '.join(different)}; choose another --workdir"
        )


def work(study: Study, workdir: Path, stop: StopRequest | None = None) -> list[str]:
    """Does all that is left to do and that these devices have room for.

    Returns:
      What is left all the same, a sentence each: other processes are at it, or there is no room.

    Raises:
      Stopped: it was asked to stop, and a training has saved.
    """
    settle(study, workdir)
    arms = (Arm(BASE), *study.trained)
    todo = [(arm, seed) for seed in range(study.seeds) for arm in arms]
    judge, left = StudyJudge(study, workdir), []
    for number, (arm, seed) in enumerate(todo, 1):
        if _finished(study, workdir, arm, seed):
            continue
        announce(f"{study.name}: {arm.name}, seed {seed} ({number} of {len(todo)})")
        try:
            with locks.hold(_place(workdir, arm, seed)):
                if not _finished(study, workdir, arm, seed):  # by now, by another process
                    found = _found(study, workdir, arm, seed, judge, stop)
                    text = json.dumps(found, indent=1, default=str, allow_nan=False)
                    write_atomically(result_path(workdir, arm.slug, seed), f"{text}\n")
        except locks.LockedError:
            left.append(f"{arm.name}, seed {seed}: another process is at it")
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            why = str(error).splitlines()[0][:200]
            left.append(f"{arm.name}, seed {seed}: these devices have no room for it ({why})")
            announce(left[-1])
    return left


def require_all(study: Study) -> None:
    """Looks whether all arms can run here.

    Raises:
      ConfigError: listing once what is in their way, with the arms that it is in the way of, and files of
        the published way of judging that are not there.
    """
    found: dict[str, list[str]] = {}
    arms = (Arm(BASE), *study.trained)
    if (files := study.files) is not None:
        gone = [f for f in files.paths if f not in SHIPPED and not Path(f).exists()]
        found |= {f"files: there is no {f}": [arm.name for arm in arms] for f in gone}
    for arm in arms:
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


def _finished(study: Study, workdir: Path, arm: Arm, seed: int) -> bool:
    path = result_path(workdir, arm.slug, seed)
    if not path.exists():
        return False
    found = read_json(path, StudyError)
    if different := _other_facts(found, study, arm, seed):
        raise StudyError(
            f"{path} is of another arm {arm.name!r} ({', '.join(different)}): rename the arm, or remove "
            "the file and the arm's folder"
        )
    return True


def _other_facts(found: Mapping[str, Any], study: Study, arm: Arm, seed: int) -> list[str]:
    """In which a result is not of its arm: name, recipe and changes, and what these came to."""
    facts = {"arm": arm.name, **_facts(arm)}
    # An older file does not tell of what no arm could say then.
    told = {**_facts(Arm(arm.name)), **found}
    different = [
        f"{name}: {told.get(name)}" for name, fact in facts.items() if told.get(name) != fact
    ]
    if different or "config" not in found:  # as older ones have not
        return different
    config, then = resolve(recipe_of(study, arm, seed)), found["config"]
    trained = then.get("steps", 0)
    steps = [f"steps: {trained} -> {config.steps}"]
    if arm.name == BASE:  # which is not trained
        then, steps = {**then, "optimizer": config_facts(config)["optimizer"]}, []
    # A run may go on for more steps; a result of fewer is another one.
    return config_changes(then, config) or (steps if trained < config.steps else [])


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
    found["config"] = config_facts(resolve(recipe_of(study, arm, seed)))
    if arm.name == BASE:
        return {**found, **judge.base(seed)}
    config, place = require(recipe_of(study, arm, seed)), _place(workdir, arm, seed) / "run"
    found["steps"] = config.steps
    try:
        if not (place / SUMMARY).exists():
            # Those of an earlier training, whose result and run were removed.
            if (images := images_of(workdir, f"{arm.slug}_{seed}")).exists():
                shutil.rmtree(images)
            run(config, place, stop=stop)
        done = fit(settled_method(config), place, stop=stop)  # finished: its last step is read
        draws = {name: judge.tuned(done, place, seed, name, arm.average) for name in study.draws}
    except (HealthError, BrokenSamplesError) as error:  # an answer, too
        return {**found, "failed": str(error)}
    summary = read_json(place / SUMMARY, StudyError)
    seconds = summary["seconds"]["train"]
    # The run's own figures are of the parameters, not of their average.
    held_out = {} if arm.average else done.last
    return {**found, "train_seconds": seconds, "held_out": held_out, "draws": draws}


def read_results(study: Study, folder: Path) -> Results:
    """The results of a study as far as they are there, with GenEval's scores of what was detected since.

    Raises:
      StudyError: there is none of the base, or a file cannot be read or is of another arm.
    """
    files = study.files

    def read(arm: Arm, seed: int) -> Any:
        path = folder / f"{arm.slug}_{seed}.json"
        if not path.exists():
            return None
        found = read_json(path, StudyError)
        if different := _other_facts(found, study, arm, seed):
            raise StudyError(f"{path} is of another arm ({', '.join(different)})")
        if not ("draws" in found or "failed" in found):
            raise StudyError(f"{path} tells of no samples: remove it, and the arm is judged again")
        return found

    base, failed = [], []
    arms: dict[str, list[dict[str, Any]]] = {}
    for seed in range(study.seeds):
        if (found := read(Arm(BASE), seed)) is not None:
            base.append(found)
            for name, sets in found["draws"].items():
                add_detected(files, folder.parent, f"{BASE}_{seed}", name, sets)
    if not base:
        raise StudyError(f"{folder} holds no results of the base ({BASE}_0.json)")
    for arm in study.trained:
        for seed in range(study.seeds):
            if (found := read(arm, seed)) is None:
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
