"""Which process of a run this is: told by flags or environment variables, or found by JAX.

JAX asks SLURM, Cloud TPU, Kubernetes (GKE), Open MPI and, where told to, mpi4py.
"""

import dataclasses
import os
import re
from collections.abc import Mapping
from typing import Any

# There is no public way to ask without joining, and whom to join must be known before.
from jax._src.clusters import ClusterEnv

from vapi_jax.common.errors import ExpectedError

TIMEOUT = 300.0
"""Seconds that processes wait for each other at the start, unless told otherwise."""


class DistributedError(ExpectedError, RuntimeError):
    """Processes do not come together: says what is missing or unreachable."""


@dataclasses.dataclass(frozen=True)
class Process:
    """One process among others, in the words of `jax.distributed.initialize`.

    Attributes:
      coordinator_address: "host:port" where process 0 listens.
      num_processes: how many there are, two or more.
      process_id: which of them this is, from 0.
      local_device_ids: the GPUs that it uses where its machine has several processes of the run; None
        for all that it sees.
    """

    coordinator_address: str
    num_processes: int
    process_id: int
    local_device_ids: tuple[int, ...] | None = None

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of the coordinator."""
        host, _, port = self.coordinator_address.rpartition(":")
        return host.strip("[]"), int(port)


def find_process(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    method: str | None = None,
    timeout: float = TIMEOUT,
    environ: Mapping[str, str] = os.environ,
) -> Process | None:
    """Which process this is; None where it is the only one.

    Each of the three is the argument where given, else JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES or
    JAX_PROCESS_ID, else what JAX finds out. A process that JAX finds to be one of several on its
    machine takes one GPU, unless it sees one only or JAX_LOCAL_DEVICE_IDS says which.

    Args:
      coordinator_address, num_processes, process_id: as in `Process`.
      method: what JAX asks, by its own name ("slurm", "mpi4py", ...), or "deactivate" for nothing;
        None for whatever it recognises.
      timeout: seconds that JAX may wait for the coordinator's name.
      environ: where the variables named above are looked up.

    Raises:
      DistributedError: some of the three are known and others not, or one is impossible.
    """
    told: list[Any] = [
        coordinator_address or environ.get("JAX_COORDINATOR_ADDRESS") or None,
        _number(environ, "JAX_NUM_PROCESSES") if num_processes is None else num_processes,
        _number(environ, "JAX_PROCESS_ID") if process_id is None else process_id,
    ]
    local = None
    if told[1] != 1 and None in told and method != "deactivate":
        try:
            *told, local = ClusterEnv.auto_detect_unset_distributed_params(
                told[0], told[1], told[2], None, method, int(timeout)
            )
        except Exception as error:  # whatever a scheduler's interface raises
            raise DistributedError(
                f"JAX could not find out which process this is ({type(error).__name__}: {error}). Give "
                "--coordinator, --num_processes and --process_id, or --num_processes=1 for this one "
                "alone"
            ) from error
    if told == [None] * 3 and method not in (None, "deactivate"):
        raise DistributedError(
            f"JAX finds no {method} here: it is none of its methods, or not in use"
        )
    coordinator, count, index = told
    if count == 1 or told == [None] * 3:
        return None
    flags = {
        "--coordinator=HOST:PORT (or JAX_COORDINATOR_ADDRESS)": coordinator,
        "--num_processes (or JAX_NUM_PROCESSES)": count,
        "--process_id (or JAX_PROCESS_ID)": index,
    }
    if missing := [flag for flag, value in flags.items() if value is None]:
        raise DistributedError(
            f"a run of several processes needs {', '.join(flags)} in each of them; here "
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing"
        )
    if count < 1 or not 0 <= index < count:
        raise DistributedError(
            f"process_id={index} of num_processes={count}: processes are counted from 0, so that the "
            f"last is {max(count, 1) - 1}"
        )
    port = re.fullmatch(r".*[^:]:(\d{1,5})", coordinator)
    if not port or not 0 < int(port[1]) < 2**16:
        raise DistributedError(
            f"coordinator={coordinator!r}: give HOST:PORT of process 0, such as node1:12345"
        )
    here = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", "")
    alone = re.match(r"1\b", here)
    # With --gpus-per-task each task sees its own GPU only, and that is its number 0.
    sees_one = re.fullmatch(r"[^,]+", environ.get("CUDA_VISIBLE_DEVICES", ""))
    if local is None or alone or sees_one or "JAX_LOCAL_DEVICE_IDS" in environ:
        return Process(coordinator, count, index)
    return Process(coordinator, count, index, tuple(local))


def _number(environ: Mapping[str, str], name: str) -> int | None:
    text = environ.get(name) or None
    if text is not None and not re.fullmatch(r"\d{1,9}", text):
        raise DistributedError(f"the environment says {name}={text!r}, which is no number")
    return None if text is None else int(text)
