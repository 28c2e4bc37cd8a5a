"""Which process of a run this is: told by flags, environment variables, SLURM or Cloud TPU.

Nothing here imports JAX before it is needed.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from typing import Any

from vapi_jax.common.errors import ExpectedError

_TPU_CLUSTERS = ("gcetpu", "gketpu")
_COORDINATOR_TIMEOUT = 300  # seconds until a pod's first host has a name


class DistributedError(ExpectedError, RuntimeError):
    """Processes do not come together: says what is missing or unreachable."""


@dataclasses.dataclass(frozen=True)
class Place:
    """One process among others.

    Attributes:
      coordinator: "host:port" where process 0 listens.
      processes: how many there are, two or more.
      process: which of them this is, from 0.
      local_devices: the GPUs of its machine that it uses; None for all that it sees.
    """

    coordinator: str
    processes: int
    process: int
    local_devices: tuple[int, ...] | None = None

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of the coordinator."""
        host, _, port = self.coordinator.rpartition(":")
        return host.strip("[]"), int(port)


def find_place(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Place | None:
    """Which process this is; None where it is the only one.

    Each of the three is the argument where given, else JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES or
    JAX_PROCESS_ID, else what SLURM (a step started by srun) or Cloud TPU says.

    Raises:
      DistributedError: some of the three are known and others not, or one is impossible.
    """
    told: dict[str, Any] = {
        "coordinator": coordinator or environ.get("JAX_COORDINATOR_ADDRESS") or None,
        "processes": _first(num_processes, _number(environ, "JAX_NUM_PROCESSES")),
        "process": _first(process_id, _number(environ, "JAX_PROCESS_ID")),
    }
    if None in told.values():
        cluster = _slurm(environ) or (_cloud_tpu() if told["processes"] is None else {})
        told = cluster | {name: value for name, value in told.items() if value is not None}
    if not told or told.get("processes") == 1:
        return None
    flags = {
        "coordinator": "--coordinator=HOST:PORT (or JAX_COORDINATOR_ADDRESS)",
        "processes": "--num_processes (or JAX_NUM_PROCESSES)",
        "process": "--process_id (or JAX_PROCESS_ID)",
    }
    if missing := [flag for name, flag in flags.items() if name not in told]:
        raise DistributedError(
            f"a run of several processes needs {', '.join(flags.values())} in each of them; here "
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing"
        )
    place = Place(**told)
    if place.processes < 1 or not 0 <= place.process < place.processes:
        raise DistributedError(
            f"process_id={place.process} of num_processes={place.processes}: processes are counted "
            f"from 0, so that the last is {max(place.processes, 1) - 1}"
        )
    port = re.fullmatch(r".*[^:]:(\d{1,5})", place.coordinator)
    if not port or not 0 < int(port[1]) < 2**16:
        raise DistributedError(
            f"coordinator={place.coordinator!r}: give HOST:PORT of process 0, such as node1:12345"
        )
    return place


def _first(given: int | None, otherwise: int | None) -> int | None:
    return otherwise if given is None else given


def _number(environ: Mapping[str, str], name: str) -> int | None:
    text = environ.get(name) or None
    if text is not None and not re.fullmatch(r"\d{1,9}", text):
        raise DistributedError(f"the environment says {name}={text!r}, which is no number")
    return None if text is None else int(text)


def _slurm(environ: Mapping[str, str]) -> dict[str, Any]:
    """What SLURM says of a step of several tasks; {} outside of one.

    A batch script has most of these variables as well, but is no task of a step.
    """
    nodes, process = environ.get("SLURM_STEP_NODELIST"), _number(environ, "SLURM_PROCID")
    processes = _number(environ, "SLURM_STEP_NUM_TASKS") or _number(environ, "SLURM_NTASKS")
    if not nodes or process is None or processes in (None, 1):
        return {}
    run = (_number(environ, "SLURM_JOB_ID") or 0) + (_number(environ, "SLURM_STEP_ID") or 0)
    # Above the ports that Linux gives away itself, and another one for another job or step.
    found = {"coordinator": f"{first_host(nodes)}:{61440 + run % 4096}"}
    tasks = re.match(r"\d+", environ.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    local = _number(environ, "SLURM_LOCALID")
    visible = environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    # With --gpus-per-task each task sees its own GPU only, and that is its number 0.
    bound = visible != [""] and len(visible) == 1
    alone = tasks is None or int(tasks[0]) == 1
    devices = None if alone or bound or local is None else (local,)
    return found | {"processes": processes, "process": process, "local_devices": devices}


def first_host(nodes: str) -> str:
    """The first host of a SLURM node list: "gpu[007-9,12],login" -> "gpu007"."""
    item = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    assert item is not None
    return re.sub(r"\[([^],-]*)[^]]*\]", r"\1", item[0])


def _cloud_tpu() -> dict[str, Any]:
    """What a Cloud TPU virtual machine says of its pod; {} elsewhere."""
    import jax  # noqa: F401  # looks whether this is such a machine
    from jax._src.clusters import ClusterEnv  # there is no public way to ask without joining

    for cluster in ClusterEnv._cluster_types:
        if cluster.name in _TPU_CLUSTERS and cluster.is_env_present():
            return {
                "coordinator": cluster.get_coordinator_address(_COORDINATOR_TIMEOUT, None),
                "processes": cluster.get_process_count(),
                "process": cluster.get_process_id(),
            }
    return {}
