"""Scripts that start a run on several machines."""

import shlex
import subprocess

import pytest
import yaml

from tests.helpers.paths import ROOT
from tests.helpers.processes import environment, one_run, program
from vapi_jax.__main__ import COMMANDS
from vapi_jax.parallel.cluster import find_process


@pytest.mark.parametrize("script", ["slurm.sbatch", "tpu_pod.sh"])
def test_launch_scripts_parse_and_tell_their_usage(script):
    subprocess.run(["bash", "-n", f"launch/{script}"], cwd=ROOT, check=True)
    done = subprocess.run(
        ["bash", f"launch/{script}", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("usage: ")
    assert done.stderr == ""
    none = subprocess.run(
        ["bash", f"launch/{script}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (none.returncode, none.stdout) == (2, "")
    assert none.stderr.startswith("usage: ")


@pytest.mark.parametrize("command", [[], ["sample"]])
def test_words_reach_every_machine_of_a_pod_as_they_were_given(tmp_path, command):
    path = program(tmp_path / "bin", "gcloud", '#!/usr/bin/env bash\nprintf "%s\\0" "$@"\n')
    words = [*command, "--config=a b.py:tiny", "--workdir=/mnt/$HOME/'x'", "--config.name=a;b"]
    done = subprocess.run(
        ["bash", "launch/tpu_pod.sh", "my-slice", *words],
        cwd=ROOT,
        env=environment(PATH=path, ZONE="us-1"),
        capture_output=True,
        text=True,
        check=True,
    )
    *options, line, _ = done.stdout.split("\0")
    assert options[-3:] == ["my-slice", "--worker=all", "--zone=us-1"]
    there = line.removeprefix("--command=")
    assert shlex.split(there) == [
        "cd", "vapi_jax", "&&", "exec", ".venv/bin/python", "-m", "vapi_jax", *(command or ["main"]),
        *words[len(command):],
    ]  # fmt: skip


def test_slurm_starts_any_command(tmp_path):
    """The script alone: srun says what it was given."""
    srun = '#!/usr/bin/env bash\necho "$SRUN_CPUS_PER_TASK cores" "$@"\n'
    path = program(tmp_path / "bin", "srun", srun)
    env = environment(PATH=path, PYTHON="python", SLURM_CPUS_PER_TASK="32")
    for given, wanted in (("--a=b", "main --a=b"), ("sample --c", "sample --c")):
        told = one_run(["bash", "launch/slurm.sbatch", *given.split()], env)
        assert told.strip().endswith(f"python -m vapi_jax {wanted}")
        assert told.startswith("32 cores ")


def test_the_jobset_agrees_with_itself_and_with_the_package():
    """Its schema is JobSet's own, some 800 kB, and is not here."""
    jobset = yaml.safe_load((ROOT / "launch" / "jobset.yaml").read_text(encoding="utf-8"))
    (workers,) = jobset["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    environ = {entry["name"]: entry.get("value", "1") for entry in container["env"]}
    me = find_process(environ=environ, method="deactivate")
    assert me.num_processes == job["parallelism"] == job["completions"]
    name = jobset["metadata"]["name"]
    assert me.address[0] == f"{name}-{workers['name']}-0-0.{name}"
    module, command = container["command"][-1], container["args"][0]
    assert (module, job["completionMode"]) == ("vapi_jax", "Indexed")
    assert command in COMMANDS
    assert "--stopped_status=75" in container["args"]  # 0 would be done
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in job["template"]["spec"]["volumes"]}
