"""A wheel is a whole product: what it installs works in a folder that knows nothing of the repository."""

import json
import shutil
import subprocess
import sys
import zipfile

import pytest
from safetensors.numpy import load_file, save_file

from tests.helpers import commands
from tests.helpers.paths import ROOT
from vapi_jax.__main__ import COMMANDS

SOURCES = ("README.md", "LICENSE", "THIRD_PARTY_NOTICES.md", "pyproject.toml", "setup.py")


def pip(*arguments):
    subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)],
        check=True,
        capture_output=True,
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, for a build leaves files beside its sources."""
    folder = tmp_path_factory.mktemp("build")
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        shutil.copy(ROOT / name, source)
    for name in ("vapi_jax", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*_cache*"))
    pip("wheel", "--no-deps", "--no-index", "--no-build-isolation", "-w", folder, source)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Runs `vapi-jax` as installed from the wheel, in a folder outside the repository."""
    site, here = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("here")
    pip("install", "--no-deps", "--no-index", "--no-compile", "--target", site, wheel)
    env = commands.environment(PYTHONPATH=str(site))

    def run(*arguments):
        return commands.python(site / "bin" / "vapi-jax", *arguments, cwd=here, env=env, check=True)

    run.site, run.here, run.env = site, here, env
    return run


def test_a_wheel_holds_every_file_of_the_package_and_every_recipe(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if name.startswith("vapi_jax/")}
    files = [p for p in (ROOT / "vapi_jax").rglob("*") if p.is_file() and p.suffix != ".pyc"]
    wanted = {str(path.relative_to(ROOT)) for path in files if "_cache" not in str(path)}
    wanted |= {f"vapi_jax/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.py")}
    assert "vapi_jax/configs/c2i_demo.py" in wanted
    assert held == wanted


def test_all_commands_go_by_one_name(installed):
    shown = installed("--help").stdout
    assert all(f"  {command} " in shown for command in COMMANDS)
    done = commands.python("-m", "vapi_jax", "trian", cwd=installed.here, env=installed.env)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", shown)
    assert "--vq-args" in installed("convert", "--help").stdout


def test_every_command_is_known_by_that_name():
    doors = {p.stem for p in (ROOT / "vapi_jax").glob("*.py") if "__main__" in p.read_text()}
    assert COMMANDS.keys() == doors - {"__main__", "library"} | {"bench", "study"}


@pytest.mark.slow
def test_what_a_wheel_installed_checks_recipes_and_converts(installed, golden):
    told = commands.python(
        "-c",
        "import vapi_jax as vj; print(vj.__file__); print(vj.recipe('c2i_demo:tiny').name)",
        cwd=installed.here,
        env=installed.env,
        check=True,
    ).stdout.split()
    assert told == [str(installed.site / "vapi_jax" / "__init__.py"), "c2i_demo"]
    installed("main", "--config=c2i_demo:tiny", "--check")

    tensors = golden.tensors("gpt_c2i")
    save_file(tensors, installed.here / "released.safetensors")
    (installed.here / "args.json").write_text(json.dumps(golden.args("gpt_c2i")))
    installed("convert", "--gpt=released.safetensors", "--args=args.json", "--out=converted")
    installed("export", "--ckpt=converted", "--out=again.safetensors")
    again = load_file(installed.here / "again.safetensors")
    assert again.keys() == tensors.keys()
    assert all(again[name].tobytes() == tensors[name].tobytes() for name in tensors)
