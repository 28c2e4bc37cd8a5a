"""Receipts: what was measured, on which images, with which weights and settings, as one JSON file.

A receipt holds everything that a number depends on, so that it can be recomputed and compared: digests
of images and weights, settings, seed, library versions, device, and the sampler's own recipe where
it lies beside the samples. Numbers are printed from the file and never without one.
"""

from __future__ import annotations

import datetime
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vapi_jax.common.errors import ExpectedError
from vapi_jax.common.files import read_json, write_atomically
from vapi_jax.common.tables import format_table
from vapi_jax.common.versions import devices, versions

FORMAT = "vapi_jax evaluation receipt"
VERSION = 1

RELATIVE_TOLERANCE = 1e-4
"""What another device or another version of a library may change."""
# Beside it, because these can be near zero (or, for the shares, move by whole images).
ABSOLUTE_TOLERANCE = {
    "fid": 1e-3, "sfid": 1e-3, "kid": 1e-6, "precision": 2e-3, "recall": 2e-3,
    "lpips_vgg": 1e-6, "lpips_alex": 1e-6,
}  # fmt: skip

_SHOWN = 90  # characters of a recipe's entry
_PRECISION = (("policy", "dtype"), ("tokenizer", "decoder_dtype"))
_SECTIONS = ("samples", "reference", "settings", "metrics", "not_computed", "environment")


class ReceiptError(ExpectedError, ValueError):
    """A receipt or recipe that cannot be read or written."""


def environment() -> dict[str, Any]:
    """With what, where and when: library versions, devices, UTC date."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"versions": versions(), "devices": devices(), "date": now}


def recipe_path(samples: Path) -> Path | None:
    """Where a sampler left the recipe of its samples; None where it left none.

    That is recipe.json in a folder, or above it where the folder is called "images"; for NAME.npz it
    is NAME.recipe.json, or recipe.json beside samples.npz.
    """
    if samples.is_dir():
        places = [samples / "recipe.json"]
        if samples.name == "images":
            places.append(samples.parent / "recipe.json")
    else:
        places = [samples.with_suffix(".recipe.json")]
        if samples.name == "samples.npz":
            places.append(samples.with_name("recipe.json"))
    return next((place for place in places if place.is_file()), None)


def find_recipe(samples: Path) -> dict[str, Any] | None:
    """The recipe at `recipe_path`, or None.

    Raises:
      ReceiptError: a recipe that is no JSON object.
    """
    place = recipe_path(samples)
    return None if place is None else read_json(place, ReceiptError)


def precision(recipe: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What generator and decoder computed in, where a recipe says; recipes may come from anywhere."""
    checkpoint = (recipe or {}).get("checkpoint")
    if not isinstance(checkpoint, Mapping):
        return None
    found = {}
    for part, option in _PRECISION:
        network = checkpoint.get(part)
        if not isinstance(network, Mapping) or option not in network:
            return None
        found[f"{part}.{option}"] = network[option]
    return found


def precision_differs(
    ours: Mapping[str, Any] | None, theirs: Mapping[str, Any] | None
) -> str | None:
    """A sentence where two recipes say that their samples were computed in different precision."""
    one, other = precision(ours), precision(theirs)
    if one is None or other is None or one == other:
        return None
    return f"the samples were computed in {_options(one)}, those they are compared with in {_options(other)}"


def _options(facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def free_path(samples: Path) -> Path:
    """`<samples>.receipt.json`, or the next free `<samples>.receipt-2.json`, ...

    An earlier receipt beside the samples is never overwritten.
    """
    number, path = 1, samples.with_name(f"{samples.name}.receipt.json")
    while path.exists():
        number += 1
        path = samples.with_name(f"{samples.name}.receipt-{number}.json")
    return path


def check_writable(path: Path) -> None:
    """Raises ReceiptError where no receipt can be written, before hours go into its numbers."""
    folder = path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ReceiptError(f"the folder of the receipt {path} cannot be made: {error}") from error
    if path.is_dir() or not os.access(folder, os.W_OK):
        raise ReceiptError(f"the receipt {path} cannot be written there; name another with --out")


def write_receipt(path: Path, receipt: Mapping[str, Any]) -> None:
    """Writes a receipt atomically.

    Raises:
      ReceiptError: the file cannot be written.
      ValueError: a value is NaN or infinite, which JSON cannot hold.
    """
    whole = {"format": FORMAT, "version": VERSION, **receipt}
    text = json.dumps(whole, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    try:
        write_atomically(path, text)
    except OSError as error:
        raise ReceiptError(f"the receipt {path} cannot be written: {error}") from error


def read_receipt(path: Path) -> dict[str, Any]:
    """Reads a receipt and checks its outline.

    Raises:
      ReceiptError: no such file, no receipt, or one of another version.
    """
    receipt = read_json(path, ReceiptError)
    if receipt.get("format") != FORMAT or receipt.get("version") != VERSION:
        raise ReceiptError(
            f"{path} is no receipt of version {VERSION}: format {receipt.get('format')!r}, version"
            f" {receipt.get('version')!r}"
        )
    wrong = [name for name in _SECTIONS if not isinstance(receipt.get(name), dict)]
    wrong += [
        f"metrics.{name}"
        for name, entry in (receipt["metrics"].items() if "metrics" not in wrong else ())
        if not (
            isinstance(entry, dict)
            and isinstance(entry.get("name"), str)
            and isinstance(entry.get("value"), int | float | None)
        )
    ]
    if wrong:
        raise ReceiptError(f"{path} is damaged: {', '.join(wrong)}")
    return receipt


# --- print ----------------------------------------------------------------------------------------


def _brief(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(_brief, value))
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else str(value)


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def _images_line(what: str, facts: Mapping[str, Any]) -> str:
    size = f" of {facts['width']}x{facts['height']} px" if facts.get("width") else ""
    count = (
        f"{facts['count']} images{size}" if facts.get("count") else "an unknown number of images"
    )
    return (
        f"{what}: {facts['path']} ({facts['kind']}), {count}, SHA-256 {str(facts['digest'])[:16]}"
    )


def show_receipt(path: Path) -> str:
    """The table of a receipt, and beneath it what the numbers rest on.

    Raises:
      ReceiptError: as `read_receipt`.
    """
    receipt = read_receipt(path)
    rows, notes = [], []
    for entry in receipt["metrics"].values():
        value, error = entry["value"], entry.get("standard_error")
        shown = "-" if value is None else f"{value:.6g}"
        rows.append([entry["name"], shown, "-" if error is None else f"{error:.2g}"])
        if note := entry.get("note"):
            notes.append(f"{entry['name']}: {note}")
    lines = [format_table(rows, ["", "value", "std. error"]), ""]
    lines += [f"not computed: {name}: {why}" for name, why in receipt["not_computed"].items()]
    lines += notes + [f"warning: {text}" for text in receipt.get("warnings", [])]
    lines += [_images_line(what, receipt[what]) for what in ("samples", "reference")]
    if features := receipt.get("features"):
        lines.append(
            f"features: {features['label']}, parameters SHA-256 {features['parameters_sha256'][:16]}"
        )
    settings = ", ".join(f"{name} {_brief(v)}" for name, v in receipt["settings"].items())
    lines.append(f"settings: {settings}")
    if sampling := receipt.get("sampling"):
        if computed := precision(sampling):
            lines.append(f"computed in: {_options(computed)}")
        lines.append("sampling (cut short here, whole in the receipt):")
        lines += [f"  {name} {_cut(_brief(value))}" for name, value in sampling.items()]
    else:
        lines.append("sampling: no recipe lies beside the samples")
    devices = receipt["environment"].get("devices", {})
    lines.append(f"computed on: {devices.get('count')} x {devices.get('kind')}")
    lines.append(f"receipt: {path}")
    return "\n".join(lines)


# --- compare --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """A recomputed receipt against the recorded one.

    Attributes:
      digests: a sentence for each digest that differs, and where samples are of another precision.
      rows: (metric, recorded, found, relative difference, verdict), as a table shows them.
      equal: whether all digests agree and all metrics lie within the tolerance.
    """

    digests: list[str]
    rows: list[list[Any]]
    equal: bool


def _difference(recorded: float | None, found: float | None) -> float | None:
    if recorded is None or found is None:
        return None
    scale = max(abs(recorded), abs(found))
    return abs(recorded - found) / scale if scale else 0.0


def compare_receipts(recorded: Mapping[str, Any], found: Mapping[str, Any]) -> Comparison:
    """Digests first, then every metric within 1e-4 relative plus its `ABSOLUTE_TOLERANCE`."""
    digests = []
    for what, key in (
        ("samples", "digest"),
        ("reference", "digest"),
        ("features", "parameters_sha256"),
    ):
        old, new = ((receipt.get(what) or {}).get(key) for receipt in (recorded, found))
        if old != new:
            digests.append(f"{what} differ: recorded SHA-256 {old}, found {new}")
    if other := precision_differs(found.get("sampling"), recorded.get("sampling")):
        digests.append(other)
    rows, equal = [], not digests
    for name in list(dict.fromkeys([*recorded["metrics"], *found["metrics"]])):
        old, new = (receipt["metrics"].get(name) for receipt in (recorded, found))
        if old is None or new is None:
            verdict = "not recorded" if old is None else "not computed"
        elif old["value"] is None or new["value"] is None:
            verdict = "equal" if old["value"] is new["value"] else "DIFFERS"
        else:
            allowed = RELATIVE_TOLERANCE * abs(old["value"]) + ABSOLUTE_TOLERANCE.get(name, 0.0)
            gap = abs(old["value"] - new["value"])
            verdict = "equal" if gap <= allowed and math.isfinite(gap) else "DIFFERS"
        equal &= verdict == "equal"
        values = [None if entry is None else entry["value"] for entry in (old, new)]
        title = str((old or new or {}).get("name", name))
        rows.append([title, *values, _difference(*values), verdict])
    return Comparison(digests, rows, equal)


def show_comparison(comparison: Comparison) -> str:
    """What `compare_receipts` found, as text."""
    shown = [
        [title, *("-" if v is None else f"{v:.8g}" for v in values), verdict]
        for title, *values, verdict in comparison.rows
    ]
    table = format_table(shown, ["", "recorded", "found", "relative", ""])
    extra = ", ".join(f"{name} {value:g}" for name, value in ABSOLUTE_TOLERANCE.items())
    return "\n".join(
        [
            *comparison.digests,
            table,
            f"tolerance: {RELATIVE_TOLERANCE:g} relative, and absolute: {extra}",
            "verified: digests and metrics agree"
            if comparison.equal
            else "NOT verified: see above",
        ]
    )
