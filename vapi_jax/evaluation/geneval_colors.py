"""GenEval's colours: what a CLIP says of each detected object, from its pixels and its mask.

The published classifier is OpenAI's ViT-L/14. An object is cut out by its box, with what its mask leaves out
painted grey (153). The cut is fitted as CLIP wants it: shorter side to 224, bicubic as Pillow has it, middle.
Of the ten colours that one wins whose prompts are nearest: the mean of three, each of length 1.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image

from vapi_jax.data.images import PILLOW_PIXELS, UnreadableImage, read_rgb
from vapi_jax.evaluation.geneval_files import lines_of, parse_objects, place_of
from vapi_jax.models import clip
from vapi_jax.rewards.clip import CLIPScore
from vapi_jax.rewards.geneval import COLORS, GenevalError, Prompt

TEMPLATES = (
    "a photo of a {color} {name}",
    "a photo of a {color}-colored {name}",
    "a photo of a {color} object",
)
GREY = (153, 153, 153)
_AT_ONCE = 16


class ColorClassifier:
    """Names of colours for pictures of objects.

    Args:
      reward: a CLIP with its text tower and tokenizer (`prompts=""`).
    """

    def __init__(self, reward: CLIPScore):
        self._reward, self._config = reward, reward.config
        self._weights = jax.device_put(reward.load())

        def see(weights: Any, pixels: Any) -> Any:
            seen = clip.preprocess(pixels, self._config.image)
            return clip.unit(clip.embed_images(weights, seen, self._config))

        def read(weights: Any, ids: Any) -> Any:
            each = clip.unit(clip.embed_texts(weights, ids, self._config))
            return clip.unit(each.reshape(len(COLORS), len(TEMPLATES), -1).mean(axis=1))

        self._see, self._read = jax.jit(see), jax.jit(read)
        self._texts = functools.cache(self._texts_of)

    @property
    def side(self) -> int:
        """Of the pictures, in pixels."""
        return self._config.image

    def _texts_of(self, name: str) -> Float[np.ndarray, "C E"]:
        prompts = [t.format(color=color, name=name) for color in COLORS for t in TEMPLATES]
        return np.asarray(self._read(self._weights, self._reward.words()(prompts)))

    def __call__(self, pictures: UInt8[np.ndarray, "N S S 3"], name: str) -> list[str]:
        """The colour of each picture of a thing of this name."""
        found: list[str] = []
        for start in range(0, len(pictures), _AT_ONCE):
            part = pictures[start : start + _AT_ONCE]
            fill = [(0, _AT_ONCE - len(part)), *[(0, 0)] * 3]
            seen = np.asarray(self._see(self._weights, np.pad(part, fill)))[: len(part)]
            found += [COLORS[i] for i in (seen @ self._texts(name).T).argmax(axis=1)]
        return found


def cut_out(
    image: Image.Image, box: Sequence[float], mask: Bool[np.ndarray, "H W"] | None, side: int
) -> UInt8[np.ndarray, "S S 3"]:
    """A detected object as the classifier takes it.

    Args:
      image: the whole picture.
      box: x0, y0, x1, y1.
      mask: of the object; None leaves what is around it.
      side: of the result.
    """
    if mask is not None:
        grey = Image.new("RGB", image.size, GREY)
        image = Image.composite(image, grey, Image.fromarray(mask))
    x0, y0, x1, y1 = (round(x) for x in box[:4])
    crop = image.crop((x0, y0, max(x1, x0 + 1), max(y1, y0 + 1)))
    short = min(crop.size)
    size = int(side * crop.width / short), int(side * crop.height / short)
    if max(size) > PILLOW_PIXELS // side:
        raise GenevalError(f"a box of {crop.width}x{crop.height} pixels is too thin")
    crop = crop.resize(size, Image.Resampling.BICUBIC)
    left, top = (round((length - side) / 2) for length in size)
    return np.asarray(crop.crop((left, top, left + side, top + side)))


def decode_mask(value: Any, height: int, width: int) -> Bool[np.ndarray, "H W"]:
    """A mask in COCO's run lengths, {"size": [H, W], "counts": a list, or COCO's text of it}.

    Runs go down the columns, and the first is outside.

    Raises:
      GenevalError: it is none, or is of another image.
    """
    try:
        size, counts = value["size"], value["counts"]
        runs = _runs(counts) if isinstance(counts, str) else [int(n) for n in counts]
    except (TypeError, KeyError, ValueError, IndexError) as error:
        raise GenevalError(f"a mask is {{size, counts}} as COCO writes it: {error!r}") from error
    if list(size) != [height, width] or min(runs, default=-1) < 0 or sum(runs) != height * width:
        raise GenevalError(
            f"a mask of size {str(size)[:40]} and {sum(runs)} pixels, and the image has {height}x{width}"
        )
    flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return flat.reshape(width, height).T.copy()


def _runs(text: str) -> list[int]:
    """COCO's text: six bits a letter from "0" on, five of them a number's; from the fourth, differences."""
    runs: list[int] = []
    place = 0
    while place < len(text):
        number, shift, more = 0, 0, True
        while more:
            bits = ord(text[place]) - 48
            if not 0 <= bits < 64 or shift > 40:
                raise ValueError(f"letter {text[place]!r} at {place}")
            number |= (bits & 31) << shift
            more, shift, place = bool(bits & 32), shift + 5, place + 1
        if bits & 16:
            number -= 1 << shift
        runs.append(number + (runs[-2] if len(runs) > 2 else 0))
    return runs


def color_detections(
    detections: Path,
    images: Path,
    prompts: Sequence[Prompt],
    classifier: ColorClassifier,
    background: str = "grey",
) -> Iterator[str]:
    """A file's detections, with a colour for each box of a class of which the prompt wants one.

    Args:
      detections: {"filename", "detections": {class: {"boxes", "masks"}}}, see `decode_mask`.
      images: the folder that file names begin in.
      prompts: of the metadata.
      classifier: says which.
      background: "grey" paints over what masks leave out; "original" needs no masks.

    Raises:
      GenevalError: a line, an image or a mask that is not as wanted.
    """
    for where, value in lines_of(detections):
        name, number, _ = place_of(value, where)
        if number >= len(prompts):
            raise GenevalError(f"{where}: prompt {number}, but the metadata have {len(prompts)}")
        asked = {clause.name for clause in prompts[number].include if clause.color}
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise GenevalError(f"{where}: {name!r:.80} leads out of {images}")
        try:
            found = _colored(value.get("detections"), asked, images / name, classifier, background)
        except GenevalError as error:
            raise GenevalError(f"{where}: {error}") from error
        yield json.dumps({"filename": name, "detections": found}) + "\n"


def _colored(
    detections: Any, asked: set[str], path: Path, classifier: ColorClassifier, background: str
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    image: Image.Image | None = None
    for name, objects in parse_objects(detections).items():
        found[name] = {"boxes": objects.boxes.tolist()}
        if name not in asked or not len(objects):
            continue
        if image is None:
            try:
                image = read_rgb(path, PILLOW_PIXELS)
            except UnreadableImage as error:
                raise GenevalError(f"{path}: {error}") from error
        masks = _masks_of(detections[name], len(objects), image, name, background)
        cuts = [
            cut_out(image, box, mask, classifier.side)
            for box, mask in zip(objects.boxes.tolist(), masks, strict=True)
        ]
        found[name]["colors"] = classifier(np.stack(cuts), name)
    return found


def _masks_of(
    value: Any, count: int, image: Image.Image, name: str, background: str
) -> Sequence[np.ndarray | None]:
    if background == "original":
        return [None] * count
    masks = value.get("masks") if isinstance(value, Mapping) else None
    if not isinstance(masks, list) or len(masks) != count:
        raise GenevalError(
            f"{name}: {count} boxes and no list of as many masks; --background=original does without, and is "
            "not the published protocol"
        )
    return [decode_mask(mask, image.height, image.width) for mask in masks]
