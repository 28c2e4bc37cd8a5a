"""The final table's measurements: entropy matching, estimates, samples that do not depend on batches."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.helpers.paths import GOLDEN
from tests.helpers.tiny import with_random_head
from vapi_jax.common.images import image_grid, to_uint8
from vapi_jax.common.recipes import load_recipe
from vapi_jax.evaluation.compare import (
    BASE,
    REAL,
    TUNED,
    Entry,
    Judge,
    compare,
    estimate,
    match_entropy,
)
from vapi_jax.evaluation.held_out import HeldOut
from vapi_jax.evaluation.kernel_distance import unbiased_mmd2
from vapi_jax.evaluation.samples import (
    SEEN,
    Judged,
    SampleJudge,
    even_batch,
    judged_features,
    on_judging_devices,
    real_crops,
)
from vapi_jax.generation.loading import load_generator
from vapi_jax.methods import make_method
from vapi_jax.methods.resolve import resolve
from vapi_jax.parallel.sharding import make_mesh
from vapi_jax.report.page import write_report
from vapi_jax.report.verdict import show_score
from vapi_jax.training.run import run
from vapi_jax.training.train import init_state, load_frozen, make_optimizer

COUNT = 136
UNSEEN = "alex_conv5"


@pytest.fixture(scope="module")
def judge_and_base():
    recipe = load_recipe("configs/c2i_demo.py", "c2i_demo").get_config("tiny")
    recipe.policy.num_classes = 12
    recipe.eval.update({"samples": COUNT, "seeds": 2, "allow_singular": True})
    config = resolve(recipe)
    task = make_method(config, make_mesh(2, 4))
    state, _ = init_state(task, make_optimizer(config.optimizer, 1), 0)
    task, frozen = on_judging_devices(task, load_frozen(task))
    assert task.mesh.size == 1  # parameters are on eight devices, judgement is on one
    judge = SampleJudge(task, frozen, 64, (SEEN, UNSEEN))
    return Judge(task, HeldOut(task, frozen), judge), state.params


def test_estimate_by_hand():
    several = estimate([1.0, 2.0, 6.0])
    assert several == {
        "mean": 3.0, "sd": pytest.approx(7**0.5), "n": 3, "values": [1.0, 2.0, 6.0],
    }  # fmt: skip
    assert estimate([5.0]) == {"mean": 5.0, "sd": None, "n": 1, "values": [5.0]}


@pytest.mark.parametrize(
    ("count", "devices", "batch"),
    [(2048, 8, 256), (1024, 8, 256), (520, 8, 176), (16, 8, 16), (5, 4, 8), (257, 1, 129)],
)
def test_batches_divide_a_count_with_little_rest(count, devices, batch):
    assert even_batch(count, devices) == batch


@pytest.mark.slow
def test_samples_depend_on_seed_and_count_alone_and_the_first_are_shown(judge_and_base):
    judge, base = judge_and_base
    whole, first, other = (
        judge.judge.samples(base, count, seed, 1.0, shown)
        for count, seed, shown in ((80, 3, 70), (70, 3, 70), (70, 4, 8))
    )
    assert whole.features[SEEN].shape == (80, 512) and whole.images.shape == (70, 32, 32, 3)
    np.testing.assert_array_equal(whole.images, first.images)
    for name in (SEEN, UNSEEN):
        np.testing.assert_array_equal(whole.features[name][:64], first.features[name][:64])
    assert other.images.shape == (8, 32, 32, 3)
    assert np.abs(first.images[:8] - other.images.astype(float)).mean() > 2


@pytest.mark.slow
def test_guidance_of_the_settings_holds_unless_another_is_asked_for(judge_and_base):
    judge, base = judge_and_base
    guided = judge.judge.with_settings(cfg_scale=3.0)
    plain, own, asked, none = (
        one.samples(base, 64, 3, 1.0, 64, **more).images
        for one, more in (
            (judge.judge, {}), (guided, {}), (judge.judge, {"guidance": 3.0}), (guided, {"guidance": 1.0}),
        )
    )  # fmt: skip
    assert np.abs(own - plain.astype(float)).mean() > 2
    np.testing.assert_array_equal(own, asked)
    np.testing.assert_array_equal(none, plain)


@pytest.mark.slow
def test_lower_temperature_is_sharper_and_can_be_matched(judge_and_base):
    judge, base = judge_and_base
    weights = judge.judge.weights(base)
    entropy_at = judge.judge.entropies(weights, 60, [0])
    entropies = [entropy_at(t) for t in (1.0, 0.9, 0.7)]
    assert entropies[0] > entropies[1] > entropies[2]
    drawn = [judge.judge.samples(base, 60, seed, 0.9).entropy for seed in (0, 1)]
    assert drawn[0] == pytest.approx(entropies[1], rel=1e-5)
    both = judge.judge.entropies(weights, 60, [0, 1])
    assert both(0.9) == pytest.approx(np.mean(drawn), rel=1e-5)
    assert match_entropy(entropy_at, entropies[1]) == pytest.approx(0.9, abs=1e-3)
    matched = match_entropy(entropy_at, sum(entropies[:2]) / 2)
    assert entropy_at(matched) == pytest.approx(sum(entropies[:2]) / 2, abs=0.12)  # noise of 60


@given(target=st.floats(0.4, 1.6), at=st.sampled_from([1.0, 0.8]))
def test_a_policy_whose_entropy_is_its_temperature_is_matched_exactly_and_drawn_seldom(target, at):
    drawn = []

    def entropy_at(temperature: float) -> float:
        drawn.append(round(temperature / at * 20, 9))
        return temperature

    matched = match_entropy(entropy_at, target * at, at)
    assert matched == pytest.approx(at * min(max(target, 0.5), 1.5))
    assert all(number == int(number) for number in drawn)
    assert len({*drawn}) == len(drawn) <= 2 + 20 * abs(target - 1) + 1


@pytest.mark.slow
def test_a_row_names_its_features_and_its_terms(judge_and_base):
    judge, base = judge_and_base
    row, features = judge.row(Entry("base", "base", base))
    assert row["frechet"]["n"] == row["frechet_unseen"]["n"] == row["kernel_unseen"]["n"] == 2
    mmd = unbiased_mmd2(features[UNSEEN], judge.reference[UNSEEN])[0]
    assert row["kernel_unseen"]["values"][0] == pytest.approx(mmd, rel=1e-5)
    assert row["ce"] < np.log(1024)
    assert row["reward"] < 0.0
    known, _ = judge.row(Entry("base", "base", base, held_out={"reward": 7.0, "ce": 8.0}))
    assert known == {**row, "reward": 7.0, "ce": 8.0}
    sharp = judge.held_out(base, 0.5)
    assert sharp["reward"] > row["reward"]  # fewer unlikely tokens, images nearer to the target
    assert sharp["ce"] == pytest.approx(row["ce"], rel=1e-5)  # the model is the same
    # The features that it hands on are those of the first seed's samples.
    again = judge.judge.samples(base, COUNT, 0, 1.0).features
    for name, found in features.items():
        np.testing.assert_array_equal(found, again[name])


@pytest.mark.slow
def test_real_crops_are_nearer_than_reconstructions_and_all_are_rounded_alike(judge_and_base):
    judge, _ = judge_and_base
    made = [list(images(COUNT, 1)) for images in (judge.judge.real, judge.judge.reconstructed)]
    for batches in made:
        assert [len(batch) for batch in batches] == [64, 64, 8]
        assert {batch.dtype for batch in batches} == {np.dtype(np.uint8)}
    assert not np.array_equal(made[0][0], next(judge.judge.real(COUNT, 0)))
    crops = np.concatenate(list(real_crops(judge.method.config, COUNT, 64, 1)))
    more_than_a_batch = to_uint8(judge.judge.reconstruct(crops[:100]))
    np.testing.assert_array_equal(more_than_a_batch, np.concatenate(made[1])[:100])
    straight, through = (judge.distances(judge.judge.features(batches)) for batches in made)
    for distance in ("frechet", "frechet_unseen"):
        assert 0.0 < straight[distance] < through[distance]
    assert straight["kernel_unseen"] < through["kernel_unseen"]


@pytest.mark.slow
def test_the_pictures_features_are_those_behind_the_table(judge_and_base, monkeypatch):
    """Every set of images goes through the networks once, and the first seed's features come out."""
    judge, base = judge_and_base
    calls, fake = [], {}

    def features(name):
        calls.append(name)
        value = np.random.default_rng(len(fake)).normal(size=(6, 4))
        return fake.setdefault(name, {SEEN: value, UNSEEN: -value})

    drawn = iter(range(1, 100))
    samples = judge.judge
    monkeypatch.setattr(judge, "reference", {SEEN: np.eye(8, 4), UNSEEN: -np.eye(8, 4)})
    statistics = {name: (np.zeros(4), np.eye(4)) for name in (SEEN, UNSEEN)}
    monkeypatch.setattr(judge, "_reference_statistics", statistics)
    monkeypatch.setattr(samples, "features", features)
    monkeypatch.setattr(samples, "samples", lambda *_: Judged(features(next(drawn)), 1.0, None))
    monkeypatch.setattr(samples, "entropies", lambda *_: lambda temperature: temperature + 0.1)
    monkeypatch.setattr(samples, "real", lambda count, number: f"real {number}")
    monkeypatch.setattr(samples, "reconstructed", lambda count, number, **_: f"again {number}")
    rows, found = compare(judge, base, base, {})
    kinds = [row["kind"] for row in rows]
    assert kinds == ["base", "temperature", "matched", "vapi", "floor", "real"]
    # Rows and seeds; drawn first: the post-trained policy's two seeds, then the base's.
    assert calls == [*range(1, 9), "again 1", "again 2", "real 1", "real 2"]
    assert [list(found[name]) for name in (SEEN, UNSEEN)] == [[REAL, BASE, TUNED]] * 2
    for label, first in ((TUNED, 1), (BASE, 3)):
        for name in (SEEN, UNSEEN):
            np.testing.assert_array_equal(found[name][label], fake[first][name])
    np.testing.assert_array_equal(found[UNSEEN][REAL], -np.eye(8, 4))


@pytest.mark.slow
def test_a_trained_decoder_is_compared_on_the_tokens_of_its_generator(tmp_path):
    recipe = load_recipe("configs/c2i_demo.py", "demo_tokenizer_post").get_config("tiny")
    recipe.eval.update({"compare": True, "samples": 16, "seeds": 1, "temperatures": (0.9,)})
    recipe.eval.update({"grid_classes": 2})
    recipe.optimizer.learning_rate = 1e-2
    summary = run(resolve(recipe), tmp_path)
    rows = {row["kind"]: row for row in summary["table"]}
    base, tuned, matched = (rows[kind] for kind in ("base", "vapi", "matched"))
    assert base["entropy"] == tuned["entropy"] and matched["temperature"] == 1.0
    assert matched["frechet"] == base["frechet"] != tuned["frechet"]
    assert base["reward"] == summary["reward"]["first"] != rows["temperature"]["reward"]
    assert tuned["reward"] == summary["reward"]["last"]
    # What was shown and judged is what the run has written.
    labels = [0, 0, 1, 1]
    for name, before in (("before", "demo"), ("after", str(tmp_path))):
        images = load_generator(before, make_mesh(1, 1, jax.devices()[:1])).sample(labels, seed=7)
        with Image.open(tmp_path / f"samples_{name}.png") as picture:
            np.testing.assert_array_equal(np.asarray(picture), image_grid(images, columns=8))


@pytest.mark.slow
def test_rows_of_scenes_are_scored_and_a_report_shows_it(tmp_path):
    recipe = load_recipe("configs/c2i_demo.py", "c2i_demo").get_config("tiny")
    recipe.data.update({"name": "scenes", "flip": False})
    sizes = {"dim": 32, "n_layer": 1, "n_head": 2, "cls_token_num": 12, "caption_dim": 32}
    recipe.policy = {"kind": "text", **sizes}
    options = {"encoder": str(GOLDEN / "t5"), "dtype": "float32", "clean": False}
    recipe.condition = {"name": "caption", "options": options}
    recipe.init.gpt = ""
    recipe.eval.update({"samples": 12, "seeds": 1, "temperatures": (), "cfg_scales": (2.0,)})
    config = resolve(recipe)
    task = make_method(config, make_mesh(1, 1, jax.devices()[:1]))
    state, _ = init_state(task, make_optimizer(config.optimizer, 1), 0)
    frozen = load_frozen(task)
    judge = Judge(
        task, HeldOut(task, frozen), SampleJudge(task, frozen, 12, judged_features(config))
    )
    params = with_random_head(state.params, 0)  # guidance moves nothing where all is uniform
    rows, _ = compare(judge, params, params, {})
    by_kind = {row["kind"]: row for row in rows}
    assert list(by_kind) == ["base", "guided", "matched", "vapi", "floor", "real"]
    assert (by_kind["guided"]["guidance"], by_kind["guided"]["reward"]) == (2.0, None)
    assert by_kind["guided"]["frechet"] != by_kind["base"]["frechet"]
    assert by_kind["real"]["scenes"]["overall"]["value"] == 1.0
    assert 0.0 < by_kind["floor"]["scenes"]["overall"]["value"] < 1.0
    assert by_kind["base"]["scenes"]["overall"]["value"] < 0.2  # an untrained generator
    changes = judge.scene_changes()
    assert set(changes["base"]["overall"].values()) == {0.0}  # the same weights and seeds

    scenes = {kind: by_kind[kind]["scenes"] for kind in ("base", "vapi", "matched", "floor")}
    summary = {"name": "x", "table": rows, "scenes": {**scenes, "changes": changes}}
    page = write_report(tmp_path, summary, [], {}).read_text(encoding="utf-8")
    assert "<h2>Scenes</h2>" in page and "color attr" in page and "base, cfg 2" in page
    assert show_score(scenes["floor"]["overall"]) in page
    assert "0.000 [0.000, 0.000], inside the noise" in page
