"""A generator and its text encoder learn together; frozen, the encoder makes the features it made then."""

import jax
import numpy as np
import pytest

from tests.helpers.paths import ROOT
from tests.helpers.tiny import make_tiny_config, make_tiny_method
from vapi_jax.common.trees import flatten
from vapi_jax.data.scenes.grammar import words
from vapi_jax.methods.config import ConfigError
from vapi_jax.models import t5, text_encoder
from vapi_jax.models.text_encoder import TextEncoder
from vapi_jax.parallel.sharding import make_mesh, shard_batch
from vapi_jax.training import train

WORDS = ROOT / "vapi_jax" / "assets" / "scenes_encoder"
SCENES = {
    "image_size": 32,
    "data": {"name": "scenes", "flip": False, "image_size": 32},
    "policy": {"kind": "text", "dim": 32, "n_layer": 1, "cls_token_num": 12, "caption_dim": 64},
    "condition": {"name": "caption", "options": {"clean": False}},
    "text_base": {"encoder": str(WORDS)},
    "batch_size": 8,
}
CAPTIONS = np.array(["a red ring", "a photo of two arches", "a star above a cross", "a ring"] * 2)


@pytest.fixture(scope="module")
def method():
    return make_tiny_method("text_base", make_mesh(1, 2, jax.devices()[:2]), **SCENES)


@pytest.mark.slow
def test_both_networks_learn_and_the_frozen_encoder_makes_the_same_features(method, tmp_path):
    optimizer = train.make_optimizer(method.config.optimizer, 2)
    state, shardings = train.init_state(method, optimizer, 0)
    start = flatten(jax.device_get(state.params))
    step, frozen = train.make_train_step(method, optimizer, shardings), train.load_frozen(method)
    rng, losses = np.random.default_rng(0), []
    images = rng.uniform(-1, 1, (8, 32, 32, 3)).astype(np.float32)
    batch = shard_batch(method.prepare({"image": images, "condition": CAPTIONS}), method.mesh)
    for _ in range(3):
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
    assert losses[2] < losses[0]
    params = jax.device_get(state.params)
    changed = {n for n, x in flatten(params).items() if not np.array_equal(x, start[n])}
    assert {name for name in start if name.startswith("encoder/")} <= changed
    assert "policy/cls_embedding/uncond_embedding" not in changed

    folder = tmp_path / "encoder"
    text_encoder.write_config(folder, method.encoder)
    (folder / "tokenizer.json").write_bytes((WORDS / "tokenizer.json").read_bytes())
    text_encoder.write_weights(folder, method.weights_of(params, {})["encoder"])
    found = TextEncoder(folder, make_mesh(1, 1, jax.devices()[:1]), length=12, clean=False)
    given = found(CAPTIONS.tolist())
    then = method._encoded(params, {"condition": jax.device_get(batch["condition"])})["condition"]
    np.testing.assert_allclose(given.features, then["features"], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(given.left_mask, then["mask"])


def test_all_words_of_scenes_are_known(method):
    ids = method.prepare({"condition": np.array([" ".join(words()[i::6]) for i in range(6)])})
    unknown = 2
    assert unknown not in ids["condition"]["ids"]
    assert unknown in method.prepare({"condition": np.array(["a horse"])})["condition"]["ids"]


def test_a_fresh_encoder_keeps_the_size_of_what_goes_through():
    config = t5.T5Config(d_model=64, num_layers=2, num_heads=4, d_kv=16, d_ff=128, vocab_size=50)
    params = jax.jit(t5.init, static_argnums=1)(jax.random.key(0), config)
    shapes = {n: x.shape for n, x in flatten(t5.shapes(config)).items()}
    assert {n: x.shape for n, x in flatten(params).items()} == shapes
    deviations = {n: float(np.std(x)) for n, x in flatten(params).items()}
    assert deviations["embed_tokens/embedding"] == pytest.approx(1.0, rel=0.1)
    assert deviations["layers/attention/wq/kernel"] == pytest.approx((64 * 16) ** -0.5, rel=0.1)
    assert deviations["layers/feed_forward/w2/kernel"] == pytest.approx(128**-0.5, rel=0.1)
    assert deviations["final_norm/scale"] == 0.0


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"text_base": {"encoder": ""}}, "text_base.encoder"),
        ({"init": {"gpt": "demo"}}, "init.gpt='demo'"),
        ({"eval": {"sampled_every": 5}}, "eval.sampled_every"),
        ({"condition": {"options": {"encoder": str(WORDS)}}}, "condition.options.encoder"),
    ],
)
def test_what_makes_no_sense_together_is_said(changes, named):
    with pytest.raises(ConfigError, match=named):
        make_tiny_config("text_base", **{**SCENES, **changes})
