"""Rewards that read prompts, from a method's batches to a sample's worth."""

import jax
import numpy as np
import pytest

from tests.helpers.clip_files import make_model, write_tokenizer
from tests.helpers.compare import assert_close
from tests.helpers.tiny import make_tiny_method
from vapi_jax.common.digests import sha256_file
from vapi_jax.models.classes import ClassesError
from vapi_jax.models.conditions import stored_caption
from vapi_jax.parallel.sharding import make_mesh
from vapi_jax.rewards.clip import CLIPScore
from vapi_jax.training.train import load_frozen

ROWS, LENGTH, WIDTH = 2, 3, 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip")
    make_model(side=16).save_pretrained(path)
    write_tokenizer(path)
    return str(path)


def shapes(tree):
    return jax.tree.map(lambda leaf: leaf.shape, tree)


def test_embeddings_of_class_prompts_are_what_their_texts_and_files_make_them(folder):
    clip = {"name": "clip", "options": {"weights": folder, "prompts": "imagenet"}}
    changes = {"rewards": ("mse", clip), "policy": {"num_classes": 1000}}
    method = make_tiny_method("vapi", make_mesh(devices=jax.devices()[:1]), **changes)
    [(path, (texts, files))] = method.computed().items()
    assert path == "rewards/clip/prompts"
    assert texts[0] == "a photo of tench, Tinca tinca" and len(texts) == 1000
    assert files["weights"]["model.safetensors"] == sha256_file(f"{folder}/model.safetensors")
    assert not make_tiny_method("vapi", method.mesh).computed()


def test_a_list_of_classes_that_is_not_there_is_told_with_the_weights_and_not_in_a_step(folder):
    gone = {"prompts": "gone.txt"}
    clip = {"name": "clip", "options": {"weights": folder, **gone}}
    http = {"name": "http", "options": {"url": "http://localhost:9/", **gone}}
    mesh = make_mesh(devices=jax.devices()[:1])
    *_, network = make_tiny_method("vapi", mesh, rewards=("mse", clip)).networks()
    assert network.option == "rewards.clip"
    asks = make_tiny_method("vapi", mesh, rewards=(http,))
    for look in (network.origin, lambda: asks.prepare({"condition": np.zeros(ROWS, int)})):
        with pytest.raises(ClassesError, match=r"there is no file gone\.txt"):
            look()


def test_captions_of_a_batch_reach_the_reward_that_asks_for_them(folder):
    clip = {"name": "clip", "options": {"weights": folder, "dtype": "float32"}}
    policy = {"kind": "text", "cls_token_num": LENGTH, "caption_dim": WIDTH}
    method = make_tiny_method(
        "vapi",
        make_mesh(devices=jax.devices()[:1]),
        policy=policy,
        condition={"name": "caption"},
        rewards=("mse", clip),
    )
    raw = np.zeros(ROWS, stored_caption(LENGTH, WIDTH, 20))
    raw["caption"] = ["the cat", "a photo of the cat"] * (ROWS // 2)
    raw["length"] = 2
    rng = np.random.default_rng(0)
    image = rng.uniform(-1, 1, (ROWS, 8, 8, 3)).astype(np.float32)
    batch = method.prepare({"image": image, "condition": raw})
    assert shapes(batch) == shapes(method.example_batch(ROWS))
    samples = rng.integers(0, 16, (ROWS, 2, 16)).astype(np.int32)
    frozen = load_frozen(method)

    @jax.jit
    def both(frozen, samples, batch):
        decoded = method.pixels.decode(frozen, samples.reshape(-1, 16))
        return method.judge(frozen, method.judges)(samples, batch), decoded

    found, decoded = both(frozen, samples, batch)
    reward = CLIPScore(weights=folder, dtype="float32")
    pixels = np.asarray(decoded).reshape(ROWS, 2, 8, 8, 3)
    asked = {"prompt": reward.prepare(raw["caption"])}
    want = jax.jit(lambda w, x, b: reward(w, x, b))(reward.load(), pixels, asked)
    # A value that is rounded to another 8-bit level moves a score by as much.
    assert_close(found["clip"], want, 1e-3)
    assert np.ptp(np.asarray(want)) > 1e-3 and found["mse"].shape == (ROWS, 2)
