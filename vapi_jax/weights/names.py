"""Weights in and out: safetensors with our names, and name tables to the reference's names.

A model family keeps one table of `Rule` rows next to its module; both directions read it. Every
name, shape and element is accounted for: what is missing, unexpected or of the wrong shape is
listed by name and nothing is loaded.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from vapi_jax.common.trees import Params, flatten, unflatten
from vapi_jax.weights.errors import WeightsError as WeightsError


@dataclasses.dataclass(frozen=True)
class Rule:
    """One row of a name table.

    Attributes:
      ours: regular expression (full match) on our "/"-joined parameter path.
      theirs: the reference's name as a template for `re.Match.expand`; `{layer}` stands for the
        index along our leading axis of scanned layers.
      kind: "same", "linear" ([out, in] there, [in, out] here), "conv" (OIHW there, HWIO here) or
        "pixelwise" (a 1x1 convolution to one channel [1, C, 1, 1] there, [C] here).
    """

    ours: str
    theirs: str
    kind: str = "same"


_LISTED = 20  # names of one kind in an error
_TO_OURS = {"linear": (1, 0), "conv": (2, 3, 1, 0)}
_TO_THEIRS = {"linear": (1, 0), "conv": (3, 2, 0, 1)}


def _match(path: str, rules: Iterable[Rule]) -> tuple[Rule, str]:
    for rule in rules:
        found = re.fullmatch(rule.ours, path)
        if found:
            return rule, found.expand(rule.theirs)
    raise WeightsError(f"no name rule for our parameter {path!r}: add a row to the model's table")


def _raise_misfits(what: str, misfits: Mapping[str, list[str]]) -> None:
    lines = [
        f"  {kind}: {', '.join(names[:_LISTED])}"
        + (f", and {len(names) - _LISTED} more" if len(names) > _LISTED else "")
        for kind, names in misfits.items()
        if names
    ]
    if lines:
        raise WeightsError(f"{what} do not fit the model:\n" + "\n".join(lines))


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where one of our parameters comes from.

    Attributes:
      names: the reference's tensors that it is made of, one a layer where `stacked`.
      stacked: they lie along our leading axis.
      kind: of its `Rule`.
    """

    names: tuple[str, ...]
    stacked: bool
    kind: str

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        """One of the tensors in our layout; a view where it can be."""
        if self.kind == "pixelwise":
            return tensor.reshape(-1)
        return np.transpose(tensor, _TO_OURS[self.kind]) if self.kind in _TO_OURS else tensor

    def to_theirs(self, part: np.ndarray) -> np.ndarray:
        """A parameter, or one layer of a stacked one, in the reference's layout; a view."""
        if self.kind == "pixelwise":
            return part.reshape(1, -1, 1, 1)
        return np.transpose(part, _TO_THEIRS[self.kind]) if self.kind in _TO_THEIRS else part

    def their_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The reference's shape of each tensor, given that of our parameter."""
        part = shape[1:] if self.stacked else shape
        return self.to_theirs(np.broadcast_to(np.zeros((), np.uint8), part)).shape


def origin_of(path: str, leaf: Any, rules: Sequence[Rule]) -> Origin:
    """The row of the table that our parameter `path` (array or ShapeDtypeStruct) matches, applied.

    Raises:
      WeightsError: if no row matches.
    """
    rule, name = _match(path, rules)
    stacked = "{layer}" in name
    layers = range(leaf.shape[0]) if stacked else range(1)
    names = tuple(name.replace("{layer}", str(i)) for i in layers)
    return Origin(names, stacked, rule.kind)


def check_reference(
    tensors: Mapping[str, Any],
    target: Params,
    rules: Sequence[Rule],
    ignore: Sequence[str] = (),
) -> dict[str, Origin]:
    """Accounts for every reference tensor and every parameter of ours, by name, shape and dtype.

    Args:
      tensors: reference name -> array, or anything else with a shape and a dtype.
      target: our parameter tree of arrays or `jax.ShapeDtypeStruct`.
      rules: the model's name table, first match wins.
      ignore: regular expressions of reference names that are no parameters (buffers).

    Returns:
      Our "/"-joined path -> its origin.

    Raises:
      WeightsError: listing all missing, unexpected and misshapen tensors, and those of integers.
    """
    found: dict[str, Origin] = {}
    taken: set[str] = set()
    misfits: dict[str, list[str]] = {
        kind: [] for kind in ("missing", "wrong shape", "wrong dtype", "unexpected")
    }
    for path, leaf in flatten(target).items():
        origin = found[path] = origin_of(path, leaf, rules)
        shape = tuple(leaf.shape[1:] if origin.stacked else leaf.shape)
        wanted = origin.their_shape(leaf.shape)
        taken.update(origin.names)
        for name in origin.names:
            if name not in tensors:
                misfits["missing"].append(name)
            elif tuple(tensors[name].shape) != wanted:
                theirs = tuple(tensors[name].shape)
                misfits["wrong shape"].append(f"{name} {theirs}, {path} wants {shape}")
            elif not jax.numpy.issubdtype(tensors[name].dtype, jax.numpy.floating):
                misfits["wrong dtype"].append(f"{name} {tensors[name].dtype}")
    misfits["unexpected"] = [
        name
        for name in tensors
        if name not in taken and not any(re.fullmatch(pattern, name) for pattern in ignore)
    ]
    _raise_misfits("the reference weights", misfits)
    return found


def from_reference(
    tensors: Mapping[str, np.ndarray],
    target: Params,
    rules: Sequence[Rule],
    ignore: Sequence[str] = (),
) -> dict[str, Any]:
    """Reference tensors under our names and layout.

    Arguments and errors are those of `check_reference`.

    Returns:
      A tree like `target`, numpy arrays of the target's dtype.
    """
    loaded = {}
    leaves = flatten(target)
    for path, origin in check_reference(tensors, target, rules, ignore).items():
        parts = [
            np.asarray(origin.to_ours(tensors[name]), dtype=leaves[path].dtype, order="C")
            for name in origin.names
        ]
        loaded[path] = np.stack(parts) if origin.stacked else parts[0]
    return unflatten(loaded)


def to_reference(params: Params, rules: Sequence[Rule]) -> dict[str, np.ndarray]:
    """Our parameters under the reference's names and layout (the inverse of `from_reference`)."""
    tensors = {}
    for path, leaf in flatten(params).items():
        origin, array = origin_of(path, leaf, rules), np.asarray(leaf)
        parts = array if origin.stacked else [array]
        for name, part in zip(origin.names, parts, strict=True):
            tensors[name] = np.asarray(origin.to_theirs(part), order="C")
    return tensors


def check_finite(array: np.ndarray, what: str) -> None:
    """Raises `WeightsError` where a value is NaN or infinite."""
    finite = np.isfinite(array)
    if not finite.all():
        raise WeightsError(
            f"{what}: {finite.size - np.count_nonzero(finite)} of {finite.size} values are not finite "
            "(NaN or infinite). Nothing can be computed with such weights: the file is damaged, or its "
            "training diverged. Take an earlier checkpoint, or fetch the file again"
        )


def check_like(params: Params, target: Params, what: str) -> None:
    """Raises `WeightsError` unless both trees have the same names and shapes."""
    ours, wanted = flatten(params), flatten(target)
    _raise_misfits(
        what,
        {
            "missing": [name for name in wanted if name not in ours],
            "unexpected": [name for name in ours if name not in wanted],
            "wrong shape": [
                f"{name} {tuple(ours[name].shape)}, the model wants {tuple(leaf.shape)}"
                for name, leaf in wanted.items()
                if name in ours and tuple(ours[name].shape) != tuple(leaf.shape)
            ],
        },
    )
