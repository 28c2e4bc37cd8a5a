"""What the compiler is told for each platform, and the cache of compiled programs.

On CPU nothing is set: of the flags that were tried none helped (docs/performance.md). Not set on GPU,
though often seen: double-buffered loops, of which nothing is left to hide once gathers are pipelined;
command buffers, whose default is kept.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

# The matrices of one layer of the largest generator (57 MB in bfloat16) travel as one collective.
_LAYER = 128 * 2**20

OPTIONS: Mapping[str, Mapping[str, bool | int]] = {
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
    },
    "tpu": {
        # Gathers in several pieces under compute; as MaxText runs.
        "xla_tpu_overlap_compute_collective_tc": True,
        "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
    },
}
"""platform -> option -> value."""


def options(where: Mesh | Any) -> dict[str, bool | int]:
    """`compiler_options` of a `jax.jit` for the devices that it runs on.

    What a person has set stays as it is: an option that XLA_FLAGS or LIBTPU_INIT_ARGS names, whatever
    its value, is left out.

    Args:
      where: a mesh, or a tree of arrays that are on the devices.

    Returns:
      {} on CPU, and where the arrays are being traced: only the outermost `jax.jit` takes options.
    """
    if isinstance(where, Mesh):
        device = where.devices.flat[0]
    else:
        leaves = [x for x in jax.tree.leaves(where) if isinstance(x, jax.Array)]
        if not leaves or any(isinstance(x, jax.core.Tracer) for x in leaves):
            return {}
        device = next(iter(leaves[0].devices()))
    told = f"{os.environ.get('XLA_FLAGS', '')} {os.environ.get('LIBTPU_INIT_ARGS', '')}"
    named = set(re.findall(r"(?:^|\s)--?(\w+)", told))
    platform = {"cuda": "gpu", "rocm": "gpu"}.get(device.platform, device.platform)
    return {name: v for name, v in OPTIONS.get(platform, {}).items() if name not in named}


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
