"""What the compiler is told for each platform, and the cache of compiled programs.

On CPU one is set, for jax 0.10 and one device a process: of the others that were tried none helped
(docs/performance.md). Not set on GPU, though often seen: double-buffered loops, of which nothing is left to
hide once gathers are pipelined; command buffers, whose default is kept.
"""

import functools
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, SingleDeviceSharding

# The matrices of one layer of the largest generator (57 MB in bfloat16) travel as one collective.
_LAYER = 128 * 2**20

_BEFORE_0_11 = {
    # What goes to the library YNNPACK: its default less convolutions, with which jax 0.10's keeps two
    # cores busy for three quarters of the time, and XLA's own all of it. Several devices of one process
    # are busy side by side, and its convolutions then take less processor time.
    "xla_cpu_experimental_ynn_fusion_type": (
        "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE"
    ),
}
_SINCE_0_11 = {
    # Where estimates from data sheets order a program, which is their default since then, a layer's
    # backward collectives run beside nothing.
    "xla_gpu_enable_analytical_sol_latency_estimator": False,
    # jax 0.11 computes a product that is both used and kept for the backward pass twice, once into the
    # stack of what is kept.
    "xla_gpu_enable_dynamic_slice_fusion": False,
}

Value = bool | int | str

OPTIONS: Mapping[str, Mapping[str, Value]] = {
    "cpu": _BEFORE_0_11 if jax.__version_info__ < (0, 11) else {},
    "gpu": {
        # Starts a layer's gathers and the gradients' reduction early, beside compute; set in
        # NVIDIA's own JAX images.
        "xla_gpu_enable_latency_hiding_scheduler": True,
        # A layer's gathers go one turn of the loop ahead, under the layer before. Without it they end
        # before their own layer begins, for they travel as one. Reductions are one turn behind anyway.
        "xla_gpu_enable_pipelined_all_gather": True,
        # Matrix products by cuBLAS: the sizes here are large and regular, and the search over Triton
        # kernels is most of the time to compile.
        "xla_gpu_enable_triton_gemm": False,
        "xla_gpu_all_gather_combine_threshold_bytes": _LAYER,
        "xla_gpu_reduce_scatter_combine_threshold_bytes": _LAYER,
        "xla_gpu_all_reduce_combine_threshold_bytes": _LAYER,
        **(_SINCE_0_11 if jax.__version_info__ >= (0, 11) else {}),
    },
    "tpu": {
        # Gathers in several pieces under compute; as MaxText runs.
        "xla_tpu_overlap_compute_collective_tc": True,
        "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
    },
}
"""platform -> option -> value."""

RENAMED: Mapping[str, tuple[str, Value]] = {
    # From jax 0.11 on.
    "xla_gpu_enable_pipelined_all_gather": (
        "xla_gpu_pipeline_all_gather", "COLLECTIVE_PIPELINING_MODE_ON",
    ),
}  # fmt: skip
"""option -> what it became in a later XLA: its name, and the value that means the same."""


def options(where: Mesh | Any) -> dict[str, Value]:
    """`compiler_options` of a `jax.jit` for the devices that it runs on.

    What a person has set stays as it is: an option that XLA_FLAGS or LIBTPU_INIT_ARGS names, whatever
    its value, is left out. So is one that this version of XLA does not know, for they come and go.

    Args:
      where: a mesh, or a tree of arrays that are on the devices.

    Returns:
      {} where the arrays are being traced, for only the outermost `jax.jit` takes options; where this
      process has several CPU devices of them; and on CPUs from jax 0.11 on.
    """
    if isinstance(where, Mesh):
        devices = list(where.devices.flat)
    else:
        leaves = [x for x in jax.tree.leaves(where) if isinstance(x, jax.Array)]
        if not leaves or any(isinstance(x, jax.core.Tracer) for x in leaves):
            return {}
        devices = list(leaves[0].devices())
    here = [device for device in devices if device.process_index == jax.process_index()]
    platform = _platform(devices[0])
    if platform == "cpu" and len(here) > 1:
        return {}
    told = f"{os.environ.get('XLA_FLAGS', '')} {os.environ.get('LIBTPU_INIT_ARGS', '')}"
    named = set(re.findall(r"(?:^|\s)--?(\w+)", told))
    asked: dict[str, Value] = {}
    for name, value in OPTIONS.get(platform, {}).items():
        same = dict([(name, value), *([RENAMED[name]] if name in RENAMED else [])])
        if not named & same.keys():
            asked |= same
    unknown = _unknown((here or devices)[0], tuple(asked.items())) if asked else frozenset()
    return {name: value for name, value in asked.items() if name not in unknown}


def _platform(device: Any) -> str:
    return {"cuda": "gpu", "rocm": "gpu"}.get(device.platform, str(device.platform))


@functools.cache
def _unknown(device: Any, asked: tuple[tuple[str, Value], ...]) -> frozenset[str]:
    """The options that a device's compiler has no such name for: it says one at a time."""
    program = jax.jit(jnp.negative, in_shardings=SingleDeviceSharding(device))
    lowered, unknown = program.lower(jax.ShapeDtypeStruct((), jnp.float32)), set[str]()
    while True:
        # JAX takes numbers as well, but names strings and booleans alone.
        left: Any = {name: value for name, value in asked if name not in unknown}
        try:
            lowered.compile(left)
        except jax.errors.JaxRuntimeError as error:
            named = re.search(r"No such compile option: '(\w+)'", str(error))
            if named is None or named[1] in unknown:
                raise
            unknown.add(named[1])
        else:
            return frozenset(unknown)


def reserve_memory() -> None:
    """Nine tenths of a GPU's memory to JAX, in place of three quarters: nothing else wants it.

    Where no variable says otherwise, and before devices are used.
    """
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:  # the older name
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.9")


def enable_compilation_cache(directory: Path) -> Path | None:
    """Keeps compiled programs in a directory, so that the same step is compiled once.

    A run keeps them in its workdir: what it compiled is there when it is resumed, and goes when the
    workdir goes. Programs that compile in under a second are not kept. A place that JAX has been given
    already (JAX_COMPILATION_CACHE_DIR) stays.

    Returns:
      The directory, or None where another was set.
    """
    if jax.config.values["jax_compilation_cache_dir"] is not None:
        return None
    jax.config.update("jax_compilation_cache_dir", str(directory))
    return directory
