"""Ways of drawing samples that published numbers are of, by name, and in what others depart from them.

Numbers of samples that were not drawn by one protocol are not to be compared, however alike they look.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PROTOCOLS: dict[str, dict[str, Any]] = {
    "adm50k": {"num": 50_000, "labels": "random", "resize": 256, "format": "npz"},
}
"""Name -> flags of `vapi_jax.sample`. "adm50k" is LlamaGen's and ADM's: FID of 50,000 images of random
classes at 256 px, in the evaluator's own layout. Guidance is free, and told with the number."""

_SAME = (
    "count",
    "image_size",
    "decoded_size",
    "resize",
    "labels.rule",
    "labels.classes",
    "captions",
)
"""What of a recipe is protocol, beside all that is under "sampling"."""


def facts(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What a sampler's recipe says of its protocol; a recipe is a file, and may come from anywhere."""
    found: dict[str, Any] = {}
    for name in _SAME:
        section, _, option = name.partition(".")
        if section in recipe:
            value = recipe[section]
            found[name] = value.get(option) if option and isinstance(value, Mapping) else value
    drawing = recipe.get("sampling")
    if isinstance(drawing, Mapping):
        found |= {f"sampling.{name}": value for name, value in drawing.items()}
    return found


def differences(ours: Mapping[str, Any] | None, theirs: Mapping[str, Any] | None) -> str | None:
    """A sentence where two recipes are of two protocols; what only one of them tells does not count."""
    if ours is None or theirs is None:
        return None
    one, other = facts(ours), facts(theirs)
    lines = [
        f"{name} {one[name]!s:.60} and {other[name]!s:.60}"
        for name in one.keys() & other.keys()
        if one[name] != other[name]
    ]
    if not lines:
        return None
    return f"samples and reference were not drawn by one protocol: {', '.join(sorted(lines))}"


def departures(recipe: Mapping[str, Any] | None, count: int, side: int) -> str | None:
    """A sentence where samples are not those of "adm50k", which published FIDs are of.

    Args:
      recipe: the sampler's, where there is one.
      count: images there are.
      side: of them, in pixels.
    """
    protocol = PROTOCOLS["adm50k"]
    found: dict[str, Any] = {"num": count, "resize": side}
    if isinstance(labels := (recipe or {}).get("labels"), Mapping):
        found["labels"] = labels.get("rule")
    lines = [
        f"{name} {value!s:.60} in place of {protocol[name]}"
        for name, value in found.items()
        if value != protocol[name]
    ]
    if not lines:
        return None
    return f"not by the protocol adm50k, which published numbers are of: {', '.join(lines)}"
