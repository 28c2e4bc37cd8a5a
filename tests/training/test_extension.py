"""From outside the package: a reward, a condition, a kind of generator, a source and a method train.

Each is a class in a file of the user's and a name in a recipe; nothing of the package is changed.
"""

import json

import jax
import numpy as np
import pytest

from tests.helpers.reward_server import serving
from tests.helpers.tiny import make_tiny_config, make_tiny_method
from vapi_jax.common.errors import exit_status
from vapi_jax.data.sources import Source
from vapi_jax.methods import METHODS, HealthError
from vapi_jax.methods.config import ConfigError
from vapi_jax.methods.resolve import resolve
from vapi_jax.parallel.sharding import make_mesh
from vapi_jax.training.logging import read_history
from vapi_jax.training.loop import fit
from vapi_jax.training.plan import check
from vapi_jax.training.run import run

TOYS = "tests.helpers.toys:"


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(2, 4)


class Labels(Source):
    """A user's source of labels alone: batches without images."""

    class_names = tuple(f"class {i}" for i in range(12))
    mixed = True

    def __len__(self):
        return 96

    def sample(self, index, rng):
        return {"condition": np.int32(index % 12)}


@pytest.mark.slow
def test_rewards_of_ones_own_train_and_are_named(mesh, tmp_path):
    rewards = (
        "mse",
        {"name": f"{TOYS}Brightness", "weight": 0.5, "options": {"wanted": 0.1}},
        {"name": f"{TOYS}contrast", "weight": 0.25, "options": {"power": 2}},
    )
    done = fit(make_tiny_method("vapi", mesh, rewards=rewards), tmp_path)
    parts = {name: done.last[f"reward_{name}"] for name in ("mse", "Brightness", "contrast")}
    total = parts["mse"] + 0.5 * parts["Brightness"] + 0.25 * parts["contrast"]
    assert done.last["reward"] == pytest.approx(total, rel=1e-5)
    assert parts["Brightness"] < 0.0 < parts["contrast"]


@pytest.mark.slow
def test_a_reward_on_the_host_is_worth_what_it_is_on_the_device(mesh, tmp_path):
    found = []
    for name in ("contrast", "contrast_on_host"):
        options = {"on_host": True} if name.endswith("host") else {}
        spec = {"name": f"{TOYS}{name}", "options": options}
        done = fit(make_tiny_method("vapi", mesh, rewards=(spec,)), tmp_path / name)
        found.append(done.last["reward"])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


@pytest.mark.slow
def test_a_condition_of_ones_own_reaches_the_policy(mesh, tmp_path):
    condition = {"name": f"{TOYS}Superclass", "options": {"fold": 6}}
    method = make_tiny_method("base", mesh, condition=condition, policy={"num_classes": 2})
    prepared = method.prepare({"condition": np.array([0, 5, 6, 11], np.int32)})
    np.testing.assert_array_equal(prepared["condition"], [0, 0, 1, 1])
    assert fit(method, tmp_path).last["ce"] > 0.0


@pytest.mark.slow
def test_a_generator_of_ones_own_with_another_pytree_trains_and_is_sampled(tmp_path):
    policy = {"kind": f"{TOYS}ColouredPolicy"}
    config = make_tiny_config("vapi", policy=policy, cpu_devices=8, eval={"grid_classes": 3})
    summary = run(config, tmp_path)
    assert summary["reward"]["last"] < 0.0
    assert (tmp_path / "samples.png").is_file()
    assert summary["sample_classes"][0] == summary["sample_classes"][1]


@pytest.mark.slow
def test_a_method_with_rollouts_host_rewards_and_two_networks_learns(mesh, tmp_path):
    config = {
        "method_options": {"epochs": 3},
        "data": {"name": f"{__name__}:Labels"},
        "steps": 20,
        "optimizer": {"learning_rate": 3e-2},
    }
    method = make_tiny_method(f"{TOYS}Reinforce", mesh, **config)
    done = fit(method, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rewards = [row["reward"] for row in rows if "reward" in row]
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.1  # chance is a half
    assert done.last["value"] > 0.1  # the critic has followed
    assert sorted(path.stem for path in (tmp_path / "weights").iterdir()) == ["critic", "policy"]
    assert done.parameters["critic"] == 12


def test_steps_without_anything_to_learn_end_a_run_where_they_are_many_in_a_row(mesh, tmp_path):
    def sparse(every, steps):
        return make_tiny_method(
            f"{TOYS}Sparse", mesh, steps=steps, method_options={"every": every},
            checkpoint={"every": 15}, eval={"every": 50, "images": 8}, log_every=50,
        )  # fmt: skip

    assert (METHODS["ar_grpo"].patience, METHODS["vapi"].patience) == (20, 1)
    fit(sparse(20, 40), tmp_path / "learns")
    for _ in range(2):  # the second life begins at step 15, and has not forgotten
        with pytest.raises(HealthError, match="step 20: gradient norm 0.*in a row end a run: 20"):
            fit(sparse(50, 49), tmp_path / "dead")
    with pytest.raises(HealthError, match="step 5: .*in a row end a run: 5"):
        fit(sparse(50, 5), tmp_path / "short")


def test_an_update_that_is_not_finite_does_not_take_the_others_of_its_step_with_it(
    mesh, tmp_path, caplog
):
    skipping = {"on_nonfinite": "skip", "optimizer": {"learning_rate": 0.1}}
    done = fit(make_tiny_method(f"{TOYS}Edge", mesh, steps=1, **skipping), tmp_path)
    assert done.skipped == 1 and float(done.params["mean"]["bias"][0]) == pytest.approx(
        0.4, abs=0.01
    )
    row = next(row for row in read_history(tmp_path / "metrics.jsonl") if "loss" in row)
    assert row["nonfinite"] == 0.5 and row["grad_norm"] > 0.0
    assert "step 1: the gradient of 1 of 2 updates is not finite" in caplog.text


def test_the_smallest_method_runs_from_recipe_to_report(tmp_path, capsys):
    recipe = {
        "name": "mean",
        "method": f"{TOYS}Mean",
        "steps": 3,
        "batch_size": 16,
        "data": {"image_size": 16, "num_threads": 0},
        "optimizer": {"learning_rate": 0.1},
        "eval": {"images": 24, "every": 1},
    }
    assert check(recipe) == 0
    assert "the mean of images" in capsys.readouterr().out
    summary = run(resolve(recipe), tmp_path)
    assert summary["error"]["last"] < summary["error"]["first"]
    assert (tmp_path / "report.html").is_file()


def test_a_reward_server_that_fails_ends_a_run_in_a_sentence_and_it_goes_on(tmp_path, capsys):
    with serving() as server:
        http = {"name": "http", "options": {"url": server.url, "retries": 0}}
        asked = make_tiny_method(
            f"{TOYS}Asked",
            make_mesh(1, 2, jax.devices()[:2]),
            steps=4,
            rewards=(http,),
            checkpoint={"every": 1},
            eval={"every": 4},
        )
        # A request a device and step: one of the two in the third step is refused.
        server.answers = [(200, None)] * 5 + [(503, b"out of memory")]
        assert exit_status(lambda: fit(asked, tmp_path) and None) == 1
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert last.startswith("error: ") and "503" in last and "out of memory" in last
        steps = [path.name for path in (tmp_path / "checkpoints").iterdir()]
        assert max(int(step) for step in steps if step.isdigit()) == 2
        fit(asked, tmp_path)
        assert [row["step"] for row in read_history(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3, 4]
        assert len(server.asked) == (3 + 2) * 2


def test_what_is_not_there_is_said_by_name():
    with pytest.raises(ConfigError) as error:
        make_tiny_config(
            "vapi", rewards="tests.helpers.toys:Beauty", condition={"name": "no.such:X"}
        )
    assert "Beauty" in str(error.value)
    assert "no.such:X" in str(error.value)
    with pytest.raises(ConfigError, match="tests.helpers.toys:contrast"):
        make_tiny_config(f"{TOYS}contrast")
