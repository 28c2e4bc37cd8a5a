"""Drawn scenes with captions, `data.name="scenes"`: nothing to download, as many as wanted."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from vapi_jax.common.options import Count, Errors, Natural, build
from vapi_jax.data.config import SPLITS, DataConfig, DataError
from vapi_jax.data.scenes.drawing import draw
from vapi_jax.data.scenes.grammar import TASKS, Scene, make
from vapi_jax.data.sources import Source

LEAST_SIDE = 32
"""Of an image; below, shapes cannot be told apart."""


@dataclasses.dataclass(frozen=True)
class Options:
    """`data.options` of scenes.

    Attributes:
        images: of each split.
        seed: of all scenes. The same seed and index give the same scene, of any image_size.
    """

    images: Count = 60_000
    seed: Natural = 0


class SceneSource(Source):
    """Scene i is of task i % 6; the condition of a sample is its caption, an `np.str_`.

    Raises:
        DataError: options that make no sense, images too small, or mirrored ones.
    """

    mixed = True
    settled = True
    class_names = ()

    @classmethod
    def read_class_names(cls, config: DataConfig) -> tuple[str, ...]:
        del config
        return ()

    def __init__(self, config: DataConfig, split: str) -> None:
        super().__init__(config, split)
        errors = Errors()
        self._asked = build(Options, config.options, "data.options.", errors)
        if config.flip:
            errors.append(
                'data.flip=True would turn "left of" around: scenes wants data.flip=False'
            )
        if config.image_size < LEAST_SIDE:
            errors.append(f"data.image_size={config.image_size}: scenes wants {LEAST_SIDE} or more")
        if errors:
            raise DataError("\n".join(errors))
        self.notes = tuple(
            f"a caption: {self.scene(i)[0].metadata['prompt']}" for i in range(len(TASKS))
        )

    def __len__(self) -> int:
        return self._asked.images

    def name(self, index: int) -> str:
        return f"scene {index}"

    def scene(self, index: int) -> tuple[Scene, np.random.Generator]:
        """A scene, and the generator that draws its picture."""
        rng = np.random.default_rng([self._asked.seed, SPLITS.index(self.split), int(index)])
        return make(TASKS[int(index) % len(TASKS)], self.split, rng), rng

    def asked(self, index: int) -> Mapping[str, Any]:
        return self.scene(index)[0].metadata

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        del rng
        scene, own = self.scene(index)
        pixels = draw(scene.things, self.config.image_size, own) / 127.5 - 1
        caption = np.str_(scene.metadata["prompt"])
        return {"image": pixels.astype(np.float32), "condition": caption}  # type: ignore[dict-item]
