"""Samples judged while a run trains: the numbers of an offline computation, when they are due, files."""

import io
from functools import partial

import jax
import numpy as np
import pytest
from PIL import Image

from tests.helpers.events import shown
from tests.helpers.tiny import make_tiny_config, make_tiny_method, with_random_head
from vapi_jax.bench.batches import Compilations
from vapi_jax.common.images import image_grid, to_uint8
from vapi_jax.data import fixed_batch
from vapi_jax.evaluation import samples as judging
from vapi_jax.evaluation.features import FEATURES, FeatureExtractor
from vapi_jax.evaluation.frechet import frechet_distance, gaussian_statistics
from vapi_jax.evaluation.in_training import GRID, SEED, Sampled, sampled_of
from vapi_jax.evaluation.kernel_distance import unbiased_mmd2
from vapi_jax.evaluation.samples import SEEN, on_judging_devices
from vapi_jax.methods.config import ConfigError
from vapi_jax.models.sampling import generate
from vapi_jax.parallel.sharding import make_mesh
from vapi_jax.training.logging import read_history
from vapi_jax.training.loop import fit
from vapi_jax.training.train import load_frozen

SIDE, COUNT = 16, 40
# 64 tokens of a 16 px image; 12 features instead of VGG's 512 and its half minute of compilation.
EVAL = {"every": 2, "images": 8, "sampled_every": 2, "sampled": COUNT}


def blocks(params, images):
    """Means of colour over 2x2 quarters of the image."""
    n = images.shape[0]
    quarters = images.reshape(n, 2, SIDE // 2, 2, SIDE // 2, 3).mean(axis=(2, 4))
    return quarters.reshape(n, 12) * params["gain"]


@pytest.fixture(scope="module", autouse=True)
def small_features():
    before = FEATURES[SEEN]
    small = FeatureExtractor(lambda: {"gain": np.float32(3.0)}, blocks, 12, "quarters")
    FEATURES[SEEN] = small
    yield
    FEATURES[SEEN] = before


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(1, 2, jax.devices()[:2])


def make_method(mesh, kind="base", **changes):
    changes = {"eval": EVAL, "image_size": SIDE, "batch_size": 8, **changes}
    return make_tiny_method(kind, mesh, **changes)


@pytest.fixture(scope="module")
def parts(mesh):
    task = make_method(mesh)
    frozen = load_frozen(task)
    params = with_random_head(jax.jit(task.init)(jax.random.key(0)), 1)
    return task, frozen, params, Sampled(task, frozen)


@pytest.mark.slow
def test_the_numbers_are_those_of_an_offline_computation(parts):
    task, frozen, params, sampled = parts
    labels = np.arange(COUNT, dtype=np.int32) % 12
    draw = jax.jit(partial(generate, task.policy, return_entropy=True))
    tokens, entropy = draw(params, labels, jax.random.key(SEED))
    images = to_uint8(jax.jit(task.pixels.decode)(frozen, tokens))
    crops = to_uint8(fixed_batch(task.config.data, "train", COUNT, 1202)["image"])
    fake, real = (
        np.asarray(blocks({"gain": 3.0}, x.astype(np.float32) / 127.5 - 1), np.float64)
        for x in (images, crops)
    )
    found, grid = sampled(params)
    kernel, error = unbiased_mmd2(fake, real)
    assert found == {
        "kernel_distance": pytest.approx(kernel, rel=1e-4),
        "kernel_distance_error": pytest.approx(error, rel=1e-4),
        "entropy": pytest.approx(float(entropy.mean()), rel=1e-5),
        "frechet": pytest.approx(
            frechet_distance(*gaussian_statistics(fake), *gaussian_statistics(real)), rel=1e-4
        ),
    }
    assert error > 0.0 and kernel > 0.0
    want = image_grid(images[:GRID], columns=8)
    assert grid.shape == want.shape
    assert np.abs(grid.astype(int) - want).max() <= 1


@pytest.mark.slow
def test_the_same_policy_is_judged_alike_and_nothing_is_compiled_again(parts):
    _, _, params, sampled = parts
    first = sampled(params)
    with Compilations() as compiled:
        again = sampled(params)
        other, _ = sampled(with_random_head(params, 2))
    assert compiled.count == 0
    assert again[0] == first[0]
    np.testing.assert_array_equal(again[1], first[1])
    assert other["kernel_distance"] != first[0]["kernel_distance"]


@pytest.mark.slow
def test_a_count_that_the_batch_does_not_divide_loses_no_sample(parts, monkeypatch):
    """The rest of the last batch is filled up, and what fills it is not judged."""
    task, frozen, params, sampled = parts
    whole, _ = sampled(params)
    monkeypatch.setattr(judging, "even_batch", lambda *_: 12)
    cut, _ = Sampled(task, frozen)(params)
    for name, value in whole.items():
        assert cut[name] == pytest.approx(value, rel=1e-4)


@pytest.mark.slow
def test_the_frechet_distance_wants_more_samples_than_features(mesh, parts):
    _, frozen, params, _ = parts
    few = make_method(mesh, eval={**EVAL, "sampled": 12})
    found, grid = Sampled(few, frozen)(params)
    assert found.keys() == {"kernel_distance", "kernel_distance_error", "entropy"}
    assert np.isfinite(list(found.values())).all()
    assert grid.shape == (2 * 98 + 2, 8 * 98 + 2, 3)


def test_a_tokenizer_and_a_run_that_does_not_ask_have_none(mesh):
    assert sampled_of(make_method(mesh, eval={**EVAL, "sampled_every": 0}), {}) is None
    assert sampled_of(make_method(mesh, "tokenizer", eval={"every": 1, "images": 8}), {}) is None


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("tokenizer", {"image_size": SIDE, "eval": EVAL}, "eval.sampled_every"),
        ("base", {"image_size": 8, "eval": EVAL}, "eval.sampled_every.* 8 "),
        ("base", {"eval": {"sampled": 2}}, "eval.sampled=2.*3"),
        ("base", {"eval": {"sampled_every": -1}}, "eval.sampled_every=-1.*0"),
    ],
)
def test_a_configuration_that_cannot_be_judged_is_refused(kind, changes, message):
    with pytest.raises(ConfigError, match=message):
        make_tiny_config(kind, **changes)


@pytest.mark.slow
def test_a_run_judges_at_its_start_every_so_often_and_at_its_end(mesh, tmp_path):
    judging = {"every": 5, "images": 8, "sampled_every": 2, "sampled": 12}
    task = make_method(mesh, steps=5, eval=judging, checkpoint={"every": 0})
    run = fit(task, tmp_path)
    rows = read_history(tmp_path / "metrics.jsonl")
    judged = [row["step"] for row in rows if "sampled/kernel_distance" in row]
    assert judged == [0, 2, 4, 5]
    last, _ = Sampled(*on_judging_devices(task, run.frozen))(run.params)
    for name, value in last.items():
        assert rows[-1][f"sampled/{name}"] == pytest.approx(value, rel=1e-5)
    assert "sampled" in run.timer.summary()
    assert pictures(tmp_path) == [0, 2, 4, 5]


def pictures(workdir):
    """The steps whose picture of samples TensorBoard would show, each of them a whole PNG."""
    steps = []
    for (tag, step), value in shown(workdir / "tensorboard").items():
        if tag.startswith("sampled/grid"):
            image = Image.open(io.BytesIO(value.image.encoded_image_string))
            assert image.size == (8 * 98 + 2, 2 * 98 + 2)
            steps.append(step)
    return steps
