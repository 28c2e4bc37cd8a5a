"""Detections of drawn scenes in files: a folder of images in, one line an image out."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np

from vapi_jax.common.files import write_atomically
from vapi_jax.data.images import PILLOW_PIXELS, UnreadableImage, read_rgb
from vapi_jax.rewards.geneval import GenevalError
from vapi_jax.rewards.scenes import detect


def detect_folder(images: Path, out: Path, prompts: int, allow_incomplete: bool = False) -> None:
    """Writes what is in the images of a folder in GenEval's layout, PROMPT/samples/SAMPLE.png.

    Args:
      images: the folder.
      out: what `vapi_jax.evaluation.geneval_files.judge_file` reads.
      prompts: how many the metadata have.
      allow_incomplete: whether prompts may have different numbers of images, or none.

    Raises:
      GenevalError: there are no images, some are missing, or one cannot be read.
    """
    paths = sorted(images.glob("[0-9]*/samples/[0-9]*.png"))
    if not paths:
        raise GenevalError(f"{images} has no images such as 00000/samples/0000.png")
    counts = Counter(int(path.parts[-3]) for path in paths)
    uneven = [n for n in range(prompts) if counts[n] != max(counts.values())]
    if uneven and not allow_incomplete:
        raise GenevalError(
            f"{images}: prompt {uneven[0]} has {counts[uneven[0]]} images, others "
            f"{max(counts.values())}; --allow_incomplete scores them all the same"
        )
    lines = []
    for path in paths:
        try:
            pixels = np.asarray(read_rgb(path, PILLOW_PIXELS))
        except UnreadableImage as error:
            raise GenevalError(f"{path}: {error}") from error
        found = {
            name: {"boxes": objects.boxes.tolist(), "colors": objects.colors}
            for name, objects in detect(pixels).items()
        }
        lines.append({"filename": path.relative_to(images).as_posix(), "detections": found})
    write_atomically(out, "".join(json.dumps(line) + "\n" for line in lines))
