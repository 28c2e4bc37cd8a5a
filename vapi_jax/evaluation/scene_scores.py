"""GenEval's six scores of samples of drawn scenes, for the table at the end of a run.

Prompts are the captions of held-out scenes, and what is found in a sample of a caption is held against
the scene's line of metadata. Several scenes may be told alike; their samples are those of one prompt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from vapi_jax.data.pipeline import make_source
from vapi_jax.data.sources import Source
from vapi_jax.evaluation.geneval_files import Image
from vapi_jax.evaluation.geneval_scores import Estimate, difference, score
from vapi_jax.methods.config import TrainConfig
from vapi_jax.rewards import geneval
from vapi_jax.rewards.geneval import Prompt, parse_prompt
from vapi_jax.rewards.scenes import detect

Row = dict[str, dict[str, float]]
"""Task, or "overall" -> {"value", "low", "high"}, the ends of the 95 % interval over prompts."""


@dataclasses.dataclass(frozen=True)
class SceneJudge:
    """Judges images by the scenes whose captions they are samples of.

    Attributes:
      source: of the held-out scenes.
      count: how many of them.
    """

    source: Source
    count: int

    @cached_property
    def _prompts(self) -> tuple[list[Prompt], list[int]]:
        """The different prompts, and which of them each scene has."""
        places: dict[str, int] = {}
        prompts: list[Prompt] = []
        rows = []
        for index in range(self.count):
            line = self.source.asked(index)
            assert line is not None, "asked before"
            if line["prompt"] not in places:
                places[line["prompt"]] = len(prompts)
                prompts.append(parse_prompt(line, self.source.name(index)))
            rows.append(places[line["prompt"]])
        return prompts, rows

    def judge(self, samples: range, images: UInt8[np.ndarray, "B H W 3"], turn: int) -> list[Image]:
        """Verdicts of samples of these numbers; `turn` tells several sets of them apart."""
        prompts, rows = self._prompts
        found = []
        for number, image in zip(samples, images, strict=True):
            row = rows[number % self.count]
            verdict = geneval.judge(prompts[row], detect(image))
            found.append(Image(row, turn * self.count + number, "", verdict))
        return found

    def drawn(self, batch: int) -> Iterable[tuple[range, Float[np.ndarray, "B H W 3"]]]:
        """The scenes themselves in [-1, 1], with their numbers: what a perfect generator would draw."""
        rng = np.random.default_rng(0)
        for start in range(0, self.count, batch):
            numbers = range(start, min(start + batch, self.count))
            yield numbers, np.stack([self.source.sample(i, rng)["image"] for i in numbers])

    def scores(self, images: Sequence[Image]) -> Row:
        """The six scores and their mean."""
        return _row(score(images, self._prompts[0]).tasks)

    def change(self, images: Sequence[Image], others: Sequence[Image]) -> Row:
        """Scores of `images` less those of `others`, paired by prompt."""
        return _row(difference(images, others, self._prompts[0]))


def _row(found: dict[str, Estimate]) -> Row:
    return {task: dataclasses.asdict(estimate) for task, estimate in found.items()}


def scene_judge(config: TrainConfig) -> SceneJudge | None:
    """The judge for a run's held-out scenes; None where its data are no drawn scenes."""
    source: Any = make_source(config.data, config.eval.split)
    if source.asked(0) is None:
        return None
    return SceneJudge(source, min(config.eval.samples, len(source)))
