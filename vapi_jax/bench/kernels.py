"""What a device spent its time on, kernel by kernel, from a profile of a few steps."""

from __future__ import annotations

import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax


def _events(profile: Any) -> Iterator[tuple[str, float]]:
    """(name, seconds) of what ran on the first device: kernels of a GPU, operations elsewhere."""
    planes = {plane.name: plane for plane in profile.planes}
    devices = sorted(name for name in planes if re.fullmatch(r"/device:[GT]PU:\d+", name))
    if devices:
        kind = "Stream" if "GPU" in devices[0] else "XLA Ops"
        for line in planes[devices[0]].lines:
            if line.name.startswith(kind):
                yield from ((event.name, event.duration_ns / 1e9) for event in line.events)
        return
    for line in planes["/host:CPU"].lines:
        for event in line.events:
            if "hlo_op" in dict(event.stats):
                yield event.name, event.duration_ns / 1e9


def top_kernels(run: Callable[[], Any], count: int) -> list[dict[str, Any]]:
    """The kernels that took longest while `run` did its work, one device's.

    Returns:
      [{"name", "calls", "seconds", "share"}], longest first; numbers at the end of names are dropped, and
      shares are of the sum over all kernels. Nested operations of a CPU count in each other.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        (found,) = Path(folder).glob("plugins/profile/*/*.xplane.pb")
        profile = jax.profiler.ProfileData.from_file(str(found))
        times: dict[str, list[float]] = defaultdict(list)
        for name, seconds in _events(profile):
            times[re.sub(r"[._]\d+$", "", name)].append(seconds)
    total = sum(map(sum, times.values()))
    longest = sorted(times, key=lambda name: -sum(times[name]))[:count]
    return [
        {
            "name": name,
            "calls": len(times[name]),
            "seconds": sum(times[name]),
            "share": sum(times[name]) / total,
        }
        for name in longest
    ]
