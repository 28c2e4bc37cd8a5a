"""The command line: what it says to a person, and when."""

import json

import pytest

from tests.helpers import commands
from tests.helpers.messages import assert_mentions
from tests.helpers.paths import ROOT

XXL = "--config=configs/c2i_xxl.py:tiny"


def test_help_comes_without_importing_jax():
    text, imported = commands.show_help("-m", "vapi_jax.main")
    assert "--workdir" in text
    assert "--config" in text
    assert "c2i_demo:tiny" in text
    assert "ml_collections" in imported
    assert not {"jax", "flax", "vapi_jax.training.run"} & imported


@pytest.mark.parametrize("arguments", [(), (XXL,), ("--workdir=/tmp/nowhere",)])
def test_missing_flags_are_named(arguments):
    done = commands.module("main", *arguments)
    assert done.returncode == 1
    assert_mentions(done.stdout + done.stderr, "--config", "--workdir")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--config=configs/absent.py",), "configs/absent.py"),
        (("--config=configs/c2i_xxl.py:huge",), "tiny, h100x1"),
        ((XXL, "--config.steps=many"), "--config.steps=many"),
        ((XXL, "--config.vappi.group_size=4"), "'vappi'"),
        ((XXL, "--worksdir=x"), "workdir"),
        ((XXL, "and", "more"), "and more"),
        ((XXL, "--profile=3:3"), "'3:3'"),
        ((XXL, "--profile=7"), "'7'"),
    ],
)
def test_flags_that_mean_nothing(arguments, message):
    done = commands.module("main", *arguments, "--check")
    assert done.returncode == 1
    assert message in done.stdout + done.stderr
    assert "vapi_jax/training/run.py" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--target=h100:8", "--workdir=/tmp/nowhere"), ("--target", "--check")),
        (("--target=h1000:8", "--check"), ("h1000:8", "v5e")),
        (("--target=v5e:8", "--check"), ("v5e:2x4",)),
    ],
)
def test_targets_that_mean_nothing(arguments, told):
    done = commands.module("main", XXL, *arguments)
    assert done.returncode == 1
    assert_mentions(done.stdout + done.stderr, *told)
    assert "Traceback" not in done.stderr


def test_all_errors_of_a_configuration_come_at_once_and_without_a_stack():
    done = commands.module(
        "main",
        XXL,
        "--workdir=/tmp/nowhere",
        "--config.vapi.nonsense=1",
        "--config.vapi.group_size=1",
        "--config.optimizer.shedule=cosine",
        "--config.policy.dimm=64",
    )
    assert done.returncode == 1
    assert done.stdout == ""
    lines = [line.strip() for line in done.stderr.splitlines()]
    head = lines.index("error: 4 error(s) in the configuration:")  # plugins of JAX may talk before
    assert {line.split(":")[0].split("=")[0] for line in lines[head + 1 : head + 5]} == {
        "- config.vapi.nonsense",
        "- config.vapi.group_size",
        "- config.optimizer.shedule",
        "- config.policy.dimm",
    }
    assert "optimizer.schedule?" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_does_not_fit_the_devices_is_said_without_a_stack(tmp_path):
    done = commands.module(
        "main", XXL, f"--workdir={tmp_path}", "--config.mesh.data=3", "--config.cpu_devices=8"
    )
    assert done.returncode == 1
    assert_mentions(done.stderr, "config.mesh", "data=3", "fsdp=4", " 8 ")
    assert "Traceback" not in done.stderr


def test_check_prints_the_plan_and_all_that_is_in_its_way(tmp_path):
    """Of a recipe whose weights and data are elsewhere, before anything is written."""
    recipe = ["--config=configs/c2i_xxl.py", f"--workdir={tmp_path / 'run'}"]
    done = commands.module("main", *recipe, "--check")
    assert list(tmp_path.iterdir()) == []
    assert done.returncode == 1
    assert done.stdout.startswith('c2i_xxl: VA-π post-training, preset "paper"\n')
    assert "1,410,972,672" in done.stdout
    assert done.stderr.startswith("error: 3 error(s) in the configuration:\n  - config.data.name=")
    assert "Traceback" not in done.stderr


def test_check_has_the_resolved_options_as_json_overrides_included():
    done = commands.module(
        "main",
        "--config=configs/demo_base.py:tiny",
        "--check",
        "--json",
        "--config.steps=7",
        "--config.cpu_devices=4",
        "--config.data.flip=false",
        "--config.mesh.fsdp=2",
        "--config.eval.temperatures=(0.5, 0.25)",
        "--config.base.label_dropout=0.2",
    )
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    config = plan["config"]
    assert config["name"] == "demo_base"
    assert config["steps"] == plan["counts"]["steps"] == 7
    assert config["data"]["flip"] is False
    assert config["mesh"] == {"data": -1, "fsdp": 2}
    assert plan["mesh"] == {"data": 2, "fsdp": 2}
    assert config["eval"]["temperatures"] == [0.5, 0.25]
    assert config["optimizer"]["schedule"] == "cosine"
    assert plan["problems"] == []


SCRIPT = """
import runpy, sys
from vapi_jax.__main__ import main
from vapi_jax.common.plugins import find
runpy.run_module = lambda name, **_: print(name, find("of_ones_own:WORTH", {}, "reward"))
sys.exit(main())
"""


def test_the_one_name_finds_modules_where_one_stands(tmp_path):
    for folder, name, text in (("bin", "vapi-jax", SCRIPT), ("here", "of_ones_own.py", "WORTH=3")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(text)

    def run(*options):
        how = {"cwd": tmp_path / "here", "env": commands.environment(PYTHONPATH=str(ROOT))}
        return commands.python(tmp_path / "bin" / "vapi-jax", "main", options=options, **how)

    assert run().stdout == "vapi_jax.main 3\n"
    assert "there is no module 'of_ones_own'" in run("-P").stderr


def test_json_without_check_is_refused():
    done = commands.module("main", XXL, "--workdir=/tmp/nowhere", "--json")
    assert done.returncode == 1
    assert_mentions(done.stdout + done.stderr, "--json", "--check")
