"""VA-π in JAX: post-train an autoregressive generator so that its tokens decode into the right pixels.

    import vapi_jax as vj

offers `load`, `recipe`, `train`, `sample`, `evaluate` and `reward`; docs/library.md has an example.
"""

import sys

__version__ = "0.1.0"

__all__ = ["evaluate", "load", "recipe", "reward", "sample", "train"]

if sys.argv[:1] == ["-m"]:  # so it is called while `python -m vapi_jax.COMMAND` imports this
    from vapi_jax.common.errors import stop_without_a_stack

    stop_without_a_stack()


def __getattr__(name: str) -> object:
    """The library's functions, imported when they are asked for."""
    import importlib

    if name in ("sample", "evaluate"):  # modules of commands, which can be called
        return importlib.import_module(f"vapi_jax.{name}")
    if name in __all__:
        return getattr(importlib.import_module("vapi_jax.library"), name)
    raise AttributeError(f"module 'vapi_jax' has no attribute {name!r}")
