"""Devices that are not here, to compile for: a target's name, its devices, and the memory of one.

The compilers of NVIDIA's GPUs and of TPUs come from pip and need neither GPU nor TPU, nor CUDA: the extras
`compile-cuda` and `compile-tpu`. What they say of memory, communication and kernels is what the
target's own would say; only the search for the fastest of several kernels does not run, for want of a device.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Mapping
from typing import Any

import jax
from jax.experimental import topologies

from vapi_jax.common.errors import ExpectedError

_GIB = 2**30


class TargetError(ExpectedError, ValueError):
    """A target that does not exist, or whose compiler is not installed."""


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of device.

    Attributes:
      title: what its vendor calls it.
      memory: bytes that programs can have of a device.
      link: bytes/s that a device sends to others of its node or slice, by the data sheet.
      gpu: what XLA asks a GPU for: fields of its `GpuDeviceInfoProto` that differ between these; None
        for a TPU.
    """

    title: str
    memory: int
    link: float
    gpu: Mapping[str, Any] | None = None


_HOPPER: Mapping[str, Any] = {
    "core_count": 132,
    "fpus_per_core": 128,
    "shared_memory_per_core": 233472,
    "shared_memory_per_block_optin": 232448,
    "l2_cache_size": 50 << 20,
    "clock_rate_ghz": 1.98,
    "memory_bandwidth": 3_352_320_000_000,
    "device_memory_size": 84_929_347_584,
    "compute_capability": 9,
}
_AMPERE: Mapping[str, Any] = {
    "core_count": 108,
    "fpus_per_core": 64,
    "shared_memory_per_core": 167936,
    "shared_memory_per_block_optin": 166912,
    "l2_cache_size": 40 << 20,
    "clock_rate_ghz": 1.41,
    "memory_bandwidth": 2_039_000_000_000,
    "device_memory_size": 85_094_825_984,
    "compute_capability": 8,
}
_H200 = {
    **_HOPPER,
    "memory_bandwidth": 4_800_000_000_000,
    "device_memory_size": 150_754_820_096,
}

# Of a GPU's memory JAX takes nine tenths (`compiler.reserve_memory`). A TPU's compiler refuses what is
# over the size here.
KINDS: Mapping[str, Kind] = {
    "h100": Kind("NVIDIA H100 80GB HBM3", int(0.9 * 84_929_347_584), 450e9, _HOPPER),
    "h200": Kind("NVIDIA H200", int(0.9 * 150_754_820_096), 450e9, _H200),
    "a100": Kind("NVIDIA A100-SXM4-80GB", int(0.9 * 85_094_825_984), 300e9, _AMPERE),
    "v4": Kind("TPU v4", int(31.75 * _GIB), 300e9),
    "v5e": Kind("TPU v5e", int(15.75 * _GIB), 200e9),
    "v5p": Kind("TPU v5p", int(95.74 * _GIB), 600e9),
    "v6e": Kind("TPU v6e", int(31.25 * _GIB), 448e9),
}
"""By the name that a target begins with."""

_REPORTED = {"TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e"}  # by JAX, of these

_NODE = 8  # GPUs that one machine has at most

_GPU = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared_memory_per_core}
  threads_per_core_limit: 2048
  core_count: {core_count}
  fpus_per_core: {fpus_per_core}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {memory_bandwidth}
  l2_cache_size: {l2_cache_size}
  clock_rate_ghz: {clock_rate_ghz}
  device_memory_size: {device_memory_size}
  shared_memory_per_block_optin: {shared_memory_per_block_optin}
  cuda_compute_capability {{ major: {compute_capability} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 12 minor: 8 patch: 0 }}
device_description_str: "{title}"
"""


def memory_of(device: jax.Device) -> int | None:
    """Bytes that programs can have of a device, the same on every process; None of one not known here."""
    named = KINDS.get(_REPORTED.get(device.device_kind, ""))
    known = [named] if named else [k for k in KINDS.values() if k.title == device.device_kind]
    return known[0].memory if known else None


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices to compile for.

    Attributes:
      name: such as "h100:8" or "v5e:2x4".
      kind: of each device.
      shape: of a TPU slice, in chips; the number of GPUs.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]

    @property
    def devices(self) -> int:
        return math.prod(self.shape)


def parse(name: str) -> Target:
    """The target of a name: KIND:COUNT for GPUs, KIND:CHIPSxCHIPS or xCHIPSxCHIPSxCHIPS for TPUs.

    Raises:
      TargetError: if there is none of that name.
    """
    first, _, rest = name.partition(":")
    kind = KINDS.get(first)
    if kind is None:
        raise TargetError(f"target {name!r}: no such kind of device; choose of {', '.join(KINDS)}")
    if kind.gpu is not None:
        count = int(rest) if re.fullmatch(r"\d{1,4}", rest) else 0
        if count < 1 or (count > _NODE and count % _NODE):
            raise TargetError(
                f"target {name!r}: give a number of GPUs, up to {_NODE} or a multiple of it, as in "
                f"{first}:{_NODE}"
            )
        return Target(name, kind, (count,))
    axes = 2 if first.endswith("e") else 3
    if not re.fullmatch("x".join([r"[1-9]\d?"] * axes), rest):
        example = "2x4" if axes == 2 else "2x2x1"
        raise TargetError(
            f"target {name!r}: give the chips of the slice along its {axes} axes, as in "
            f"{first}:{example}"
        )
    return Target(name, kind, tuple(int(n) for n in rest.split("x")))


def open_devices(target: Target) -> list[Any]:
    """Its devices, which compile and run nothing.

    Raises:
      TargetError: if its compiler is not installed, or has no such slice.
    """
    return _gpus(target) if target.kind.gpu is not None else _tpus(target)


def _missing(target: Target, extra: str, what: str) -> TargetError:
    return TargetError(
        f"target {target.name!r}: {what}; the extra {extra} brings it: "
        f"pip install 'vapi_jax[{extra}]'"
    )


def _gpus(target: Target) -> list[Any]:
    assert target.kind.gpu is not None
    if not any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13)):
        raise _missing(target, "compile-cuda", "the compiler for NVIDIA GPUs is not installed")
    nodes = max(target.devices // _NODE, 1)
    text = _GPU.format(title=target.kind.title, **target.kind.gpu)
    try:
        found = topologies.get_topology_desc(
            platform="cuda",
            topology_name="",
            target_config=text,
            topology=f"1x{nodes}x{target.devices // nodes}",
        )
    except NotImplementedError as error:  # as JAX says of a plugin that it could not take
        what = f"the compiler for NVIDIA GPUs does not work with jax {jax.__version__}"
        raise _missing(target, "compile-cuda", what) from error
    return list(found.devices)


def _tpus(target: Target) -> list[Any]:
    if importlib.util.find_spec("libtpu") is None:
        raise _missing(target, "compile-tpu", "the compiler for TPUs is not installed")
    # Or the library asks the network which machine this is, and tells at length that none answers.
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }.items():
        os.environ.setdefault(name, value)
    # A host has 2x2x1 chips, and a part of that where the slice is smaller.
    host = [min(n, most) for n, most in zip((*target.shape, 1)[:3], (2, 2, 1), strict=True)]
    options: dict[str, Any] = {"chips_per_host_bounds": host}
    if target.name.startswith("v4:"):  # where the two cores of a chip are one device
        options["chip_config_name"] = "megacore"
    try:
        found = topologies.get_topology_desc(target.name, "tpu", **options)
    except jax.errors.JaxRuntimeError as error:
        raise TargetError(f"target {target.name!r}: {str(error).splitlines()[0]}") from error
    return list(found.devices)
