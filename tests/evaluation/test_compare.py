"""The final table's measurements: entropy matching, estimates, samples that do not depend on batches."""

import numpy as np
import pytest

from vapi_jax.common.recipes import load_recipe
from vapi_jax.evaluation.compare import (
    BASE,
    REAL,
    SEEN,
    TUNED,
    UNSEEN,
    Entry,
    Judge,
    compare,
    estimate,
    even_batch,
)
from vapi_jax.evaluation.held_out import HeldOut
from vapi_jax.methods import make_method
from vapi_jax.methods.resolve import resolve
from vapi_jax.parallel.sharding import make_mesh
from vapi_jax.training.train import init_state, load_frozen, make_optimizer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def judge_and_base():
    recipe = load_recipe("configs/c2i_demo.py", "c2i_demo").get_config("tiny")
    recipe.policy.num_classes = 12
    config = resolve(recipe)
    task = make_method(config, make_mesh(2, 4))
    state, _ = init_state(task, make_optimizer(config.optimizer, 1), 0)
    frozen = load_frozen(task)
    return Judge(task, frozen, HeldOut(task, frozen), batch=64), state.params


def test_estimate_by_hand():
    assert estimate([1.0, 2.0, 6.0]) == {"mean": 3.0, "sd": pytest.approx(7**0.5), "n": 3}
    assert estimate([5.0]) == {"mean": 5.0, "sd": None, "n": 1}


@pytest.mark.parametrize(
    ("count", "devices", "batch"),
    [(2048, 8, 256), (1024, 8, 256), (520, 8, 176), (16, 8, 16), (5, 4, 8), (257, 1, 129)],
)
def test_batches_divide_a_count_with_little_rest(count, devices, batch):
    assert even_batch(count, devices) == batch


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
    row, features = judge.row(Entry("base", "base", base))
    assert row["frechet"]["n"] == row["frechet_unseen"]["n"] == 2
    assert row["ce"] < np.log(1024)
    assert row["reward"] < 0.0
    sharp = judge.held_out(base, 0.5)
    assert sharp["reward"] > row["reward"]  # fewer unlikely tokens, images nearer to the target
    assert sharp["ce"] == pytest.approx(row["ce"], rel=1e-5)  # the model is the same
    # The features that it hands on are those of the first seed's samples.
    again = judge.features(judge.sample(base, 520, 0, 1.0)[0])
    for name, found in features.items():
        np.testing.assert_array_equal(found, again[name])


def test_real_crops_are_nearer_than_reconstructions(judge_and_base):
    judge, _ = judge_and_base
    real = judge.real(1)
    assert not np.array_equal(real, judge.real(0))
    images = (real, judge.reconstruct(real))
    straight, through = (judge.distances(judge.features(x)) for x in images)
    for feature in (SEEN, UNSEEN):
        assert 0.0 < straight[feature] < through[feature]


def test_the_pictures_features_are_those_behind_the_table(judge_and_base, monkeypatch):
    """Every set of images goes through the networks once, and the first seed's features come out."""
    judge, base = judge_and_base
    calls, fake = [], {}

    def features(images):
        calls.append(images.shape)
        key = images.tobytes()
        value = np.random.default_rng(len(fake)).normal(size=(len(images), 4))
        return fake.setdefault(key, {SEEN: value, UNSEEN: -value})

    monkeypatch.setattr(judge, "features", features)
    monkeypatch.setattr(judge, "reference", {SEEN: np.eye(8, 4), UNSEEN: -np.eye(8, 4)})
    statistics = {name: (np.zeros(4), np.eye(4)) for name in (SEEN, UNSEEN)}
    monkeypatch.setattr(judge, "_reference_statistics", statistics)
    drawn = iter(range(1, 100))
    shape = (6, 2, 2, 3)
    monkeypatch.setattr(judge, "sample", lambda *_: (np.full(shape, next(drawn)), 1.0))
    monkeypatch.setattr(judge, "match_entropy", lambda *_, seed: 0.9)
    monkeypatch.setattr(judge, "real", lambda number: np.full(shape, -number))
    monkeypatch.setattr(judge, "reconstruct", lambda images: images - 0.5)
    rows, found = compare(judge, base, base, {})
    kinds = [row["kind"] for row in rows]
    assert kinds == ["base", "temperature", "matched", "vapi", "floor", "real"]
    assert len(calls) == 6 * 2  # rows and seeds
    assert [list(found[name]) for name in (SEEN, UNSEEN)] == [[REAL, BASE, TUNED]] * 2
    # Drawn first: the post-trained policy's two seeds, then the base's.
    for label, first in ((TUNED, 1), (BASE, 3)):
        want = fake[np.full(shape, first).tobytes()]
        for name in (SEEN, UNSEEN):
            np.testing.assert_array_equal(found[name][label], want[name])
    np.testing.assert_array_equal(found[UNSEEN][REAL], -np.eye(8, 4))
