"""Rewards by CLIP and what is made of it: how well a picture fits its prompt, or how people liked its like.

    clip        cos(image, prompt)                              any CLIP
    hpsv2       cos(image, prompt)                              HPSv2 or v2.1: the file decides
    pickscore   exp(logit_scale) cos(image, prompt)             PickScore v1
    aesthetic   w . image / |image| + b                         CLIP L/14 and the LAION predictor's head

Samples are rounded to 8 bits first: a score in training is that of the picture that would be saved.
Which resize and which crop belongs to every number: docs/rewards.md.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vapi_jax.common.digests import digest_of
from vapi_jax.common.options import Count, Dtype
from vapi_jax.common.paths import PathText
from vapi_jax.models import clip
from vapi_jax.models.classes import ClassesError, read_class_list
from vapi_jax.models.clip_files import CLIPTokenizer, open_clip
from vapi_jax.rewards.prompts import texts_of
from vapi_jax.rewards.reward import Batch, Reward, Rewards
from vapi_jax.weights.names import WeightsError, check_finite
from vapi_jax.weights.tensors import open_tensors

IMAGENET = "imagenet"
"""The list of ImageNet's classes in words, for `prompts`."""

_TEXTS = 64  # at once

Fit = Literal["auto", "crop", "crop_floor", "pad"]
Resize = Literal["pillow", "torch_antialias", "torch"]


@dataclasses.dataclass(frozen=True)
class _Images(Reward):
    """What all have in common: an image tower and how pixels come to it.

    Attributes:
      weights: a folder of Hugging Face, or a file with transformers' or open_clip's names.
      activation: of its blocks; "auto": as the configuration beside the weights says.
      fit, resize: see `vapi_jax.models.clip.preprocess`; "auto" crops as transformers does where the
        weights have its names, and as torchvision does otherwise.
      dtype: of weights and arithmetic.
      chunk: images at once.
    """

    wants_image: ClassVar[bool] = False
    differentiable: ClassVar[bool] = False

    width: ClassVar[int] = 16  # of an image's tokens, a channel and pixel: L/14 has 5, H/14 6.5

    weights: PathText = ""
    activation: Literal["auto", "quick_gelu", "gelu"] = "auto"
    fit: Fit = "auto"
    resize: Resize = "pillow"
    dtype: Dtype = "bfloat16"
    chunk: Count = 64

    def problems(self, side: int) -> list[str]:
        lines = super().problems(side)
        if not self.weights:
            lines.append("weights='': name a folder or a file of a CLIP")
        return lines

    @property
    def config(self) -> clip.CLIPConfig:
        """Sizes of the network.

        Raises:
          WeightsError: see `vapi_jax.models.clip_files.open_clip`.
        """
        return _looked_at(self.weights, self.activation)[0]

    def image_shapes(self) -> dict[str, Any]:
        """Of the image tower."""
        return {"vision": clip.shapes(self.config, jnp.dtype(self.dtype))["vision"]}

    def embed(self, weights: Any, pixels: Float[Array, "B G H W 3"]) -> Float[Array, "B G E"]:
        """Embeddings of length 1."""
        _, names = _looked_at(self.weights, self.activation)
        fit = self.fit
        if fit == "auto":
            fit = "crop_floor" if names == "transformers" else "crop"

        def some(images: Float[Array, "N H W 3"]) -> Float[Array, "N E"]:
            seen = clip.preprocess(images, self.config.image, fit, self.resize)
            return clip.embed_images(weights, seen, self.config)

        flat = pixels.reshape(-1, *pixels.shape[2:])
        whole = jnp.floor(jnp.clip(127.5 * flat + 128.0, 0.0, 255.0))
        if len(flat) <= self.chunk:
            found = some(whole)
        else:
            one = lambda image: some(image[None])[0]  # noqa: E731
            found = jax.lax.map(one, whole, batch_size=self.chunk)
        return clip.unit(found).reshape(*pixels.shape[:2], -1)

    def describe(self) -> dict[str, Any]:
        """What a score depends on, for the record."""
        with open_clip(Path(self.weights), self.activation) as file:
            digests = {path.name: digest_of(path) for path in file.paths}
            fit = self.fit
            if fit == "auto":
                fit = "crop_floor" if file.names == "transformers" else "crop"
            network = dataclasses.asdict(file.config)
        return {
            "weights": digests,
            "network": network,
            "fit": fit,
            "resize": f"bicubic, {self.resize}",
            "dtype": self.dtype,
        }


@dataclasses.dataclass(frozen=True)
class CLIPScore(_Images):
    """cos(image, prompt), of any CLIP.

    Attributes:
      tokenizer_path: folder or file of the tokenizer; "" for that beside the weights.
      prompts: what the labels of a class-conditional run are called: a list for
        `vapi_jax.models.classes.read_class_list`, or "imagenet" for its 1000 classes in WordNet's words; ""
        where the data bring captions.
      template: the prompt of a class, {} for its name.
    """

    tokenizer_path: PathText = ""
    prompts: PathText = ""
    template: str = "a photo of {}"

    def problems(self, side: int) -> list[str]:
        lines = super().problems(side)
        if "{}" not in self.template:
            lines.append(f"template={self.template!r}: wants {{}} in the place of the class's name")
        return lines

    def shapes(self) -> Any:
        own = clip.shapes(self.config, jnp.dtype(self.dtype))
        found = {**self.image_shapes(), "logit_scale": own["logit_scale"]}
        if not self.prompts:
            return {**found, "text": own["text"]}
        table = (len(self.class_prompts()), self.config.embed)
        return {**found, "prompts": jax.ShapeDtypeStruct(table, jnp.float32)}

    def load(self) -> Any:
        dtype = jnp.dtype(self.dtype)
        with open_clip(Path(self.weights), self.activation) as file:
            found = {**file.read("vision", dtype), **file.read("logit_scale", dtype)}
            text = file.read("text", dtype)
        if not self.prompts:
            return {**found, **text}
        return {**found, "prompts": self.embed_prompts(text, self.class_prompts())}

    def computed(self) -> dict[str, Any]:
        return {"prompts": [self.class_prompts(), self.describe()]} if self.prompts else {}

    def origin(self) -> tuple[str, str] | None:
        with open_clip(Path(self.weights), self.activation) as file:
            file.check()
        self.words()
        prompts = f"{len(self.class_prompts())} prompts" if self.prompts else "captions"
        return self.weights, f"{in_words(self.config)}; {prompts}; no digest known"

    def words(self) -> CLIPTokenizer:
        """The tokenizer."""
        return _tokenizer(self.tokenizer_path or self.weights, self.config)

    def class_prompts(self) -> tuple[str, ...]:
        """The prompt of every label."""
        return class_prompts(self.prompts, self.template)

    def embed_prompts(self, text: Any, prompts: Sequence[str]) -> Float[np.ndarray, "N E"]:
        """Embeddings of prompts, of length 1, on this process's first device."""
        ids, config = self.words()(prompts), self.config
        run = jax.jit(lambda text, ids: clip.unit(clip.embed_texts(text, ids, config)))
        parts = []
        for start in range(0, len(ids), _TEXTS):
            part = ids[start : start + _TEXTS]
            padded = np.pad(part, ((0, _TEXTS - len(part)), (0, 0)), mode="edge")
            parts.append(np.asarray(run(text, padded))[: len(part)])
        return np.concatenate(parts)

    def prepare(self, raw: Any) -> Int[np.ndarray, "B L"] | None:
        return None if self.prompts else self.words()(texts_of(raw))

    def example(self, rows: int) -> Any:
        if self.prompts:
            return None
        return jax.ShapeDtypeStruct((rows, self.config.context), jnp.int32)

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "tokenizer": self.words().describe()}

    def __call__(self, weights: Any, pixels: Float[Array, "B G H W 3"], batch: Batch) -> Rewards:
        images = self.embed(weights, pixels)
        if not self.prompts:
            if "prompt" not in batch:
                raise ValueError(
                    "a reward by prompts has none: the data bring labels, so say what they are called "
                    "(prompts='imagenet', or a file with a name a line)"
                )
            texts = clip.unit(clip.embed_texts(weights, batch["prompt"], self.config))
        else:
            # A label beyond the list is worth NaN, which stops a run, and not the last one's reward.
            texts = jnp.take(
                weights["prompts"], batch["condition"], axis=0, mode="fill", fill_value=jnp.nan
            )
        return self.factor(weights) * jnp.sum(images * texts[:, None], axis=-1)

    def factor(self, weights: Any) -> Array | float:
        """Of the cosine."""
        del weights
        return 1.0


@dataclasses.dataclass(frozen=True)
class HPSv2(CLIPScore):
    """Human Preference Score v2 (arXiv 2306.09341): cos(image, prompt) by a fine-tuned ViT-H/14.

    v2 and v2.1 differ in their files alone, and their scales must not be mixed. Images are fitted whole into
    the square, zeros around them, and resized as tensors: by the library's version with or without
    antialias, so say which.
    """

    fit: Fit = "pad"
    resize: Resize = "torch_antialias"


@dataclasses.dataclass(frozen=True)
class PickScore(CLIPScore):
    """PickScore v1 (arXiv 2305.01569): exp(logit_scale) cos(image, prompt) by a tuned ViT-H/14; about 20."""

    def factor(self, weights: Any) -> Array | float:
        return jnp.exp(weights["logit_scale"])


@dataclasses.dataclass(frozen=True)
class Aesthetic(_Images):
    """LAION's aesthetic predictor: a linear function of CLIP L/14's embedding of the image; about 1 to 10.

    Its five layers have no activation between them, so they are one.

    Attributes:
      head: sac+logos+ava1-l14-linearMSE.pth, or another of its names.
    """

    head: PathText = ""

    def problems(self, side: int) -> list[str]:
        lines = super().problems(side)
        if not self.head:
            lines.append("head='': name the file of the predictor's layers")
        return lines

    def shapes(self) -> Any:
        head = {"w": (self.config.embed,), "b": ()}
        found = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in head.items()}
        return {**self.image_shapes(), "head": found}

    def load(self) -> Any:
        with open_clip(Path(self.weights), self.activation) as file:
            vision = file.read("vision", jnp.dtype(self.dtype))
        return {**vision, "head": self.folded()}

    def folded(self) -> dict[str, np.ndarray]:
        """The head as one function, multiplied out in float64.

        Raises:
          WeightsError: it is another file, does not fit the network, or is not finite.
        """
        with open_tensors(self.head) as file:
            found = {n: np.asarray(t.read(), np.float64) for n, t in file.tensors.items()}
        for name, array in found.items():
            check_finite(array, f"{name} in {self.head}")
        try:
            numbers = sorted({int(n.split(".")[1]) for n in found if n.startswith("layers.")})
            w, b = np.eye(self.config.embed), np.zeros(self.config.embed)
            for number in numbers:
                matrix = found.pop(f"layers.{number}.weight")
                w, b = matrix @ w, matrix @ b + found.pop(f"layers.{number}.bias")
            if found or w.shape != (1, self.config.embed):
                raise ValueError(f"it gives {w.shape[0]} numbers, and {sorted(found)} are left")
        except (KeyError, ValueError) as error:
            raise WeightsError(
                f"{self.head} is no aesthetic predictor on {self.config.embed} features "
                f"(layers.N.weight and bias, one number in the end): {error}"
            ) from error
        return {"w": w[0].astype(np.float32), "b": b[0].astype(np.float32)}

    def origin(self) -> tuple[str, str] | None:
        with open_clip(Path(self.weights), self.activation) as file:
            file.check()
        self.folded()
        return self.weights, f"{in_words(self.config)}; no digest known"

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "head": {Path(self.head).name: digest_of(self.head)}}

    def __call__(self, weights: Any, pixels: Float[Array, "B G H W 3"], batch: Batch) -> Rewards:
        head = weights["head"]
        return jnp.sum(self.embed(weights, pixels) * head["w"], axis=-1) + head["b"]


def in_words(config: clip.CLIPConfig) -> str:
    """ "ViT 24 x 1024 / 14, 224 px, quick_gelu" """
    tower = config.vision
    return f"ViT {tower.layers} x {tower.width} / {config.patch}, {config.image} px, {config.activation}"


def class_prompts(names: str, template: str) -> tuple[str, ...]:
    """The prompt of every label: a list of classes, each name in the place of {} in a template.

    Raises:
      ClassesError: the list cannot be read, or names what is no text.
    """
    which = "imagenet_words" if names == IMAGENET else names
    found = read_class_list(which).names
    try:
        "".join(found).encode()
    except UnicodeEncodeError as error:  # names of folders may be any bytes; prompts are text
        raise ClassesError(f"{names} is no text in UTF-8, which prompts have to be") from error
    return tuple(template.replace("{}", name) for name in found)


def _looked_at(weights: str, activation: str) -> tuple[clip.CLIPConfig, clip.Names]:
    path = Path(weights)
    return _facts(weights, activation, path.stat().st_mtime_ns if path.exists() else 0)


@functools.lru_cache(maxsize=16)
def _facts(weights: str, activation: str, changed: int) -> tuple[clip.CLIPConfig, clip.Names]:
    del changed
    with open_clip(Path(weights), activation) as file:
        return file.config, file.names


@functools.lru_cache(maxsize=4)
def _tokenizer(path: str, config: clip.CLIPConfig) -> CLIPTokenizer:
    place = Path(path)
    # A file of weights by itself: the tokenizer is looked for beside it.
    if place.is_file() and not place.name.endswith((".json", ".gz")):
        place = place.parent
    return CLIPTokenizer(place, config.context, config.vocab)
