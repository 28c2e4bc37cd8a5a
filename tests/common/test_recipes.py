"""Recipes are found from anywhere, and what is wrong with one is told with its place."""

import shutil

import pytest
from ml_collections import ConfigDict

from tests.helpers import commands
from tests.helpers.messages import assert_mentions
from tests.helpers.paths import CONFIGS
from vapi_jax.common.paths import PathError
from vapi_jax.common.recipes import RecipeError, find_recipe, load_recipe, read_recipe, shipped


@pytest.mark.parametrize(
    "name", ["c2i_demo", "c2i_demo.py", "configs/c2i_demo", "configs/c2i_demo.py"]
)
def test_recipes_that_ship_are_found_from_anywhere(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert find_recipe(name) == CONFIGS / "c2i_demo.py"
    assert read_recipe(f"{name}:tiny").steps == 4
    assert read_recipe(name).steps == 100


def test_a_file_of_ones_own_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c2i_demo.py").write_text("def get_config():\n    return {'name': 'mine'}\n")
    assert read_recipe("c2i_demo").name == "mine"
    with pytest.raises(RecipeError, match="'tiny'"):
        read_recipe("c2i_demo:tiny")
    for away in ("other/c2i_demo", str(tmp_path / "gone" / "c2i_demo.py")):
        with pytest.raises(RecipeError, match=r"c2i_demo.*known by name: bench_cpu, c2i_demo"):
            read_recipe(away)


def test_a_recipe_copied_elsewhere_finds_what_it_builds_on(tmp_path):
    copy = shutil.copy(CONFIGS / "c2i_demo.py", tmp_path / "mine.py")
    assert read_recipe(f"{copy}:tiny").to_dict() == read_recipe("c2i_demo:tiny").to_dict()
    (tmp_path / "demo_base.py").write_text("def policy():\n    return {'kind': 'mine'}\n")
    assert read_recipe(str(copy)).policy.kind == "mine"
    with pytest.raises(RecipeError, match=r"nowhere\.py"):
        load_recipe(str(copy), "nowhere")


def test_a_dict_is_a_recipe(tmp_path):
    path = tmp_path / "x.py"
    path.write_text(
        "def get_config(variant=''):\n    return {'name': 'x', 'vapi': {'group_size': 2}}"
    )
    found = read_recipe(str(path))
    assert isinstance(found, ConfigDict)
    assert found.vapi.group_size == 2


WRONG = {
    "a file that it wants": (
        "def get_config(variant):\n    return open('gone.txt')\n",
        ("FileNotFoundError", "gone.txt", "line 2: return open('gone.txt')"),
    ),
    "an import": ("import nowhere_at_all\n", ("ModuleNotFoundError", "nowhere_at_all", "line 1")),
    "syntax": ("def get_config(:\n", ("SyntaxError", "line 1")),
    "deep": (
        "def inner():\n    return {}['x']\ndef get_config(variant):\n    return inner()\n",
        ("KeyError", "'x'", "line 2"),
    ),
    "a variant": (
        "def get_config(variant):\n    raise ValueError(f'known variants are big, not {variant}')\n",
        ("ValueError", "known variants are big"),
    ),
    "no function": ("x = 1\n", ("get_config",)),
    "another type": ("def get_config(variant):\n    return [1]\n", ("list", "dict")),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_with_a_recipe_is_told_with_its_place(tmp_path, kind):
    text, told = WRONG[kind]
    path = tmp_path / "x.py"
    path.write_text(text)
    with pytest.raises(RecipeError) as error:
        read_recipe(str(path))
    assert_mentions(str(error.value), path, *told)


def test_a_bucket_is_no_recipe():
    with pytest.raises(PathError, match="gs://bucket"):
        read_recipe("gs://bucket/x.py:tiny")


def test_the_command_takes_names_and_tells_causes_from_any_folder(tmp_path):
    """In one line, without the help and without a stack."""
    (tmp_path / "x.py").write_text("import nowhere_at_all\n")
    for text, status, told in (
        ("x", 1, "x.py, line 1: import nowhere_at_all"),
        ("absent", 1, "c2i_xxl"),
        ("demo_base:tiny", 0, "8 images"),
    ):
        done = commands.module(
            "real_images", f"--config={text}", "--num=8", f"--out={tmp_path / 'out'}", cwd=tmp_path
        )
        assert done.returncode == status, done.stderr
        assert told in (done.stderr if status else done.stdout)
        assert "Traceback" not in done.stderr
        if status:
            assert_mentions(done.stderr.splitlines()[-1], "error: --config=", told)
    assert_mentions(commands.module("real_images", "--help", cwd=tmp_path).stdout, *shipped())
