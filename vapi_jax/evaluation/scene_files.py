"""Drawn scenes in files: a folder of images in, one line of detections an image out."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from vapi_jax.common.files import write_atomically
from vapi_jax.common.image_files import kind_of_file
from vapi_jax.data.images import PILLOW_PIXELS, UnreadableImage, read_rgb
from vapi_jax.data.scenes.drawing import SHAPES
from vapi_jax.data.scenes.source import LEAST_SIDE
from vapi_jax.evaluation.geneval_files import lines_of, read_prompts
from vapi_jax.generation.prompts import LIST
from vapi_jax.rewards.geneval import GenevalError, Prompt
from vapi_jax.rewards.scenes import detect

_PLACE = re.compile(r"([0-9]{1,9})/samples/[0-9]{1,9}\.png")


def read_scene_prompts(path: Path) -> list[Prompt]:
    """The prompts of metadata of drawn scenes.

    Raises:
      GenevalError: they cannot be read, or ask for something that is not drawn.
    """
    prompts = read_prompts(path)
    for number, prompt in enumerate(prompts):
        for clause in (*prompt.include, *prompt.exclude):
            if clause.name not in SHAPES:
                raise GenevalError(
                    f"{path}: prompt {number} asks for {clause.name!r:.40}, and scenes are of "
                    f"{', '.join(SHAPES)}: give the metadata of scenes"
                )
    return prompts


def detect_folder(
    images: Path, out: Path, prompts: Sequence[Prompt], allow_incomplete: bool = False
) -> None:
    """Writes what is in the images of a folder in GenEval's layout, PROMPT/samples/SAMPLE.png.

    Args:
      images: the folder.
      out: what `vapi_jax.evaluation.geneval_files.judge_file` reads.
      prompts: of the metadata.
      allow_incomplete: whether prompts may have different numbers of images, or none.

    Raises:
      GenevalError: there are no images, some are missing, one cannot be read or is no scene, or they were
        drawn for other prompts.
    """
    paths = _images_in(images)
    counts = Counter(int(path.parts[-3]) for path in paths)
    if max(counts) >= len(prompts):
        raise GenevalError(
            f"{images} has images of prompt {max(counts)}, and the metadata {len(prompts)} prompts: they are "
            "of two sets"
        )
    _check_drawn_for(images, {int(p.parts[-3]): p.parents[1] for p in paths}, prompts)
    uneven = [n for n in range(len(prompts)) if counts[n] != max(counts.values())]
    if uneven and not allow_incomplete:
        raise GenevalError(
            f"{images}: prompt {uneven[0]} has {counts[uneven[0]]} images, others "
            f"{max(counts.values())}; --allow_incomplete scores them all the same"
        )
    lines = []
    for path in paths:
        found = {
            name: {"boxes": objects.boxes.tolist(), "colors": objects.colors}
            for name, objects in detect(_pixels(path)).items()
        }
        lines.append({"filename": path.relative_to(images).as_posix(), "detections": found})
    write_atomically(out, "".join(json.dumps(line) + "\n" for line in lines))


def _images_in(folder: Path) -> list[Path]:
    paths = [path for path in sorted(folder.glob("*/samples/*")) if not kind_of_file(path.name)]
    if not paths:
        raise GenevalError(f"{folder} has no images such as 00000/samples/0000.png")
    for path in paths:
        if _PLACE.fullmatch(path.relative_to(folder).as_posix()) is None:
            raise GenevalError(
                f"{path} is no image such as 00000/samples/0000.png: take it away, or rename it"
            )
    return paths


def _check_drawn_for(images: Path, folders: Mapping[int, Path], prompts: Sequence[Prompt]) -> None:
    """Compares prompts with what `vapi_jax.sample` has left beside the images, where it has."""
    listed = images / LIST
    told = [value.get("prompt") for _, value in lines_of(listed)] if listed.is_file() else []
    for number, folder in folders.items():
        asked, own = prompts[number].text, folder / "metadata.jsonl"
        found = [
            *told[number : number + 1],
            *([read_prompts(own)[0].text] if own.is_file() else []),
        ]
        if other := [text for text in found if text != asked]:
            raise GenevalError(
                f"{images}: the images of prompt {number} were drawn for {other[0]!r:.80}, and "
                f"--metadata asks for {asked!r:.80}: give the metadata that they were drawn for"
            )


def _pixels(path: Path) -> np.ndarray:
    try:
        pixels = np.asarray(read_rgb(path, PILLOW_PIXELS))
    except UnreadableImage as error:
        raise GenevalError(f"{path}: {error}") from error
    height, width = pixels.shape[:2]
    if height != width or height < LEAST_SIDE:
        raise GenevalError(
            f"{path}: {width}x{height} pixels; scenes are square, of {LEAST_SIDE} pixels or more"
        )
    return pixels
