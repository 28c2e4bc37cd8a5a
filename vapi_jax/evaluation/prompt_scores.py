"""Scores of images by a reward model, with or without their prompts, outside any training."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from vapi_jax.common.digests import sha256_file
from vapi_jax.common.errors import ExpectedError
from vapi_jax.common.files import read_text
from vapi_jax.data.images import PILLOW_PIXELS, UnreadableImage, read_rgb
from vapi_jax.evaluation.images import find_samples
from vapi_jax.evaluation.measure import locate
from vapi_jax.evaluation.receipt import environment, find_recipe, recipe_path
from vapi_jax.generation import protocols
from vapi_jax.generation.prompt_lists import read_prompts
from vapi_jax.generation.prompts import LIST
from vapi_jax.parallel.sharding import host_array, make_mesh, replicated, shard_whole
from vapi_jax.rewards.reward import Reward

RESAMPLES = 10_000
_GENEVAL = re.compile(r"(?:^|/)(\d{1,9})/samples/\d{1,9}\.\w+$")


class ScoreError(ExpectedError, ValueError):
    """Images and prompts that do not belong together, or cannot be read."""


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Images of a folder and their prompts.

    Attributes:
      folder: where they are.
      files: their paths below it, sorted.
      prompts: of each; "" where none are asked for.
      groups: which images share a prompt: a number for each.
      rule: how prompts were found.
    """

    folder: Path
    files: tuple[str, ...]
    prompts: tuple[str, ...]
    groups: tuple[int, ...]
    rule: str


def find_pictures(folder: Path, prompts: Path | None) -> Pictures:
    """The images of a folder, each with its prompt.

    In a folder of `vapi_jax.sample` grids are left out, and its recipe has to agree: all images have to be
    there, and the prompts have to be those that they were drawn for.

    Args:
      folder: searched with its sub-folders.
      prompts: None for scores without; otherwise
        - `.jsonl` whose lines have "filename", a path below the folder, and "prompt": these images;
        - HPSv2's folder of `.json` lists: image STYLE/00012.* has prompt 12 of STYLE.json;
        - any list for `read_prompts`: in GenEval's folders, 00012/samples/*, prompts go by that number;
          otherwise every prompt has the same number of images, one after the other in the order of names.

    Raises:
      ScoreError: there are no images, or not those that the prompts are for.
      PromptError, ReceiptError: the prompts or the recipe cannot be read.
    """
    place = locate(str(folder))
    if place.is_file():
        raise ScoreError(f"{place} is no folder of pictures: draw with --format both")
    try:
        found = find_samples(place).files
    except OSError as error:
        raise ScoreError(f"{folder} cannot be listed: {error.strerror}") from error
    top = folder.expanduser().absolute()
    files = tuple(Path(path).relative_to(top).as_posix() for path in found)
    if not files:
        raise ScoreError(f"{folder} holds no images")
    if prompts is not None and (named := _named(prompts)):
        known = set(files)
        if absent := [name for name in named if name not in known]:
            raise ScoreError(f"{prompts} names {absent[0]}, which {folder} does not have")
        numbers = {text: i for i, text in enumerate(dict.fromkeys(named.values()))}
        texts = tuple(named.values())
        return Pictures(
            folder, tuple(named), texts, tuple(numbers[text] for text in texts), "by file name"
        )
    recipe = find_recipe(place) or {}
    if recipe.get("count", len(files)) != len(files):
        raise ScoreError(
            f"{folder} holds {len(files)} images, and its recipe.json is of {recipe['count']}: go on with "
            "the command that drew them"
        )
    if prompts is None:
        return Pictures(folder, files, ("",) * len(files), tuple(range(len(files))), "no prompts")
    if prompts.is_dir():
        pictures = _of_styles(folder, files, prompts)
    else:
        pictures = _of_list(folder, files, prompts, recipe)
    _check_drawn_for(pictures, prompts, recipe_path(place))
    return pictures


def _of_list(
    folder: Path, files: tuple[str, ...], prompts: Path, recipe: Mapping[str, Any]
) -> Pictures:
    texts = read_prompts(prompts, "flat").texts
    places = [_GENEVAL.search(name) for name in files]
    if all(places):
        groups = tuple(int(place[1]) for place in places if place)
        rule = "by the number of the folder"
        if max(groups) >= len(texts):
            raise ScoreError(
                f"{folder} has images of prompt {max(groups)}, and {prompts} holds {len(texts)} prompts"
            )
    else:
        each, rest = divmod(len(files), len(texts))
        drawn = recipe.keys() & {"labels", "captions"}
        if drawn:
            # Labels, and captions without per_prompt, are taken in turn: each image has its own.
            each = protocols.facts(recipe).get("captions.per_prompt") or 1
            rest = len(files) - each * len(texts)
        if rest or not each:
            many = f", {each} a prompt by its recipe.json," if drawn else ""
            raise ScoreError(
                f"{folder} holds {len(files)} images{many} and {prompts} {len(texts)} prompts: no number of "
                'images a prompt. Leave others out, or say which is which: lines {"filename", "prompt"} in '
                ".jsonl"
            )
        groups = tuple(i // each for i in range(len(files)))
        rule = f"{each} images a prompt, in the order of names"
    return Pictures(folder, files, tuple(texts[i] for i in groups), groups, rule)


def _check_drawn_for(pictures: Pictures, prompts: Path, recipe: Path | None) -> None:
    """Compares prompts with what `vapi_jax.sample` has left beside the images, where it has."""
    if recipe is None or not (told := recipe.with_name(LIST)).is_file():
        return
    texts = read_prompts(told, "flat").texts
    each = len(pictures.files) // len(texts)
    drawn_for = [text for text in texts for _ in range(each)]
    asked = [text for _, text in sorted(zip(pictures.groups, pictures.prompts, strict=True))]
    for was, now in itertools.zip_longest(drawn_for, asked):
        if was != now:
            raise ScoreError(
                f"{pictures.folder}: images were drawn for {was!r:.80}, and {prompts} has {now!r:.80} there: "
                "give the prompts that they were drawn for"
            )


def _named(path: Path) -> dict[str, str]:
    """File name -> prompt, where the lines of a .jsonl say so; nothing for other files."""
    if path.suffix != ".jsonl":
        return {}
    try:
        rows = [json.loads(line) for line in read_text(path).splitlines() if line.strip()]
    except (OSError, ValueError, RecursionError) as error:
        raise ScoreError(f"{path} cannot be read: {error}") from error
    if not rows or not all(isinstance(row, dict) and "filename" in row for row in rows):
        return {}
    named = {str(row["filename"]): row.get("prompt") for row in rows}
    if len(named) < len(rows) or not all(isinstance(text, str) for text in named.values()):
        raise ScoreError(f"{path}: every line wants a filename of its own and a prompt")
    return {name: str(text) for name, text in named.items()}


def _of_styles(folder: Path, files: Sequence[str], prompts: Path) -> Pictures:
    found = read_prompts(prompts, "hps")
    numbers = {place: i for i, place in enumerate(found.places)}
    groups = [numbers.get(str(Path(name).with_suffix("").as_posix())) for name in files]
    if None in groups:
        odd = files[groups.index(None)]
        raise ScoreError(f"{folder}: {odd} is of no prompt in {prompts}; wants STYLE/00000.jpg")
    known = tuple(group for group in groups if group is not None)
    rule = "by style and number"
    return Pictures(folder, tuple(files), tuple(found.texts[i] for i in known), known, rule)


def score_pictures(
    reward: Reward, pictures: Pictures, rows: int = 64
) -> Iterator[tuple[str, str, float]]:
    """(file, prompt, score) of every image.

    Images may be of any size; one program is compiled for each size that there is.

    Args:
      reward: a reward model of `vapi_jax.rewards.clip`.
      pictures: what to score.
      rows: images at once.

    Raises:
      ScoreError: an image cannot be read, or a score is no number.
    """
    mesh = make_mesh(devices=jax.local_devices())  # of several processes one does this work
    weights = jax.device_put(reward.load(), replicated(mesh))
    rows = -(-rows // mesh.size) * mesh.size
    run = jax.jit(lambda weights, pixels, batch: reward(weights, pixels, batch)[:, 0])

    def judged(part: list[tuple[str, str, np.ndarray]]) -> Iterator[tuple[str, str, float]]:
        files, prompts, images = zip(*part, strict=True)
        batch = {}
        if (asked := reward.prepare(np.array(prompts))) is not None:
            batch = {"prompt": _filled(asked, rows)}
        pixels = np.stack(images)[:, None].astype(np.float32) / 127.5 - 1.0
        sharded = shard_whole((_filled(pixels, rows), batch), mesh)
        found = host_array(run(weights, *sharded))[: len(part)]
        for name, prompt, value in zip(files, prompts, found.tolist(), strict=True):
            if not np.isfinite(value):
                raise ScoreError(f"{name} has the score {value}")
            yield name, prompt, value

    part: list[tuple[str, str, np.ndarray]] = []
    for name, prompt in zip(pictures.files, pictures.prompts, strict=True):
        try:
            image = np.asarray(read_rgb(pictures.folder / name, PILLOW_PIXELS))
        except UnreadableImage as error:
            raise ScoreError(f"{pictures.folder / name}: {error}") from error
        if part and (len(part) == rows or image.shape != part[0][2].shape):
            yield from judged(part)
            part = []
        part.append((name, prompt, image))
    yield from judged(part)


def _filled(array: np.ndarray, rows: int) -> np.ndarray:
    missing = rows - len(array)
    return np.pad(array, ((0, missing), *((0, 0) for _ in array.shape[1:])), mode="edge")


def mean_of_groups(
    scores: Float[np.ndarray, " N"], groups: Sequence[int], seed: int = 0
) -> dict[str, float]:
    """The mean of all scores, and its 95 % interval by bootstrap over prompts with their images."""
    _, places = np.unique(np.asarray(groups), return_inverse=True)
    sums, counts = np.bincount(places, scores), np.bincount(places)
    rng, means = np.random.default_rng(seed), []
    for _ in range(0, RESAMPLES, 100):  # 10,000 choices of 10,000 prompts at once would be a lot
        chosen = rng.integers(len(sums), size=(100, len(sums)))
        means.append(sums[chosen].sum(axis=1) / counts[chosen].sum(axis=1))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return {"mean": float(scores.mean()), "low": float(low), "high": float(high)}


def receipt(
    name: str, reward: Reward, pictures: Pictures, prompts: Path | None, scores: np.ndarray
) -> dict[str, Any]:
    """What was scored, by what, and the result."""
    found: dict[str, Any] = {
        "score": name,
        **mean_of_groups(scores, pictures.groups),
        "interval": f"95 %, bootstrap over prompts, {RESAMPLES} resamples",
        "images": len(scores),
        "standard_deviation": float(scores.std(ddof=1)) if len(scores) > 1 else None,
        "prompts": len(set(pictures.groups)),
        "prompts_of_images": pictures.rule,
        "sampling": find_recipe(pictures.folder),
        "environment": environment(),
    }
    describe = getattr(reward, "describe", None)
    settings: Mapping[str, Any] = describe() if describe else {}
    found["model"] = dict(settings)
    if prompts is not None and prompts.is_file():
        found["prompts_file"] = {"file": prompts.name, "sha256": sha256_file(prompts)}
    return found
