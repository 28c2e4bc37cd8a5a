"""Calls from a compiled program to the host that can fail, such as of a reward on another machine.

An exception in a JAX callback ends as a stack in the text of another. With several devices it does not even
end: the others wait for the one that failed in their next collective, until XLA aborts the process. So a
call that fails gives NaN, the program comes to its end, and whoever looks at its results calls
`raise_failure`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

_failures: list[Exception] = []
_lock = threading.Lock()


def on_host(function: Callable[..., np.ndarray], shape: jax.ShapeDtypeStruct, *args: Any) -> Any:
    """`jax.pure_callback`, with NaN where the function raises.

    After a failure nothing is called until `raise_failure` has told it: what would come back is lost.

    Args:
      function: of arrays; called on any thread.
      shape: of what it returns, floats.
      args: traced arrays.
    """

    def call(*args: Any) -> np.ndarray:
        if not _failures:
            try:
                return function(*args)
            except Exception as error:
                with _lock:
                    _failures.append(error)
        return np.full(shape.shape, np.nan, shape.dtype)

    return jax.pure_callback(call, shape, *args)


def raise_failure() -> None:
    """Raises what a call has raised since the last time, the first of several."""
    if _failures:
        with _lock:
            first = _failures[0]
            _failures.clear()
        raise first
