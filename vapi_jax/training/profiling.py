"""A trace of some steps of a run, for TensorBoard's profiler."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import jax

from vapi_jax.common.progress import announce


class Profiler:
    """Traces the steps of a range, as far as a life of the run takes them.

    Args:
      steps: None for none.
      folder: for TensorBoard; the trace is under plugins/profile there.
    """

    def __init__(self, steps: range | None, folder: Path) -> None:
        self._steps, self._folder, self._running = steps or range(0), folder, False

    def __enter__(self) -> Profiler:
        return self

    def before(self, step: int, state: Any) -> None:
        """To be called before each step and after the last one; `state` is what the step before made."""
        if (step in self._steps) == self._running:
            return
        jax.block_until_ready(state)  # what was dispatched belongs to the steps before
        if self._running:
            self._stop()
        else:
            jax.profiler.start_trace(self._folder)
            self._running = True

    def _stop(self) -> None:
        self._running = False
        jax.profiler.stop_trace()
        announce(f"profile: the trace is there, see it with tensorboard --logdir={self._folder}")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._running:
            self._stop()
