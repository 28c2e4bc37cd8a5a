"""Ways of drawing samples that published numbers are of, by name, and in what others depart from them.

Numbers of samples that were not drawn by one protocol are not to be compared, however alike they look.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PROTOCOLS: dict[str, dict[str, Any]] = {
    "adm50k": {"num": 50_000, "labels": "random", "resize": 256, "format": "npz"},
    "geneval": {
        "layout": "geneval", "per_prompt": 4, "cfg": 7.5, "cfg_schedule": "constant",
        "temperature": 1.0, "top_k": 2000, "top_p": 1.0,
    },
    "geneval_janus": {
        "layout": "geneval", "per_prompt": 4, "cfg": 5.0, "cfg_schedule": "constant",
        "temperature": 1.0, "top_k": 0, "top_p": 1.0,
    },
}  # fmt: skip
"""Name -> flags of `vapi_jax.sample`. "adm50k" is LlamaGen's and ADM's: FID of 50,000 images of random
classes at 256 px, in the evaluator's own layout. Guidance is free, and told with the number. "geneval" is
what VA-π's figures of LlamaGen's text-to-image generators are of, "geneval_janus" what those of Janus-Pro
are of: four images of each prompt."""

_PLACES = {
    "layout": "captions.layout",
    "per_prompt": "captions.per_prompt",
    "cfg": "sampling.cfg_scale",
    "cfg_schedule": "sampling.cfg_schedule",
    "temperature": "sampling.temperature",
    "top_k": "sampling.top_k",
    "top_p": "sampling.top_p",
}
"""Flags of "geneval" and "geneval_janus", and where a recipe tells them."""

_SAME = (
    "count",
    "image_size",
    "decoded_size",
    "resize",
    "labels.rule",
    "labels.classes",
    "captions.rule",
    "captions.sha256",
    "captions.per_prompt",
    "captions.layout",
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
    """A sentence where samples are not those of the protocol that published numbers are of.

    For samples in GenEval's layout that is "geneval" or "geneval_janus", for all others "adm50k".

    Args:
      recipe: the sampler's, where there is one.
      count: images there are.
      side: of them, in pixels.
    """
    recipe = recipe or {}
    if facts(recipe).get("captions.layout") == "geneval":
        return departures_from_geneval(recipe)
    found: dict[str, Any] = {"num": count, "resize": side}
    if isinstance(labels := recipe.get("labels"), Mapping):
        found["labels"] = labels.get("rule")
    elif "captions" in recipe:
        found["labels"] = "captions"
    return _departures("adm50k", found)


def departures_from_geneval(recipe: Mapping[str, Any]) -> str | None:
    """A sentence where a recipe tells of other samples than "geneval" draws, or of Janus "geneval_janus"."""
    told, checkpoint = facts(recipe), recipe.get("checkpoint")
    policy = checkpoint.get("policy") if isinstance(checkpoint, Mapping) else None
    janus = isinstance(policy, Mapping) and policy.get("kind") == "janus"
    found = {flag: told.get(place, "nothing") for flag, place in _PLACES.items()}
    return _departures("geneval_janus" if janus else "geneval", found)


def _departures(name: str, found: Mapping[str, Any]) -> str | None:
    protocol = PROTOCOLS[name]
    lines = [
        f"{flag} {value!s:.60} in place of {protocol[flag]}"
        for flag, value in found.items()
        if value != protocol[flag]
    ]
    if not lines:
        return None
    return f"not by the protocol {name}, which published numbers are of: {', '.join(lines)}"
