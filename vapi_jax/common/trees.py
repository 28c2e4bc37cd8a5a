"""Nested dicts of arrays, as linen keeps parameters, and their flat form by "/"-joined path."""

from collections.abc import Mapping
from typing import Any

Params = Mapping[str, Any]
"""A nested dict of arrays, as linen keeps under "params"."""


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
