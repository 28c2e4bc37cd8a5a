"""GenEval's table from verdicts: six tasks, their mean, intervals, and the difference of two runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

from vapi_jax.evaluation.geneval_files import PROMPTS, SAMPLES, Image
from vapi_jax.rewards.geneval import TASKS, GenevalError, Prompt

RESAMPLES = 10_000
OVERALL = "overall"


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A score or a difference of scores, with the ends of its 95 % interval."""

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Scores:
    """What is said of a set of images.

    Attributes:
      tasks: those that have images, and `OVERALL`, the plain mean of them.
      images, prompts: how many.
      images_correct: share of images that are right.
      prompts_solved: share of prompts with a right image.
    """

    tasks: dict[str, Estimate]
    images: int
    prompts: int
    images_correct: float
    prompts_solved: float


def check_complete(images: Sequence[Image], prompts: Sequence[Prompt]) -> None:
    """A part of the set gives a plausible score that means something else.

    Raises:
      GenevalError: there are not 553 prompts, or one has not four images.
    """
    counts = np.bincount([image.prompt for image in images], minlength=len(prompts))
    short = np.flatnonzero(counts != SAMPLES)
    if len(prompts) == PROMPTS and not len(short):
        return
    where = f"; prompt {short[0]} has {counts[short[0]]}" if len(short) else ""
    raise GenevalError(
        f"{len(images)} images of {len(prompts)} prompts, {len(short)} of them without {SAMPLES} images"
        f"{where}. GenEval has {PROMPTS} prompts and {SAMPLES} images of each, and a part of it is not "
        "comparable; --allow_incomplete scores it all the same"
    )


def _groups(images: Sequence[Image], prompts: Sequence[Prompt]) -> dict[str, np.ndarray]:
    """Task -> [prompts, 3]: number of the prompt, right images, images."""
    counts = np.zeros((len(prompts), 2), np.int64)
    for image in images:
        counts[image.prompt] += int(image.verdict.correct), 1
    rows = {task: [i for i, p in enumerate(prompts) if p.tag == task] for task in TASKS}
    tables = {
        task: np.column_stack([rows[task], counts[rows[task]]]) for task in TASKS if rows[task]
    }
    return {task: table[table[:, 2] > 0] for task, table in tables.items() if table[:, 2].any()}


def _estimate(
    tasks: Sequence[tuple[str, int]],
    score: Callable[[str, np.ndarray], Float[np.ndarray, " R"]],
    seed: int,
    resamples: int,
) -> dict[str, Estimate]:
    """Scores with bootstrap intervals over prompts, each task's drawn by themselves.

    Args:
      tasks: names and how many prompts each has.
      score: (task, prompts [R, n]) -> the task's score on each of R choices of its n prompts.
      seed: of the resampling.
      resamples: how many choices.
    """
    rng, found, drawn = np.random.default_rng(seed), {}, {}
    for task, count in tasks:
        found[task] = score(task, np.arange(count)[None])[0]
        drawn[task] = score(task, rng.integers(count, size=(resamples, count)))
    found[OVERALL] = np.mean(list(found.values()))
    drawn[OVERALL] = np.mean(list(drawn.values()), axis=0)
    ends = {name: np.quantile(values, [0.025, 0.975]) for name, values in drawn.items()}
    return {name: Estimate(float(found[name]), *map(float, ends[name])) for name in found}


def score(
    images: Sequence[Image], prompts: Sequence[Prompt], seed: int = 0, resamples: int = RESAMPLES
) -> Scores:
    """The table of a set of images."""
    groups = _groups(images, prompts)

    def mean(task: str, chosen: np.ndarray) -> np.ndarray:
        _, right, count = groups[task].T
        return right[chosen].sum(axis=1) / count[chosen].sum(axis=1)

    sizes = [(task, len(table)) for task, table in groups.items()]
    whole = np.concatenate(list(groups.values()))
    return Scores(
        _estimate(sizes, mean, seed, resamples),
        len(images),
        len(whole),
        float(whole[:, 1].sum() / whole[:, 2].sum()),
        float((whole[:, 1] > 0).mean()),
    )


def difference(
    images: Sequence[Image],
    others: Sequence[Image],
    prompts: Sequence[Prompt],
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> dict[str, Estimate]:
    """Scores of `images` less those of `others`, paired by prompt.

    Raises:
      GenevalError: one set has images of a prompt that the other has none of.
    """
    ours, theirs = _groups(images, prompts), _groups(others, prompts)
    for task in TASKS:
        numbers = [
            groups[task][:, 0].tolist() if task in groups else [] for groups in (ours, theirs)
        ]
        if numbers[0] != numbers[1]:
            odd = min(set(numbers[0]) ^ set(numbers[1]))
            raise GenevalError(f"prompt {odd} has images in one of the two sets only: no pairs")

    def gap(task: str, chosen: np.ndarray) -> np.ndarray:
        scores = []
        for _, right, count in (ours[task].T, theirs[task].T):
            scores.append(right[chosen].sum(axis=1) / count[chosen].sum(axis=1))
        return scores[0] - scores[1]

    return _estimate([(task, len(table)) for task, table in ours.items()], gap, seed, resamples)
