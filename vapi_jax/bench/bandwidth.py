"""How fast memory lets tokens be drawn: what a decoding step reads, and how fast a device reads.

A decoding step multiplies every weight with a handful of rows, so what bounds it is not arithmetic but
reading. Each device reads all weights for its share of the rows, once, and its share's cache of keys
and values. Left out, as small beside those: the looked-up rows of embeddings, activations, logits, and
what is written.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from vapi_jax.models.sampling import segments

BANDWIDTHS: tuple[tuple[str, float], ...] = (
    (r"GH200", 4.0e12),
    (r"H200", 4.8e12),
    (r"H100 PCIe", 2.0e12),
    (r"H100 NVL", 3.9e12),
    (r"H100", 3.35e12),
    (r"A100.*40GB", 1.555e12),
    (r"A100 80GB PCIe", 1.935e12),
    (r"A100", 2.039e12),
    (r"TPU v6", 1.638e12),
    (r"TPU v5 lite|TPU v5e", 0.819e12),
    (r"TPU v5", 2.765e12),
    (r"TPU v4", 1.228e12),
)
"""Bytes/s of one device's memory by its kind, from the vendors' data sheets; first match."""

SOURCE = "measured: the faster of summing rows and of adding in place, over a large float32 array"

_LOOKED_UP = ("tok_embeddings", "cls_embedding")
_BYTES = {"cpu": 2**28}  # far more than a processor's caches hold
_DEVICE_BYTES = 2**29
_COLUMNS = 2**16


def table_bandwidth(kind: str) -> float | None:
    """Bytes/s of a device kind by its data sheet; None where no table has it."""
    return next((value for pattern, value in BANDWIDTHS if re.search(pattern, kind)), None)


def measured_bandwidth(repeats: int = 8, size: int | None = None) -> float:
    """Bytes/s of the fastest of several passes over a large array on one device.

    Two kinds of pass, for on some devices a reduction and on others a plain loop is the slower: a sum
    over rows, which reads, and an addition in place, which reads and writes. A copy into a new array
    would on a CPU measure how fast the system hands out pages.

    Args:
      repeats: of each kind.
      size: bytes of the array; by default much more than caches hold.
    """
    size = size or _BYTES.get(jax.default_backend(), _DEVICE_BYTES)
    columns = min(_COLUMNS, size // 4)
    x = jax.device_put(jnp.zeros((size // 4 // columns, columns), jnp.float32), jax.devices()[0])
    size = x.nbytes
    read = jax.jit(lambda x: jnp.sum(x, axis=1))
    add = jax.jit(lambda x: x + 1.0, donate_argnums=0)
    read(x).block_until_ready()
    x = add(x).block_until_ready()
    best = 0.0
    for _ in range(repeats):
        start = time.perf_counter()
        read(x).block_until_ready()
        middle = time.perf_counter()
        x = add(x).block_until_ready()
        end = time.perf_counter()
        best = max(best, size / (middle - start), 2 * size / (end - middle))
    return best


@dataclass(frozen=True)
class StepBytes:
    """What one device reads for one decoding step, in bytes.

    Attributes:
      weights: all but tables of embeddings, as they are held.
      weights_computed: the same in the dtype that matrices are multiplied in: what a compiler reads
        that keeps a converted copy.
      cache_filled: keys and values of the positions filled so far, the mean over an image's steps.
      cache_read: of all positions that the loop has made room for, filled or not, the mean as well.
    """

    weights: int
    weights_computed: int
    cache_filled: float
    cache_read: float


def mean_filled(prefix: int, tokens: int) -> float:
    """Cache positions that a step has to read, the mean over the tokens - 1 steps of an image.

    The step that takes in token i attends to `prefix` positions of the condition and tokens 0 .. i.
    """
    return prefix + tokens / 2


def weight_bytes(params: Mapping[str, Any], itemsize: int | None = None) -> int:
    """Bytes of all parameters but tables of embeddings.

    Args:
      params: arrays, or their shapes.
      itemsize: of a number; None is as they are held.
    """
    return sum(
        leaf.size * (itemsize or leaf.dtype.itemsize)
        for name, tree in params.items()
        for leaf in jax.tree.leaves(tree)
        if name not in _LOOKED_UP
    )


def step_bytes(policy: Any, params: Any, condition: Any, devices: int, guided: bool) -> StepBytes:
    """What each device reads for a step over a batch.

    Args:
      policy, params: the generator.
      condition: of the batch, or shapes of one.
      devices: that share its rows.
      guided: whether every row has its unconditional twin.
    """

    def prefill(params: Any, condition: Any) -> Any:
        if guided:
            both = [condition, policy.unconditional(condition)]
            condition = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), *both)
        return policy.prefill(params, condition)[1]

    cache = jax.eval_shape(prefill, params, condition)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in (*cache.keys, *cache.values))
    prefix, tokens = cache.keys[0].shape[2], policy.num_tokens
    position = size / prefix / devices
    ends = segments(tokens - 1)
    read = sum(end * (end - start) for start, end in zip([0, *ends], ends, strict=False)) / ends[-1]
    return StepBytes(
        weights=weight_bytes(params),
        weights_computed=weight_bytes(params, jnp.dtype(policy.compute_dtype).itemsize),
        cache_filled=position * mean_filled(prefix, tokens),
        cache_read=position * (prefix + read),
    )


def limits(
    found: StepBytes, batch: int, bandwidth: float, sharing: int, tokens_per_second: float
) -> dict[str, dict[str, float]]:
    """Tokens/s that reading allows, and the share of them that was reached.

    Args:
      found: what a step reads.
      batch: tokens that a step draws, over all devices.
      bandwidth: bytes/s of a memory.
      sharing: devices at one memory: 1, but all of a CPU's virtual ones.
      tokens_per_second: measured, over all devices.

    Returns:
      By what is read: "needed" (weights as held, filled positions), "read" (all positions that are read)
      and "computed" (filled positions, weights in the compute dtype): bytes_per_step (of one device),
      tokens_per_second, share.
    """
    cases = {
        "needed": found.weights + found.cache_filled,
        "read": found.weights + found.cache_read,
        "computed": found.weights_computed + found.cache_filled,
    }
    most = {name: batch * bandwidth / (size * sharing) for name, size in cases.items()}
    return {
        name: {
            "bytes_per_step": size,
            "tokens_per_second": most[name],
            "share": tokens_per_second / most[name],
        }
        for name, size in cases.items()
    }
