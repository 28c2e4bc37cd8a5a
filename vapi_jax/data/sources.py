"""What a source of images offers.

A new source is a class in a file of its own and a line in `vapi_jax.data.config.SOURCES`. One of a user's
own needs no line: `data.name="package.module:Class"` names it, and `data.options` brings what it wants to
know.
"""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import pkgutil
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from vapi_jax.data.config import SOURCES, DataConfig, DataError


@dataclasses.dataclass(frozen=True)
class Encoder:
    """What turned images into tokens: SHA-256 of its weights, the dtype it computed in, and whether it saw
    each token's own pixels alone."""

    digest: str
    dtype: str
    patches: bool = False

    def __str__(self) -> str:
        apart = " of single patches" if self.patches else ""
        return f"the tokenizer {self.digest[:12]}{apart} in {self.dtype}"


class Source(abc.ABC):
    """One split of a data set: images by index.

    Args:
        config: which data, and how to cut them.
        split: "train", "val" or "test".

    Attributes:
        config, split: as given.
        options: `data.options` of the recipe.
        class_names: the position of a name is its number in "condition"; which label of the generator
            that is, `data.classes` decides.
        brings_tokens: whether samples have "tokens" int32 [T], and the tokenizer has nothing to do, unless
            they were made without.
        mixed: whether the first n images show as many classes as any n do. Where files or records
            are sorted by class, they do not, and an evaluation draws its images from all of them.
        settled: whether the first n images are the same whatever the seed: mixed, and nothing is drawn.
        left_out: what lies among the images and is not read, counted by kind, in words.
        notes: what else a plan should show, such as examples of captions.

    Raises:
        DataError: there is nothing to read, or not as configured.
    """

    config: DataConfig
    class_names: tuple[str, ...]
    brings_tokens: ClassVar[bool] = False
    mixed: bool = False
    settled: ClassVar[bool] = False
    left_out: str = ""
    notes: tuple[str, ...] = ()

    def __init__(self, config: DataConfig, split: str) -> None:
        self.config, self.split, self.options = config, split, config.options

    @classmethod
    def read_class_names(cls, config: DataConfig) -> tuple[str, ...]:
        """`class_names` of any split, without opening more than they need."""
        return cls(config, "train").class_names

    @classmethod
    def read_encoder(cls, config: DataConfig) -> Encoder | None:
        """What made the tokens that come with the images, where that is known."""
        del config
        return None

    @abc.abstractmethod
    def __len__(self) -> int:
        """Number of images."""

    def name(self, index: int) -> str:
        """What a message calls an image: its path, or its place in the data."""
        return f"image {index}"

    def digest(self) -> str:
        """SHA-256 of what tells whether the images are still the same, as far as can be seen without them."""
        found = hashlib.sha256()
        for index in range(len(self)):
            found.update(f"{self.name(index)}\n".encode(errors="surrogateescape"))
        return found.hexdigest()

    def asked(self, index: int) -> Mapping[str, Any] | None:
        """The line of GenEval's metadata that an image of drawn shapes satisfies; None of other images.

        With it, samples of the image's caption can be judged by `vapi_jax.rewards.scenes.detect`. Wants
        `mixed`: captions are those of the first images.
        """
        del index
        return None

    @abc.abstractmethod
    def sample(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """One image, from several threads at a time.

        Args:
            index: in [0, len).
            rng: for crops and flips; fixed by the run's seed and the sample's place in the stream.

        Returns:
            {"image": float32 [H, W, 3] in [-1, 1], "condition": int32 scalar, or a text as `np.str_`}, and
            "tokens".

        Raises:
            UnreadableImage: it cannot be decoded; another image will stand in for it.
            DataError: reading on makes no sense.
        """


def source_class(name: str) -> type[Source]:
    """The class that `data.name` means.

    Raises:
        DataError: there is none of that name, or it is no `Source`.
    """
    try:
        found = pkgutil.resolve_name(SOURCES.get(name, name))
    except (ImportError, AttributeError, ValueError) as error:
        raise DataError(
            f"data.name={name!r} cannot be imported ({error}); a source of your own is named "
            "'package.module:Class', and Python has to find the module"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Source)):
        raise DataError(f"data.name={name!r} is no class derived from vapi_jax.data.Source")
    return found
