"""Checkpoints that notice damage: orbax, plus a SHA-256 digest of every array, plus a walk back.

`Checkpointer` saves and restores; `python -m vapi_jax.checkpoint inspect DIR` and `verify DIR` tell
people what is there and whether it is whole.
"""

from vapi_jax.training.checkpoint.checkpointer import Checkpointer, abstract_like
from vapi_jax.training.checkpoint.errors import CheckpointError
from vapi_jax.training.checkpoint.manifest import array_digest

__all__ = ["CheckpointError", "Checkpointer", "abstract_like", "array_digest"]
