"""What a device could do at best: peak FLOP/s from a table or measured, and memory in use."""

from __future__ import annotations

import re
import time
from typing import Any

import jax
import jax.numpy as jnp

PEAKS: tuple[tuple[str, float], ...] = (
    (r"H100 PCIe", 756e12),
    (r"H[12]00 NVL", 835e12),
    (r"GH200|H[12]00", 989e12),
    (r"A100", 312e12),
    (r"TPU v6", 918e12),
    (r"TPU v5 lite|TPU v5e", 197e12),
    (r"TPU v5", 459e12),
    (r"TPU v4", 275e12),
)
"""Dense bfloat16 matrix FLOP/s of one device by its kind, from the vendors' data sheets; first match."""

PLANNED = "as the compiler plans the step"

_SIDES = {"cpu": 2048}
_SIDE = 8192


def table_peak(kind: str, dtype: str) -> float | None:
    """Peak FLOP/s of a device kind for matrix products of this dtype; None where no table has it."""
    if dtype != "bfloat16":
        return None
    return next((peak for pattern, peak in PEAKS if re.search(pattern, kind)), None)


def measured_peak(dtype: str, repeats: int = 6) -> float:
    """FLOP/s of the fastest of several large square matrix products on one device."""
    side = _SIDES.get(jax.default_backend(), _SIDE)
    key = jax.random.key(0)
    x = jax.device_put(jax.random.normal(key, (side, side), jnp.dtype(dtype)), jax.devices()[0])
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        product(x, x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2.0 * side**3 / best


def peak(dtype: str, devices: int) -> tuple[float, str]:
    """Peak FLOP/s of so many devices, and where the figure comes from.

    Virtual CPU devices share the machine's cores: all of them together have the peak of one.
    """
    kind = jax.devices()[0].device_kind
    known = table_peak(kind, dtype)
    if known is not None:
        return known * devices, f"{kind}, data sheet, dense bfloat16"
    count = 1 if jax.default_backend() == "cpu" else devices
    return measured_peak(dtype) * count, f"measured by a large {dtype} matrix product"


def planned_memory(compiled: Any) -> int:
    """Bytes that the compiler plans for a program on one device, its arguments included."""
    plan = compiled.memory_analysis()
    size = plan.argument_size_in_bytes + plan.output_size_in_bytes + plan.temp_size_in_bytes
    return int(size - plan.alias_size_in_bytes)


def peak_memory(compiled: Any) -> tuple[int, str]:
    """Bytes that a device has had in use at most, and how that is known.

    The backend's own statistics of the process so far, else the compiler's plan for `compiled`.
    """
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"]), "in use at most in this process"
    return planned_memory(compiled), PLANNED
