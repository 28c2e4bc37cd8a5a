"""Checkpoints that notice damage: orbax, plus a SHA-256 digest of every array, plus a walk back.

`Checkpointer` saves and restores; `python -m vapi_jax.checkpoint inspect DIR` and `verify DIR` tell
people what is there and whether it is whole.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vapi_jax.training.checkpoint.checkpointer import Checkpointer, abstract_like
    from vapi_jax.training.checkpoint.errors import CheckpointError
    from vapi_jax.training.checkpoint.manifest import array_digest

__all__ = ["CheckpointError", "Checkpointer", "abstract_like", "array_digest"]


def __getattr__(name: str) -> Any:
    # The commands above begin here, and their --help must not wait for JAX and orbax.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    homes = {"array_digest": "manifest", "CheckpointError": "errors"}
    return getattr(importlib.import_module(f"{__name__}.{homes.get(name, 'checkpointer')}"), name)
