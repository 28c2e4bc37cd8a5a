"""Flags that say which of several processes this is, for absl's commands and for argparse's.

Importing this module defines absl's. `vapi_jax.parallel.distributed.as_one` takes their values.
"""

import argparse
from typing import Any

from absl import flags

flags.DEFINE_string("coordinator", None, "Several processes: HOST:PORT at which process 0 listens")
flags.DEFINE_integer("num_processes", None, "Several processes: how many")
flags.DEFINE_integer("process_id", None, "Several processes: which one, from 0")
flags.DEFINE_float(
    "initialization_timeout",
    300.0,
    "Several processes: seconds to wait for each other at the start",
    lower_bound=1.0,
)
flags.DEFINE_string(
    "cluster_detection_method",
    None,
    "Several processes: what JAX asks which one this is: slurm, ompi, mpi4py, k8s, gcetpu, gketpu, or "
    "deactivate for nothing; by default whatever it recognises, mpi4py apart",
)
NAMES = {
    "coordinator": "coordinator_address",
    "num_processes": "num_processes",
    "process_id": "process_id",
    "initialization_timeout": "timeout",
    "cluster_detection_method": "method",
}
"""The flags, and what `distributed.as_one` calls them."""


def add_process_flags(parser: argparse.ArgumentParser) -> None:
    """The same flags for argparse."""
    group = parser.add_argument_group("several processes", "see docs/distributed.md")
    for name in NAMES:
        flag = flags.FLAGS[name]
        text = flag.help.removeprefix("Several processes: ")
        group.add_argument(f"--{name}", type=flag.parser.parse, default=flag.default, help=text)


def process_flags(args: argparse.Namespace | None = None) -> dict[str, Any]:
    """Their values as `distributed.as_one` takes them: of argparse's namespace, or absl's."""
    return {
        word: getattr(flags.FLAGS if args is None else args, name) for name, word in NAMES.items()
    }
