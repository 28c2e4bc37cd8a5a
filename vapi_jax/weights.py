"""Weights in and out: safetensors with our names, and name tables to the reference's names.

A model family keeps one table of `Rule` rows next to its module; both directions read it. Every
name, shape and element is accounted for: what is missing, unexpected or of the wrong shape is
listed by name and nothing is loaded.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

Params = Mapping[str, Any]
"""A nested dict of arrays, as linen keeps under "params"."""


_ASSETS = Path(__file__).parent / "assets"
ASSETS = {kind: _ASSETS / f"demo_{kind}.safetensors" for kind in ("tokenizer", "policy")}
"""The weights that ship with the package, trained by configs/demo_tokenizer.py and demo_base.py."""
DIGESTS = _ASSETS / "digests.json"
"""SHA-256 of each of them."""


class WeightsError(ValueError):
    """Weights that do not fit the model, with every misfit listed by name."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """One row of a name table.

    Attributes:
      ours: regular expression (full match) on our "/"-joined parameter path.
      theirs: the reference's name as a template for `re.Match.expand`; `{layer}` stands for the
        index along our leading axis of scanned layers.
      kind: "same", "linear" ([out, in] there, [in, out] here) or "conv" (OIHW there, HWIO here).
    """

    ours: str
    theirs: str
    kind: str = "same"


_TO_OURS = {"same": None, "linear": (1, 0), "conv": (2, 3, 1, 0)}
_TO_THEIRS = {"same": None, "linear": (1, 0), "conv": (3, 2, 0, 1)}


def _permute(array: np.ndarray, axes: Sequence[int] | None) -> np.ndarray:
    return array if axes is None else np.ascontiguousarray(np.transpose(array, axes))


def flatten(tree: Params, prefix: str = "") -> dict[str, Any]:
    """A nested dict as {"a/b/c": leaf}, in sorted order."""
    flat = {}
    for key in sorted(tree):
        value = tree[key]
        path = f"{prefix}{key}"
        flat.update(flatten(value, f"{path}/") if isinstance(value, Mapping) else {path: value})
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def _match(path: str, rules: Iterable[Rule]) -> tuple[Rule, str]:
    for rule in rules:
        found = re.fullmatch(rule.ours, path)
        if found:
            return rule, found.expand(rule.theirs)
    raise WeightsError(f"no name rule for our parameter {path!r}: add a row to the model's table")


def _raise_misfits(what: str, misfits: Mapping[str, list[str]]) -> None:
    lines = [f"  {kind}: {', '.join(names)}" for kind, names in misfits.items() if names]
    if lines:
        raise WeightsError(f"{what} do not fit the model:\n" + "\n".join(lines))


def from_reference(
    tensors: Mapping[str, np.ndarray],
    target: Params,
    rules: Sequence[Rule],
    ignore: Sequence[str] = (),
) -> dict[str, Any]:
    """Reference tensors under our names and layout.

    Args:
      tensors: reference name -> array.
      target: our parameter tree of arrays or `jax.ShapeDtypeStruct`.
      rules: the model's name table, first match wins.
      ignore: regular expressions of reference names that are no parameters (buffers).

    Returns:
      A tree like `target`, numpy arrays of the target's dtype.

    Raises:
      WeightsError: listing all missing, unexpected and wrongly shaped tensors.
    """
    taken, loaded = set(), {}
    misfits: dict[str, list[str]] = {"missing": [], "wrong shape": [], "unexpected": []}
    for path, leaf in flatten(target).items():
        rule, name = _match(path, rules)
        stacked = "{layer}" in name
        names = (
            [name.replace("{layer}", str(i)) for i in range(leaf.shape[0])] if stacked else [name]
        )
        shape = tuple(leaf.shape[1:] if stacked else leaf.shape)
        parts = []
        for their_name in names:
            taken.add(their_name)
            if their_name not in tensors:
                misfits["missing"].append(their_name)
                continue
            part = np.asarray(tensors[their_name])
            axes = _TO_OURS[rule.kind]
            part = _permute(part, axes) if axes is None or len(axes) == part.ndim else part
            if part.shape != shape:
                theirs = tuple(tensors[their_name].shape)
                misfits["wrong shape"].append(f"{their_name} {theirs}, {path} wants {shape}")
            parts.append(part.astype(leaf.dtype))
        loaded[path] = (parts, stacked)
    misfits["unexpected"] = [
        name
        for name in tensors
        if name not in taken and not any(re.fullmatch(pattern, name) for pattern in ignore)
    ]
    _raise_misfits("the reference weights", misfits)
    return unflatten(
        {
            path: np.stack(parts) if stacked else parts[0]
            for path, (parts, stacked) in loaded.items()
        }
    )


def to_reference(params: Params, rules: Sequence[Rule]) -> dict[str, np.ndarray]:
    """Our parameters under the reference's names and layout (the inverse of `from_reference`)."""
    tensors = {}
    for path, leaf in flatten(params).items():
        rule, name = _match(path, rules)
        array, axes = np.asarray(leaf), _TO_THEIRS[rule.kind]
        if "{layer}" in name:
            for i, part in enumerate(array):
                tensors[name.replace("{layer}", str(i))] = _permute(part, axes)
        else:
            tensors[name] = _permute(array, axes)
    return tensors


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


def save_safetensors(
    path: str | Path,
    params: Params,
    metadata: Mapping[str, Any] | None = None,
    dtype: Any = None,
) -> str:
    """Writes a parameter tree with our "/"-joined names, atomically; returns its SHA-256.

    Args:
      path: the file to write; a half-written one never carries this name.
      params: nested dict of arrays (fetched from devices one by one).
      metadata: JSON-able facts stored in the file's header under "vapi_jax".
      dtype: storage dtype, for instance `np.float16`; None keeps each array's own.
    """
    path = Path(path)
    arrays = {
        name: np.asarray(jax.device_get(leaf), dtype=dtype, order="C")
        for name, leaf in flatten(params).items()
    }
    header = {"vapi_jax": json.dumps(dict(metadata or {}), sort_keys=True)}
    partial = path.with_name(path.name + ".partial")
    save_file(arrays, partial, metadata=header)
    partial.replace(path)
    return sha256_file(path)


def load_safetensors(path: str | Path, dtype: Any = None) -> dict[str, Any]:
    """Reads what `save_safetensors` wrote as a nested dict of numpy arrays.

    Raises:
      WeightsError: if the file is missing, truncated or not safetensors.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            flat = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path} cannot be read as safetensors: {error}") from error
    if dtype is not None:
        flat = {name: array.astype(dtype) for name, array in flat.items()}
    return unflatten(flat)


def resolve_path(path: str, kind: str) -> Path | None:
    """The file that an option of `config.init` names: None for "", the shipped file for "demo".

    Raises:
      WeightsError: if the shipped file is absent or is not the one that was shipped.
    """
    if not path:
        return None
    if path != "demo":
        return Path(path)
    shipped = ASSETS[kind]
    if not shipped.exists():
        raise WeightsError(f"{shipped} is missing: reinstall the package")
    wanted = json.loads(DIGESTS.read_text())[shipped.name]
    found = sha256_file(shipped)
    if found != wanted:
        raise WeightsError(
            f"{shipped} is damaged: its SHA-256 is {found}, {DIGESTS.name} says {wanted}. Reinstall "
            "the package, or bring the file back from version control"
        )
    return shipped


def load_metadata(path: str | Path) -> dict[str, Any]:
    """The facts that `save_safetensors` stored in the file's header.

    Raises:
      WeightsError: if the file is missing, truncated or not safetensors.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            return json.loads((file.metadata() or {}).get("vapi_jax", "{}"))
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path} cannot be read as safetensors: {error}") from error


def sha256_file(path: str | Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
