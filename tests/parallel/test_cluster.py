"""Which of a run's processes is this?"""

import os

import pytest

from vapi_jax.parallel.cluster import DistributedError, Process, find_process

STEP = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "gpu[007-009]",
    "SLURM_STEP_TASKS_PER_NODE": "1(x3)",
    "SLURM_NTASKS": "3",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}
MPI = {
    "OMPI_MCA_orte_hnp_uri": "4096.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
SHARED = STEP | {"SLURM_STEP_TASKS_PER_NODE": "3", "SLURM_LOCALID": "2"}


@pytest.fixture
def environ(monkeypatch):
    """Sets variables in an environment that has none of a scheduler's."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "KUBERNETES_", "CUDA_VISIBLE")):
            monkeypatch.delenv(name)
    return lambda variables: [monkeypatch.setenv(*item) for item in variables.items()]


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        ({"JAX_NUM_PROCESSES": "1"}, None),
        (STEP, Process("gpu007:61441", 3, 2)),
        (STEP | {"JAX_COORDINATOR_ADDRESS": "other:99"}, Process("other:99", 3, 2)),
        (STEP | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
        # A batch script is told of the job's tasks, but is none of them.
        ({k: v for k, v in STEP.items() if k != "SLURM_STEP_NODELIST"}, None),
        (SHARED, Process("gpu007:61441", 3, 2, (2,))),
        (SHARED | {"CUDA_VISIBLE_DEVICES": "2"}, Process("gpu007:61441", 3, 2)),
        (SHARED | {"CUDA_VISIBLE_DEVICES": "2,3"}, Process("gpu007:61441", 3, 2, (2,))),
        (SHARED | {"JAX_LOCAL_DEVICE_IDS": "0,1"}, Process("gpu007:61441", 3, 2)),
        (MPI, Process("10.96.0.1:61441", 2, 1, (1,))),
        (
            {
                "JAX_COORDINATOR_ADDRESS": "[::1]:80",
                "JAX_NUM_PROCESSES": "8",
                "JAX_PROCESS_ID": "0",
            },
            Process("[::1]:80", 8, 0),
        ),
    ],
)
def test_a_process_finds_itself_in_the_environment(environ, variables, expected):
    environ(variables)
    assert find_process() == expected


def test_flags_go_before_the_environment(environ):
    environ(STEP)
    assert find_process("a:1", 5, 0) == Process("a:1", 5, 0)
    assert find_process(process_id=1) == Process("gpu007:61441", 3, 1)
    assert find_process(num_processes=1) is None
    assert find_process(method="deactivate") is None


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        (("a:1", None, None), {}, "--num_processes .* and --process_id .* are missing"),
        (
            (None, 2, 0),
            {},
            r"here --coordinator=HOST:PORT \(or JAX_COORDINATOR_ADDRESS\) is missing",
        ),
        (("a:1", 2, 2), {}, "process_id=2 of num_processes=2: .* the last is 1"),
        (("a:1", 2, -1), {}, "process_id=-1 of"),
        (("a:1", 0, 0), {}, "num_processes=0"),
        (("a", 2, 0), {}, "coordinator='a': give HOST:PORT"),
        (("a:99999", 2, 0), {}, "coordinator='a:99999'"),
        ((None, None, None), {"JAX_PROCESS_ID": "first"}, "JAX_PROCESS_ID='first'.* no number"),
        ((), STEP | {"SLURM_JOB_ID": "x"}, "ValueError.* --num_processes=1"),
    ],
)
def test_what_is_missing_or_impossible_is_named(environ, arguments, variables, message):
    environ(variables)
    with pytest.raises(DistributedError, match=message):
        find_process(*arguments)


@pytest.mark.parametrize(("method", "named"), [("slurm", "SLURM_JOB_ID"), ("lsf", "no lsf here")])
def test_a_way_to_find_out_that_does_not_work_is_refused(environ, method, named):
    environ({})
    with pytest.raises(DistributedError, match=named):
        find_process(method=method)
