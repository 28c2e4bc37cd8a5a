"""What timing batches of samples and timing batches of features share.

Above all that a loop which is timed compiles nothing: batches have one shape.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

import jax
from jax import monitoring

from vapi_jax.bench.report import quantity
from vapi_jax.bench.setup import Spread
from vapi_jax.methods.config import ConfigError

_EVENT = "/jax/core/compile/backend_compile_duration"


class Compilations:
    """A context in which programs are counted that JAX compiles, or takes from its cache on disk.

    Attributes:
      count: how many so far.
    """

    def __init__(self) -> None:
        self.count = 0

    def _listen(self, event: str, duration_secs: float, **_: str | int) -> None:
        self.count += event == _EVENT

    def __enter__(self) -> Compilations:
        monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        monitoring.unregister_event_duration_listener(self._listen)


def problem(result: Mapping[str, Any]) -> str | None:
    """What to say of a result whose timed batches compiled something; None where none did."""
    count = result.get("compilations", 0)
    if not count:
        return None
    return (
        f"programs were compiled while batches were timed ({count}), so the seconds hold more than "
        "running them; batches of one shape must need no compilation"
    )


@contextlib.contextmanager
def fitting() -> Iterator[None]:
    """A context in which a batch that the devices' memory does not hold is a ConfigError."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).splitlines()[0]
        raise ConfigError(f"not enough memory, choose a smaller --batch: {reason}") from error


def rounded(batch: int, devices: int) -> int:
    """The least multiple of the devices that holds a batch."""
    return -(-batch // devices) * devices


def seconds_of(name: str, found: Spread) -> dict[str, Any]:
    """The median under NAME_per_batch and the quartiles under NAME_quartiles."""
    return {f"{name}_per_batch": found.median, f"{name}_quartiles": [found.low, found.high]}


def seconds_text(result: Mapping[str, Any], name: str) -> str:
    """What `seconds_of` has put into a result, for a person."""
    low, high = result[f"{name}_quartiles"]
    return f"{result[f'{name}_per_batch']:.4f} s (quartiles {low:.4f} to {high:.4f})"


def heading(result: Mapping[str, Any]) -> str:
    """What was measured, and on what."""
    device = result["device"]
    return (
        f"{result['name']} on {device['count']} x {device['kind']} ({device['platform']}), mesh "
        f"{device['mesh']}, jax {result['versions']['jax']}"
    )


def common_lines(result: Mapping[str, Any]) -> list[str]:
    """Compilation and memory."""
    return [
        f"compile      {result['compile_seconds']:.1f} s; {result['compilations']} programs in the "
        f"{result['batches']} timed batches",
        f"memory       {quantity(result['peak_memory_bytes'], 'B')} a device, "
        f"{result['peak_memory_source']}",
    ]
