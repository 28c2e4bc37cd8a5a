"""With what something was computed, for the record."""

import importlib.metadata
import platform
from typing import Any

import jax

from vapi_jax import __version__

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "pillow")


def versions() -> dict[str, str]:
    """Of this package, of Python, and of the libraries that numbers may depend on."""
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"vapi_jax": __version__, "python": platform.python_version(), **found}


def devices() -> dict[str, Any]:
    """Of which kind, and how many."""
    return {"kind": jax.devices()[0].device_kind, "count": jax.device_count()}
