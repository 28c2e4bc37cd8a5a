"""The published way of judging, beside a study's own: images in files, as `vapi_jax.sample` writes them.

"adm50k": FID, Inception Score, precision and recall of 50,000 images of random classes at 256 px, by the
evaluator of `vapi_jax.evaluate`; the images go when they are judged. GenEval's protocols: images in GenEval's
folders, which stay, for a detector of the user's. What that detector writes beside them is scored whenever
the page is made.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vapi_jax import sample
from vapi_jax.common.files import partial_of, read_json, write_atomically
from vapi_jax.evaluation.geneval_files import judge_file, read_prompts
from vapi_jax.evaluation.geneval_scores import PROMPTS, check_complete, score
from vapi_jax.evaluation.measure import Settings, measure
from vapi_jax.generation.protocols import PROTOCOLS
from vapi_jax.rewards.geneval import Rules
from vapi_jax.study.spec import Draw, Files, StudyError

DETECTIONS = "detections.jsonl"
_ROUNDED = 1e-3  # nats, which devices and versions may differ by
_METRICS = ("fid", "is", "precision", "recall")
OF_FILES = {"precision": "adm/precision", "recall": "adm/recall"}
"""What is called so in a study, which has others of these in features of its own."""


def arguments(files: Files, draw: Draw, temperature: float, seed: int) -> list[str]:
    """Of `vapi_jax.sample`, beside checkpoint and place: the protocol's, under the draw's own."""
    given: dict[str, Any] = {**PROTOCOLS[files.protocol]}
    given |= {"cfg": draw.cfg_scale, "top_k": draw.top_k, "top_p": draw.top_p}
    given |= {"temperature": temperature, "seed": seed, "dtype": files.dtype, **files.changes}
    if files.prompts:
        given["prompts"] = files.prompts
    if files.text_encoder:
        given["text_encoder"] = files.text_encoder
    return [f"--{name}={value}" for name, value in given.items()]


def folder_of(workdir: Path, who: str, what: str, seed: int) -> Path:
    """Of the images of one set: by whom ("base_0"), by which draw, the how manieth."""
    return images_of(workdir, who) / f"{what}_{seed}"


def images_of(workdir: Path, who: str) -> Path:
    """The folder of all sets of images of one training, or of the base of one seed."""
    return workdir / "images" / who


def settled_temperature(path: Path, name: str, entropy: float, find: Callable[[], float]) -> float:
    """What a base is drawn at to have an entropy, found once and kept.

    Images may have been drawn at it before an interruption, and another machine finds another last digit.

    Args:
      path: where it is kept.
      name: of the draw.
      entropy: in nats a token; one of another arm is found anew.
      find: the temperature.

    Raises:
      StudyError: the file is damaged.
    """
    known = read_json(path, StudyError) if path.exists() else {}
    then = known.get(name)
    if then is None or abs(then["entropy"] - entropy) > _ROUNDED:
        known[name] = {"entropy": entropy, "temperature": find()}
        write_atomically(path, json.dumps(known, indent=1) + "\n")
    return float(known[name]["temperature"])


def draw_files(
    files: Files, checkpoint: str, place: Path, draw: Draw, temperature: float, seed: int
) -> dict[str, float]:
    """Draws a set of images, or goes on with it; its metrics, where they can be had without a detector."""
    argv = [f"--ckpt={checkpoint}", f"--out={place}", *arguments(files, draw, temperature, seed)]
    sample.run(sample.parse(argv))
    if not files.reference:
        return {}
    file = files.inception or None
    receipt = measure(
        Settings(
            str(place), files.reference, features=files.features, inception=file, metrics=_METRICS
        )
    )
    gone = partial_of(place)  # first by name: half of a set is no set to go on with
    shutil.rmtree(gone, ignore_errors=True)
    shutil.rmtree(place.rename(gone))
    return {name: one["value"] for name, one in receipt["metrics"].items()}


def add_detected(
    files: Files | None, workdir: Path, who: str, what: str, sets: Sequence[dict[str, float]]
) -> None:
    """Adds GenEval's scores to sets beside whose images a detector has written what it found.

    Raises:
      GenevalError: that file cannot be used, or leaves images out.
    """
    if files is None or not files.prompts:
        return
    for seed, one in enumerate(sets):
        found = folder_of(workdir, who, what, seed) / DETECTIONS
        if not found.is_file():
            continue
        prompts = read_prompts(Path(files.prompts))
        images = judge_file(found, prompts, Rules())
        if len(prompts) == PROMPTS:
            check_complete(images, prompts)
        tasks = score(images, prompts).tasks
        one |= {f"geneval/{task}": estimate.value for task, estimate in tasks.items()}


def undetected(workdir: Path) -> list[Path]:
    """Folders of GenEval's images that no detector has looked at."""
    places = sorted((workdir / "images").glob("*/*"))
    return [place for place in places if not (place / DETECTIONS).is_file()]
