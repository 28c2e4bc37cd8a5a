"""What each of many samples is drawn for: class labels by rule, or captions from a file."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from vapi_jax.common.digests import sha256_file
from vapi_jax.common.errors import ExpectedError
from vapi_jax.common.files import read_text
from vapi_jax.generation.files import map_npz_array, npz_names
from vapi_jax.generation.generator import Generator
from vapi_jax.generation.prompt_lists import prompts_at
from vapi_jax.models.conditions import Caption, Tree

_RANDOM_LABELS = 0xFFFF_FFFF  # no sample has this number, so labels share no key with tokens


class RequestError(ExpectedError, ValueError):
    """Conditions that this generator does not take, with those that it does."""


@dataclasses.dataclass(frozen=True)
class Requests:
    """The condition of every sample.

    Attributes:
      labels: whether `rows` are class labels; else they are rows of `features` and `mask`.
      rows: int64 [N], one a sample.
      names: of the classes, where they are known.
      features, mask: of a text-conditional generator [captions, P, W] and [captions, P].
      facts: for the recipe.
    """

    labels: bool
    rows: Int[np.ndarray, " N"]
    facts: dict[str, Any]
    names: tuple[str, ...] | None = None
    features: np.ndarray | None = None
    mask: np.ndarray | None = None

    def of(self, samples: Int[np.ndarray, " B"]) -> Tree:
        """The condition of these samples, as the policy takes it, in NumPy arrays."""
        rows = self.rows[samples]
        if self.features is None or self.mask is None:
            return rows.astype(np.int32)
        return {
            "features": np.asarray(self.features[rows], np.float32),
            "mask": np.asarray(self.mask[rows]).astype(bool),
            "dropped": np.zeros(len(rows), bool),
        }

    def numbers(self, samples: Int[np.ndarray, " B"]) -> Int[np.ndarray, " B"]:
        """What the keys of samples are made of, beside the seed."""
        return samples

    def first(self, count: int) -> Requests:
        """The conditions of the first samples alone, as if no more had been asked for."""
        rows = self.rows[:count]
        facts = {**self.facts, "sha256": _digest(rows)} if self.labels else self.facts
        return dataclasses.replace(self, rows=rows, facts=facts)

    def name(self, row: int) -> str:
        """What a picture calls a class or caption."""
        if not self.labels:
            return f"caption {row}"
        return f"class {row}" if self.names is None else self.names[row]


def make_requests(
    generator: Generator, count: int, seed: int, labels: str | None, captions: Path | None
) -> Requests:
    """The conditions of `count` samples.

    Args:
      generator: decides whether labels or captions are wanted.
      count: N.
      seed: of random labels.
      labels: "balanced" (the default: 0, 1, 2, ... in turn), "random" (each depends on the seed and
        the sample's number alone), a file with one label or class name a line, or a list with commas.
        Lists are repeated as often as needed.
      captions: an .npz of `features` [captions, P, W] and `mask` [captions, P], left padded; sample i
        takes row i mod captions. Written by vapi_jax.encode (as left_features, left_mask) or
        `numpy.savez`; read row by row as needed.

    Raises:
      RequestError: if the generator takes others, or has no such class.
      SampleFilesError: if the captions cannot be read.
    """
    if generator.num_classes is not None:
        if captions is not None:
            raise RequestError("--conditions: this checkpoint takes class labels; give --labels")
        rule = "balanced" if labels is None else labels
        return _by_label(rule, count, seed, generator.num_classes, generator.class_names)
    if not isinstance(generator.policy.condition, Caption):
        raise RequestError(
            f"this checkpoint is a generator of kind {generator.facts['policy']['kind']!r}: give --prompts"
        )
    if labels is not None:
        raise RequestError("--labels: this checkpoint is text-conditional; give --conditions")
    if captions is None:
        raise RequestError(
            "this checkpoint is text-conditional: give --prompts and --text_encoder; or --conditions "
            "FILE.npz with features [N, P, W] of encoded captions and mask [N, P]"
        )
    return _by_caption(captions, count, generator.policy.condition)


def random_labels(seed: int, count: int, classes: int) -> Int[np.ndarray, " N"]:
    """Uniform labels; the labels of few samples are the first labels of many."""
    key = jax.random.fold_in(jax.random.key(seed), _RANDOM_LABELS)

    def draw(sample: Any) -> Any:
        return jax.random.randint(jax.random.fold_in(key, sample), (), 0, classes)

    return np.asarray(jax.jit(jax.vmap(draw))(np.arange(count)), np.int64)


def _by_label(
    rule: str, count: int, seed: int, classes: int, names: tuple[str, ...] | None
) -> Requests:
    shown = rule
    if rule == "balanced":
        rows = np.arange(count, dtype=np.int64) % classes
    elif rule == "random":
        rows = random_labels(seed, count, classes)
    else:
        place = prompts_at(rule)  # a list may be longer than any name of a file
        if isinstance(place, Path) and place.is_file():
            shown, items = place.name, _lines(place)
        else:
            items = rule.split(",")
        items = [item.strip() for item in items if item.strip()]
        if not items:
            raise RequestError(f"--labels {rule!r} holds no label")
        listed = [_label(item, classes, names) for item in items]
        rows = np.resize(np.asarray(listed, np.int64), count)
    facts = {"rule": shown, "classes": classes, "sha256": _digest(rows)}
    return Requests(True, rows, facts, names=names)


def _digest(rows: Int[np.ndarray, " N"]) -> str:
    return hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()


def _lines(path: Path) -> list[str]:
    try:
        return read_text(path).splitlines()
    except ValueError as error:
        raise RequestError(f"--labels: {path} is no text: {error}") from error


def _label(item: str, classes: int, names: tuple[str, ...] | None) -> int:
    called = [label for label, name in enumerate(names or ()) if name == item]
    if len(called) == 1:
        return called[0]
    if called:
        raise RequestError(f"--labels: {item!r} is the name of classes {called}; give a number")
    if re.fullmatch(r"[0-9]{1,9}", item) and int(item) < classes:
        return int(item)
    known = f" or names: {', '.join(names[:20])}" if names else "; class names are not known here"
    raise RequestError(
        f"--labels: there is no class and no file {item!r}; give 'balanced', 'random', a file, or "
        f"labels 0 to {classes - 1}{known}"
    )


def _by_caption(path: Path, count: int, condition: Caption) -> Requests:
    # vapi_jax.encode says on which side: its ids and their mask are padded on the other one.
    side = "left_" if "left_features" in npz_names(path) else ""
    features, mask = (map_npz_array(path, side + name) for name in ("features", "mask"))
    wanted, captions = (condition.length, condition.width), len(features)
    if features.shape[1:] != wanted or mask.shape != (captions, wanted[0]) or not captions:
        raise RequestError(
            f"{path}: features {features.shape} and mask {mask.shape}; this generator takes features "
            f"[N, {wanted[0]}, {wanted[1]}] and mask [N, {wanted[0]}]"
        )
    if features.dtype.kind != "f" or mask.dtype.kind not in "biu":
        raise RequestError(
            f"{path}: features are {features.dtype} and the mask {mask.dtype}; wants floats, and "
            "booleans or 0 and 1"
        )
    there = np.asarray(mask).astype(bool)
    if np.any(there[:, :-1] & ~there[:, 1:]) or not there[:, -1].all():
        raise RequestError(f"{path}: captions must be padded on the left and hold a token each")
    facts = {"rule": path.name, "captions": captions, "sha256": sha256_file(path)}
    rows = np.arange(count, dtype=np.int64) % captions
    return Requests(False, rows, facts, features=features, mask=mask)
