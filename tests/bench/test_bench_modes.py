"""The benchmark's other two modes: drawing images against what memory allows, and judging them."""

import dataclasses
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import monitoring

from tests.helpers import commands
from tests.helpers.tiny import make_tiny_config
from vapi_jax.bench import bandwidth, batches, evaluation, sampling
from vapi_jax.evaluation import features as F
from vapi_jax.generation.sampler import Sampler
from vapi_jax.methods.config import ConfigError
from vapi_jax.models import inception
from vapi_jax.parallel.sharding import make_mesh
from vapi_jax.sample import draw_options, parse

DEMO = "--config=configs/c2i_demo.py:tiny"
ONE_DEVICE = ("--config.cpu_devices=1", "--config.mesh.data=1", "--config.mesh.fsdp=1")


def one_device():
    return make_mesh(1, 1, jax.devices()[:1])


def tiny(**changes):
    return make_tiny_config("vapi", **{"init": {"vq": "", "gpt": ""}, **changes})


# --- what is compiled -----------------------------------------------------------------------------


def test_programs_are_counted_while_the_context_is_open_and_not_after():
    def fresh(x):
        return jnp.tanh(x) * 3 + x

    grown, x = jax.jit(fresh), jnp.ones((3,))
    y = jnp.ones((4,))
    with batches.Compilations() as counted:
        grown(x)
        assert counted.count == 1
        grown(x)
        assert counted.count == 1
        grown(y)
        assert counted.count == 2
    jax.jit(lambda x: fresh(x) + 1)(x)
    assert counted.count == 2
    monitoring.record_event_duration_secs("/jax/core/compile/backend_compile_duration", 1.0)
    assert counted.count == 2


def test_what_was_compiled_beside_the_clock_is_an_error():
    assert batches.problem({"compilations": 0}) is None
    assert batches.problem({"name": "a step's result"}) is None
    assert "(3)" in batches.problem({"compilations": 3})


def test_a_batch_that_does_not_fit_is_said_and_other_failures_stay():
    error = jax.errors.JaxRuntimeError
    with (
        pytest.raises(ConfigError, match=r"--batch.*RESOURCE_EXHAUSTED: 9 GiB$"),
        batches.fitting(),
    ):
        raise error("RESOURCE_EXHAUSTED: 9 GiB\nmore than anybody wants to read")
    with pytest.raises(error, match="INTERNAL"), batches.fitting():
        raise error("INTERNAL: broken")


@pytest.mark.parametrize(
    ("batch", "devices", "rows"), [(8, 8, 8), (9, 8, 16), (1, 8, 8), (5, 1, 5)]
)
def test_batches_are_rounded_up_to_the_devices(batch, devices, rows):
    assert batches.rounded(batch, devices) == rows


# --- drawing --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sampled():
    return sampling.measure(tiny(policy={"num_classes": 12}), one_device(), 2, 4, 1.75)


def test_a_measurement_of_drawing_is_consistent(sampled):
    assert json.loads(json.dumps(sampled, allow_nan=False)) == sampled
    assert (sampled["mode"], sampled["batch_size"], sampled["batches"]) == ("sample", 4, 2)
    assert (sampled["tokens_per_image"], sampled["image_size"]) == (16, 8)
    tokens = sampled["tokens_per_second"] * sampled["token_seconds_per_batch"]
    assert tokens == pytest.approx(4 * 16)
    assert sampled["images_per_second"] * sampled["seconds_per_batch"] == pytest.approx(4)
    for name in ("seconds", "token_seconds", "decode_seconds"):
        low, high = sampled[f"{name}_quartiles"]
        assert 0 < low <= sampled[f"{name}_per_batch"] <= high
    assert sampled["compile_seconds"] > 0
    assert sampled["peak_memory_bytes"] > 4 * sampled["parameters"]
    assert sampled["notes"] == {"generator": "random weights", "tokenizer": "random weights"}
    assert sampled["weights_dtype"] == sampled["compute_dtype"] == "float32"


def test_no_program_is_compiled_between_batches(sampled):
    assert sampled["compilations"] == 0


def test_the_limit_is_that_of_the_generator_and_the_bandwidth(sampled):
    read, speed = sampled["step_bytes_per_device"], sampled["bandwidth_bytes_per_second"]
    # Two layers of 4 heads of 8; 2 * 4 rows of 1 + 15 positions, keys and values.
    assert read["cache_read"] == 2 * 2 * 8 * 4 * 16 * 8 * 4
    assert read["cache_filled"] == read["cache_read"] * 9 / 16
    tables = 4 * 32 * (16 + 12 + 1)
    assert read["weights"] == 4 * sampled["parameters"] - tables
    needed = sampled["limits"]["needed"]
    limit = 4 * speed / (read["weights"] + read["cache_filled"])
    assert needed["tokens_per_second"] == pytest.approx(limit)
    assert needed["share"] == pytest.approx(sampled["tokens_per_second"] / limit)
    assert 0 < needed["share"] < sampled["limits"]["read"]["share"] < 1


def test_the_text_says_what_was_measured(sampled):
    text = sampling.text_report(sampled)
    for words in ("random weights", "4 images of 16 tokens, guidance 1.75", "tokens/s", "images/s",
                  "0 programs in the 2 timed batches", "cache as it is read", "GB/s measured"):  # fmt: skip
        assert words in text


def test_a_program_compiled_between_batches_is_noticed(monkeypatch):
    """A sampler whose batches are of another size each time."""
    made = []
    draw = Sampler.tokens

    def restless(self, *args):
        self.rows += 1
        made.append(self.rows)
        return draw(self, *args)

    monkeypatch.setattr(Sampler, "tokens", restless)
    monkeypatch.setattr(sampling, "WARM_UP", 1)
    monkeypatch.setattr(bandwidth, "measured_bandwidth", lambda: 1e9)
    config = tiny(policy={"num_classes": 12, "n_layer": 1})
    found = sampling.measure(config, one_device(), 1, 2, 1.0)
    assert found["compilations"] >= 1
    assert batches.problem(found)
    assert len(set(made)) == len(made) == 4


def test_settings_are_those_of_the_sampling_command():
    given = draw_options(parse(["--ckpt=demo", "--out=x", "--cfg=1.75"]))
    assert sampling.draw_settings(1.75) == given


def test_weights_that_are_named_are_taken_and_absent_ones_replaced():
    config = tiny(init={"vq": "/nowhere/vq", "gpt": "/nowhere/gpt"}, policy={"num_classes": 12})
    _, notes = sampling.build(config, one_device())
    for subject in ("generator", "tokenizer"):
        assert notes[subject].startswith("random weights; ")
        assert "/nowhere/" in notes[subject]


def test_a_recipe_without_a_generator_is_refused():
    with pytest.raises(ConfigError, match="config.method='tokenizer'"):
        sampling.build(make_tiny_config("tokenizer", 16), one_device())


def test_a_generator_without_an_unconditional_half_takes_no_guidance():
    config = tiny(policy={"num_classes": 12, "class_dropout_prob": 0.0})
    with pytest.raises(ConfigError, match="--cfg=1.5.*class_dropout_prob"):
        sampling.measure(config, one_device(), 1, 4, 1.5)


# --- judging --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def judged():
    config = make_tiny_config("vapi", 16)
    return evaluation.measure(config, one_device(), 2, "vgg", 3, None, 16)


def test_a_measurement_of_judging_is_consistent(judged):
    assert json.loads(json.dumps(judged, allow_nan=False)) == judged
    assert (judged["mode"], judged["features"], judged["batch_size"]) == (
        "evaluate",
        "lpips_vgg",
        3,
    )
    assert judged["dims"] == {"pool": 512}
    assert judged["image_size"] == 16
    assert judged["images_per_second"] * judged["seconds_per_batch"] == pytest.approx(3)
    work = judged["flops_per_image"] * 3
    assert judged["achieved_flops_per_second"] * judged["network_seconds_per_batch"] == (
        pytest.approx(work)
    )
    share = judged["achieved_flops_per_second"] / judged["peak_flops_per_second"]
    assert judged["peak_share"] == pytest.approx(share)
    assert set(judged["judgement_seconds"]) == {"moments", "merge", "frechet", "precision_recall"}
    assert all(seconds > 0 for seconds in judged["judgement_seconds"].values())
    assert judged["notes"] == {"weights": "bundled", "images": "noise"}


def test_no_program_is_compiled_between_batches_of_features(judged):
    assert judged["compilations"] == 0


def test_the_flops_of_vgg_by_hand(judged):
    """Ten convolutions of 3x3 up to relu4_3, at sides 16, 8, 4 and 2."""
    channels = ((3, 64, 16), (64, 64, 16), (64, 128, 8), (128, 128, 8), (128, 256, 4),
                (256, 256, 4), (256, 256, 4), (256, 512, 2), (512, 512, 2), (512, 512, 2))  # fmt: skip
    work = sum(2 * i * o * 9 * side**2 for i, o, side in channels)
    assert judged["flops_per_image"] == work == 142_442_496
    assert judged["flops_exact"]


def test_the_text_says_what_was_judged(judged):
    text = evaluation.text_report(judged)
    for words in ("lpips_vgg (pool 512); bundled", "3 images of 16x16 pixels", "images/s", "FLOP an image",
                  "0 programs in the 2 timed batches", "Fréchet distance", "over 16 vectors"):  # fmt: skip
        assert words in text


def plain_extractor(apply):
    return F.Extractor("a test's", lambda file, any_weights: F.Weights({"w": np.eye(3)}), apply)


MEANS = plain_extractor(lambda params, images: {"pool": images.mean(axis=(1, 2)) @ params["w"]})
TILED = "tests.bench.test_bench_modes:MEANS"


def test_batches_are_timed_in_the_loop_of_the_evaluation(monkeypatch):
    """A slow digest, of every batch, is in the seconds; what the first batches take is not."""
    slow = [0.3, 0.3, 0.04, 0.04, 0.04, 0.04]
    update = evaluation.collect.__globals__["PixelDigest"].update

    def late(self, batch):
        time.sleep(slow.pop(0))
        return update(self, batch)

    monkeypatch.setattr(evaluation.collect.__globals__["PixelDigest"], "update", late)
    engine, _ = evaluation.make_engine(TILED, 4, one_device(), 2, None)
    seconds, compiled = evaluation.stream_seconds(engine, 4, 3)
    assert len(seconds) == 3 and compiled == 0
    assert 0.04 <= min(seconds) <= sorted(seconds)[1] < 0.3
    assert slow == []


def test_a_program_compiled_between_batches_of_features_is_noticed(monkeypatch):
    engine, _ = evaluation.make_engine(TILED, 4, one_device(), 2, None)
    inner = evaluation.collect

    def restless(engine, images, title, gaussians, rows):
        def read(size):
            for number, batch in enumerate(images.batches(size)):
                jax.jit(lambda x: x + 1)(np.zeros(number))
                yield batch

        return inner(engine, dataclasses.replace(images, _read=read), title, gaussians, rows)

    monkeypatch.setattr(evaluation, "collect", restless)
    assert evaluation.stream_seconds(engine, 4, 3)[1] >= 3


def test_random_inception_has_the_shapes_of_the_released_one():
    weights = evaluation.random_inception()
    folded = jax.tree.map(
        lambda leaf: leaf.shape,
        inception.fold_batch_norm(
            jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), inception.inception_shapes())
        ),
    )
    assert jax.tree.map(np.shape, weights.params) == folded
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(weights.params))
    assert not weights.published
    extractor = F.find_extractor("inception")
    assert F.feature_dims(extractor, weights.params, 32, 32)["pool"] == 2048


def test_extractors_go_by_their_short_names_too():
    assert evaluation.extractor_name("vgg") == "lpips_vgg"
    assert evaluation.extractor_name("lpips_alex") == "lpips_alex"
    assert evaluation.extractor_name("inception") == "inception"
    assert evaluation.extractor_name("nothing") == "nothing"


# --- the command ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--cfg=2",), "--cfg belongs to --mode=sample"),
        (("--batch=2",), "--batch belongs to --mode=sample or evaluate"),
        (("--mode=evaluate", "--cfg=1"), "--cfg belongs to --mode=sample"),
        (("--mode=sample", "--features=vgg"), "--features belongs to --mode=evaluate"),
        (("--mode=sample", "--inception=x"), "--inception belongs to --mode=evaluate"),
        (("--mode=sample", "--vectors=9"), "--vectors belongs to --mode=evaluate"),
        (("--mode=sample", "--plain"), "--plain belongs to --mode=step"),
        (("--mode=evaluate", "--sweep"), "--sweep belongs to --mode=step"),
        (("--mode=evaluate", "--docs=x"), "--docs belongs to --mode=step"),
        (("--mode=sample", "--compile_only"), "--compile_only belongs to --mode=step"),
        (("--mode=sample", "--cfg=nan"), "--cfg=nan must be finite"),
        (("--mode=sample", "--batch=0"), "flag --batch=0"),
        (("--mode=draw",), "flag --mode=draw"),
        (("--mode=evaluate", "--features=nothing"), "error: features 'nothing' are unknown"),
        (("--mode=evaluate", "--features=vgg", "--inception=x"), "error: features 'lpips_vgg' take no"),
        (("--mode=evaluate", "--inception=/nowhere"), "error: /nowhere: no such file"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_for_is_said_in_a_sentence(arguments, message):
    done = commands.module("bench", DEMO, *arguments)
    assert done.returncode == 1
    assert message in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--mode=sample", "--batch=3", "--cfg=1.75"), ("tokens/s", "generator    demo")),
        (("--mode=evaluate", "--features=vgg", "--batch=3", "--vectors=8"), ("lpips_vgg",)),
    ],
)
def test_the_command_measures_and_writes(tmp_path, arguments, words):
    path = tmp_path / "found.json"
    done = commands.module("bench", DEMO, *ONE_DEVICE, "--steps=1", f"--json={path}", *arguments)
    assert done.returncode == 0, done.stderr
    for word in words:
        assert word in done.stdout
    found = json.loads(path.read_text())
    assert found["batch_size"] == 3 and found["compilations"] == 0
    assert found["batches"] == 1
