"""Compiler flags for each kind of device, and the cache of compiled programs; to be set before JAX starts.

What a person has set stays as it is: a flag that XLA_FLAGS or LIBTPU_INIT_ARGS already names is not
touched, nor is a variable that exists. XLA ends the process at a flag that it does not know, so each
flag is first looked for in the libraries that will read it, and left out where they have none.

    platform  variable          flag
    gpu       XLA_FLAGS         xla_gpu_enable_latency_hiding_scheduler=true
                                  starts a layer's gathers and the gradients' reduction early, beside
                                  compute; set in NVIDIA's own JAX images
                                xla_gpu_enable_triton_gemm=false
                                  matrix products by cuBLAS: the sizes here are large and regular, and
                                  the search over Triton kernels is most of the time to compile
                                xla_gpu_{all_gather,reduce_scatter,all_reduce}_combine_threshold_bytes
                                  128 MB: the matrices of one layer of the largest generator (57 MB in
                                  bfloat16) travel as one collective
              XLA_PYTHON_CLIENT_MEM_FRACTION=0.9
                                  of the memory to JAX, in place of 0.75: nothing else wants it
    tpu       LIBTPU_INIT_ARGS  xla_tpu_overlap_compute_collective_tc=true,
                                xla_tpu_enable_async_collective_fusion_multiple_steps=true
                                  gathers in several pieces under compute; as MaxText runs

On CPU nothing is set: of the flags that were tried none helped (docs/performance.md). Not set on GPU,
though often seen: pipelined collectives and double-buffered loops, which change the loops
themselves and wait for a measurement; command buffers, whose default is kept.
"""

from __future__ import annotations

import importlib.util
import mmap
import os
import re
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from pathlib import Path

_LAYER = 128 * 2**20

FLAGS: Mapping[str, Mapping[str, Mapping[str, str]]] = {
    "gpu": {
        "XLA_FLAGS": {
            "xla_gpu_enable_latency_hiding_scheduler": "true",
            "xla_gpu_enable_triton_gemm": "false",
            "xla_gpu_all_gather_combine_threshold_bytes": str(_LAYER),
            "xla_gpu_reduce_scatter_combine_threshold_bytes": str(_LAYER),
            "xla_gpu_all_reduce_combine_threshold_bytes": str(_LAYER),
        }
    },
    "tpu": {
        "LIBTPU_INIT_ARGS": {
            "xla_tpu_overlap_compute_collective_tc": "true",
            "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
        }
    },
    "cpu": {},
}
"""platform -> environment variable -> flag -> value."""

VARIABLES: Mapping[str, Mapping[str, str]] = {"gpu": {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9"}}
"""platform -> environment variable -> value."""

_CUDA_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")
_DEVICES = {"gpu": ("/dev/nvidiactl", "/dev/dxg"), "tpu": ("/dev/accel0", "/dev/vfio/0")}
_READERS = {
    "gpu": (
        "jaxlib/libjax_common.so",
        "jax_plugins/xla_cuda13/xla_cuda_plugin.so",
        "jax_plugins/xla_cuda12/xla_cuda_plugin.so",
    ),
    "tpu": ("libtpu/libtpu.so",),
}


def merge(current: str, wanted: Mapping[str, str]) -> str:
    """A variable's flags with those added that it does not name yet, whatever value it gives them.

    >>> merge("--xla_a=1", {"xla_a": "2", "xla_b": "true"})
    '--xla_a=1 --xla_b=true'
    """
    named = set(re.findall(r"(?:^|\s)--?(\w+)", current))
    added = [f"--{name}={value}" for name, value in wanted.items() if name not in named]
    return " ".join([*current.split(), *added]) if added else current


def guess_platform(
    environment: Mapping[str, str], packages: Iterable[str], devices: Iterable[str]
) -> str:
    """ "gpu", "tpu" or "cpu": what JAX will choose, told without starting it.

    Args:
      environment: where JAX_PLATFORMS, if set, decides by its first name.
      packages: importable packages, of which the plugins' names count.
      devices: paths that exist, of which device files count.
    """
    asked = environment.get("JAX_PLATFORMS", "").split(",")[0].strip().lower()
    if asked:
        return {"cuda": "gpu", "gpu": "gpu", "tpu": "tpu"}.get(asked, "cpu")
    there, found = set(devices), set(packages)
    if "libtpu" in found and there & set(_DEVICES["tpu"]):
        return "tpu"
    if found & set(_CUDA_PLUGINS) and there & set(_DEVICES["gpu"]):
        return "gpu"
    return "cpu"


def known_flags(names: Iterable[str], libraries: Sequence[Path]) -> set[str]:
    """Those of the flags that every one of the libraries knows; none without libraries."""
    known = set(names)
    for library in libraries:
        with (
            library.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            known = {name for name in known if content.find(name.encode() + b"\0") >= 0}
    return known if libraries else set()


def apply(
    environment: MutableMapping[str, str],
    platform: str,
    libraries: Sequence[Path],
) -> dict[str, str]:
    """Adds the platform's settings to an environment.

    Args:
      environment: changed in place.
      platform: a key of `FLAGS`.
      libraries: that will read the flags.

    Returns:
      The variables that were changed, with their new values.
    """
    changed = {}
    for variable, flags in FLAGS[platform].items():
        known = known_flags(flags, libraries)
        before = environment.get(variable, "")
        after = merge(before, {name: value for name, value in flags.items() if name in known})
        if after != before:
            changed[variable] = after
    fixed = VARIABLES.get(platform, {})
    changed |= {name: value for name, value in fixed.items() if name not in environment}
    environment.update(changed)
    return changed


def _packages(names: Iterable[str]) -> list[str]:
    return [name for name in names if importlib.util.find_spec(name) is not None]


def _libraries(platform: str) -> list[Path]:
    """The installed libraries that read a platform's flags."""
    found = []
    for place in _READERS.get(platform, ()):
        package, _, rest = place.partition("/")
        spec = importlib.util.find_spec(package)
        folders = spec.submodule_search_locations if spec else None
        found += [
            Path(folder) / rest for folder in folders or () if (Path(folder) / rest).is_file()
        ]
    return found


def apply_here() -> dict[str, str]:
    """`apply` to this process for the devices of this machine; must come before JAX is imported.

    Returns:
      The variables that were changed, with their new values.
    """
    devices = [path for paths in _DEVICES.values() for path in paths if Path(path).exists()]
    packages = _packages(("libtpu", *_CUDA_PLUGINS))
    platform = guess_platform(os.environ, packages, devices)
    return apply(os.environ, platform, _libraries(platform))


def enable_compilation_cache(directory: Path) -> Path | None:
    """Keeps compiled programs in a directory, so that the same step is compiled once.

    A run keeps them in its workdir: what it compiled is there when it is resumed, and goes when the
    workdir goes. Programs that compile in under a second are not kept. A place that JAX has been given
    already (JAX_COMPILATION_CACHE_DIR) stays.

    Returns:
      The directory, or None where another was set.
    """
    import jax  # with it the devices' settings are read, which must come after `apply_here`

    if jax.config.values["jax_compilation_cache_dir"] is not None:
        return None
    jax.config.update("jax_compilation_cache_dir", str(directory))
    return directory
