"""What a notebook calls: the example of docs/library.md, and that the commands give the same."""

import json
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

import vapi_jax as vj
from tests.helpers import commands
from tests.helpers.paths import ROOT
from vapi_jax.common.recipes import RecipeError
from vapi_jax.methods.config import ConfigError
from vapi_jax.rewards import RewardError


@pytest.mark.slow
def test_the_example_of_the_documentation_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "library.md").read_text(), re.S)
    assert len(blocks) == 4
    names = {}
    for block in blocks:
        exec(block, names)
    shown = capsys.readouterr().out
    assert "(6, 32, 32, 3) uint8" in shown
    assert names["tokens"].shape == (6, 64)
    assert names["again"].dtype == np.uint8
    assert names["worth"](names["drawn"], names["real"])["total"].shape == (2, 2)
    assert (tmp_path / "runs" / "notebook" / "report.html").is_file()
    assert names["run"].summary["config"]["vapi"]["ce_weight"] == 0.2
    assert names["receipt"]["samples"]["count"] == 24


@pytest.mark.slow
def test_samples_are_those_of_the_command(tmp_path):
    arguments = ["--ckpt=demo", "--num=4", "--batch=3", "--labels=5,2", "--cfg=1.5", "--seed=3"]
    commands.module(
        "sample", *arguments, "--format=npz", f"--out={tmp_path / 'out'}", check=True
    )  # fmt: skip
    with np.load(tmp_path / "out" / "samples.npz") as file:
        want = file["arr_0"]
    got = vj.sample("demo", [5, 2, 5, 2], cfg=1.5, seed=3)
    # Another number of devices and another batch: to a step of uint8, by the decoder's rounding.
    assert np.abs(got.astype(int) - want).max() <= 1


def test_a_recipe_by_name_or_path_with_changes():
    config = vj.recipe("c2i_demo:tiny", **{"vapi.ce_weight": 1, "data.image_size": 64, "base.x": 2})
    assert (config.vapi.ce_weight, config.data.image_size, config.base.x) == (1, 64, 2)
    assert vj.recipe(ROOT / "configs" / "c2i_xl.py").name == "c2i_xl"
    with pytest.raises(RecipeError, match="c2i_xxl"):
        vj.recipe("c2i_giant")
    with pytest.raises(RecipeError, match=r"steps\.more"):
        vj.recipe("c2i_demo", **{"steps.more.still": 1})


def test_a_recipe_that_cannot_run_is_refused_before_anything_is_made(tmp_path):
    recipe = vj.recipe("c2i_demo:tiny", **{"vapi.group_size": 1, "nonsense": 2})
    with pytest.raises(ConfigError, match=r"(?s)group_size=1.*nonsense|nonsense.*group_size=1"):
        vj.train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_rewards_are_equation_10():
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
    samples = rng.uniform(-1, 1, (2, 3, 16, 16, 3)).astype(np.float32)
    found = jax.device_get(vj.reward("mse, 0.5*l1")(samples, images))
    mse = -np.square(samples - images[:, None]).mean((2, 3, 4))
    l1 = -np.abs(samples - images[:, None]).mean((2, 3, 4))
    np.testing.assert_allclose(found["mse"], mse, rtol=1e-5)
    np.testing.assert_allclose(found["total"], mse + 0.5 * l1, rtol=1e-5)
    with pytest.raises(ConfigError, match="beauty"):
        vj.reward("beauty")


def test_rewards_are_of_floats_and_of_no_tokens():
    worth, samples = vj.reward("mse"), np.zeros((2, 3, 8, 8, 3), np.float32)
    for wrong in ((samples.astype(np.uint8), samples[:, 0]), (samples[:, 0], samples[:, 0])):
        with pytest.raises(ValueError, match=r"wants floats \[B, G, H, W, 3\] in \[-1, 1\]"):
            worth(*wrong)
    with pytest.raises(ValueError, match=r"uint8.*wants floats \[B, H, W, 3\]"):
        worth(samples, samples[:, 0].astype(np.uint8))
    with pytest.raises(ValueError, match="'image'"):
        worth(samples, None)
    with pytest.raises(ConfigError, match="codebook_cosine.*tokens"):
        vj.reward("mse, codebook_cosine")


def test_what_a_reward_on_the_host_raises_is_raised_and_the_next_call_works():
    reward = {"name": "tests.helpers.toys:dark_alone_on_host", "options": {"on_host": True}}
    worth, samples = vj.reward([reward]), np.zeros((1, 2, 8, 8, 3), np.float32)
    with pytest.raises(ValueError, match="too bright"):
        worth(samples + 1, None)
    np.testing.assert_array_equal(worth(samples, None)["total"], [[1.0, 1.0]])


@pytest.mark.parametrize("on_host", [False, True])
def test_a_reward_of_another_shape_is_refused_and_not_broadcast(on_host):
    name = "tests.helpers.toys:mean_of_groups"
    worth = vj.reward(["mse", {"name": name, "options": {"on_host": on_host}}])
    # As many images as samples of each: [B] would be added to [B, G] along the wrong axis.
    with pytest.raises(RewardError, match=r"(\(2,\)).*\[B, G\] = \(2, 2\)"):
        worth(np.zeros((2, 2, 8, 8, 3), np.float32), np.zeros((2, 8, 8, 3), np.float32))


PROGRAM = """
import json, sys
import vapi_jax as vj
light = "jax" not in sys.modules
first = callable(vj.sample)
import vapi_jax.sample, vapi_jax.evaluate
print(json.dumps([light, first, callable(vj.sample), callable(vj.evaluate), hasattr(vj.sample, "main")]))
"""


def test_the_import_is_light_and_commands_names_are_functions_too():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == [True] * 5
