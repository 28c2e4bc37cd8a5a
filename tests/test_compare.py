"""The final table's measurements: entropy matching, estimates, samples that do not depend on batches."""

import numpy as np
import pytest

from vapi_jax.config import resolve
from vapi_jax.evaluation.compare import SEEN, UNSEEN, Entry, Judge, estimate
from vapi_jax.loop import HeldOut
from vapi_jax.recipes import load_recipe
from vapi_jax.sharding import make_mesh
from vapi_jax.tasks import make_task
from vapi_jax.train import init_state, load_frozen, make_optimizer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def judge_and_base():
    recipe = load_recipe("configs/c2i_demo.py", "c2i_demo").get_config("tiny")
    recipe.policy.num_classes = 12
    config = resolve(recipe)
    task = make_task(config, make_mesh(2, 4))
    state, _ = init_state(task, make_optimizer(config.optimizer, 1), 0)
    frozen = load_frozen(task)
    return Judge(task, frozen, HeldOut(task, frozen), batch=64), state.params


def test_estimate_by_hand():
    assert estimate([1.0, 2.0, 6.0]) == {"mean": 3.0, "sd": pytest.approx(7**0.5), "n": 3}
    assert estimate([5.0]) == {"mean": 5.0, "sd": None, "n": 1}


def test_samples_depend_on_seed_and_place_alone(judge_and_base):
    judge, base = judge_and_base
    labels = np.arange(80) % 12
    whole, entropies = judge.sample_labels(base, labels, seed=3)
    assert whole.shape == (80, 32, 32, 3)
    assert entropies.shape == (80, 64)
    first, _ = judge.sample_labels(base, labels[:70], seed=3)
    np.testing.assert_array_equal(whole[:70], first)
    other, _ = judge.sample_labels(base, labels[:70], seed=4)
    assert np.abs(first - other).mean() > 0.01


def test_lower_temperature_is_sharper_and_can_be_matched(judge_and_base):
    judge, base = judge_and_base
    entropies = [judge.sample(base, 64, 0, t)[1] for t in (1.0, 0.9, 0.7)]
    assert entropies[0] > entropies[1] > entropies[2]
    target = entropies[1]
    matched = judge.match_entropy(base, target, seed=0)
    assert matched == pytest.approx(0.9, abs=0.02)
    assert judge.match_entropy(base, entropies[0] + 1.0, seed=0) == 1.0


def test_a_row_names_its_features_and_its_terms(judge_and_base):
    judge, base = judge_and_base
    row = judge.row(Entry("base", "base", base))
    assert row["frechet"]["n"] == row["frechet_unseen"]["n"] == 2
    assert row["ce"] < np.log(1024)
    assert row["reward"] < 0.0
    sharp = judge.held_out(base, 0.5)
    assert sharp["reward"] > row["reward"]  # fewer unlikely tokens, images nearer to the target
    assert sharp["ce"] == pytest.approx(row["ce"], rel=1e-5)  # the model is the same


def test_real_crops_are_nearer_than_reconstructions(judge_and_base):
    judge, _ = judge_and_base
    real = judge.real(1)
    assert not np.array_equal(real, judge.real(0))
    straight, through = judge.distances(real), judge.distances(judge.reconstruct(real))
    for feature in (SEEN, UNSEEN):
        assert 0.0 < straight[feature] < through[feature]
