"""Images with captions train, from every layout, with a T5 in front; a run is taken up bit for bit."""

import dataclasses
import json
import math
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.helpers.image_text import FIELDS, LAYOUTS, pairs, png, write
from tests.helpers.paths import CONFIGS, GOLDEN
from tests.helpers.tiny import make_tiny_method
from vapi_jax.common.recipes import load_recipe
from vapi_jax.data import make_dataset
from vapi_jax.methods.config import to_dict
from vapi_jax.models.conversion import convert
from vapi_jax.models.text_encoder import TextEncoder
from vapi_jax.parallel.sharding import make_mesh, shard_batch
from vapi_jax.training import train
from vapi_jax.training.loop import fit
from vapi_jax.training.plan import check
from vapi_jax.training.run import run

POLICY = {"kind": "text", "cls_token_num": 24, "caption_dim": 32}
T5 = GOLDEN / "t5"
CONDITION = {"name": "caption", "options": {"encoder": str(T5), "dtype": "float32"}}


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(2, 4)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def captioned(mesh, root, layout, images=4, **changes):
    data = {
        "name": "image_text", "path": str(root), "flip": False, "folder_holdout": 0.5,
        "options": {"caption_field": FIELDS[layout]}, "num_threads": 1,
    }  # fmt: skip
    return make_tiny_method(
        "base", mesh, data=data, batch_size=8, eval={"every": 1, "images": images},
        **{"policy": POLICY, "condition": CONDITION, **changes},
    )  # fmt: skip


@pytest.mark.slow
def test_every_layout_trains(mesh, tmp_path):
    methods = {}
    for layout in LAYOUTS:
        methods[layout] = captioned(mesh, write(layout, tmp_path / layout), layout)
    method = methods["tar"]
    optimizer = train.make_optimizer(method.config.optimizer, 2)
    state, shardings = train.init_state(method, optimizer, 0)
    step, frozen = train.make_train_step(method, optimizer, shardings), train.load_frozen(method)
    losses = []
    for one in methods.values():
        batch = next(iter(make_dataset(one.config.data, "train", 8, 0)))
        state, metrics = step(state, frozen, shard_batch(one.prepare(batch), mesh))
        losses.append(float(metrics["ce"]))
    assert losses[0] == pytest.approx(np.log(16), rel=1e-3)  # an untrained head is uniform
    assert 0.0 < losses[-1] < losses[0]


@pytest.mark.slow
def test_a_run_is_taken_up_bit_for_bit_and_trains_no_unconditional_caption(mesh, tmp_path):
    root, half = write("tar", tmp_path / "data"), {"base": {"label_dropout": 0.5}}
    whole = captioned(mesh, root, "tar", steps=4, checkpoint={"every": 0}, **half)
    done = fit(whole, tmp_path / "whole", keep_start=True)
    embedding, start = (p["cls_embedding"] for p in (done.params, done.start_params))
    assert not np.array_equal(embedding["fc1"]["kernel"], start["fc1"]["kernel"])
    np.testing.assert_array_equal(embedding["uncond_embedding"], start["uncond_embedding"])
    fit(captioned(mesh, root, "tar", steps=2, **half), tmp_path / "parts")
    parts = fit(captioned(mesh, root, "tar", steps=4, **half), tmp_path / "parts")
    for a, b in zip(jax.tree.leaves(done.params), jax.tree.leaves(parts.params), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_released_files_start_a_run_with_their_own_unconditional_caption(
    golden, mesh, tmp_path, capsys
):
    args = {part: golden.args(part) for part in ("gpt_t2i", "vq")}
    files = {part: tmp_path / f"{part}.safetensors" for part in args}
    for part, path in files.items():
        save_file(golden.tensors(part), path)
    out, side = tmp_path / "t2i_stage2", 4 * math.isqrt(args["gpt_t2i"]["block_size"])
    convert(
        out, gpt=files["gpt_t2i"], gpt_args=args["gpt_t2i"], vq=files["vq"], vq_args=args["vq"],
        t2i=True,
    )  # fmt: skip
    stored = json.loads((out / "config.json").read_text())
    policy = {k: v for k, v in stored["gpt"].items() if k not in ("name", "model_type")}
    encoder = {**CONDITION["options"], "encoder": str(tmp_path / "t5")}
    load_recipe(CONFIGS / "t2i_xl.py", "t2i_xl").write_encoder(
        Path(encoder["encoder"]), policy["caption_dim"]
    )
    found = [(name, png(n % 256, (40, 36)), text) for n, (name, _, text) in enumerate(pairs(150))]
    root = write("folder", tmp_path / "data", found)
    method = captioned(
        mesh, root, "folder", images=8, init={"gpt": str(out), "vq": str(out)},
        policy={"kind": "text", **policy}, image_size=side,
        tokenizer={k: v for k, v in stored["vq"].items() if k != "name"},
        condition={"name": "caption", "options": encoder},
    )  # fmt: skip
    assert check(to_dict(method.config)) == 0
    state, _ = train.init_state(method, train.make_optimizer(method.config.optimizer, 2), 0)
    kept = golden.tensors("gpt_t2i")["cls_embedding.uncond_embedding"]
    np.testing.assert_array_equal(state.params["cls_embedding"]["uncond_embedding"], kept)
    capsys.readouterr()
    recipe = to_dict(method.config)
    recipe["data"]["image_size"], recipe["policy"]["block_size"] = (
        2 * side,
        4 * policy["block_size"],
    )
    assert check(recipe) == 1
    assert re.search("block_size: it has 16 .*asks for 64 ", capsys.readouterr().err)


def test_a_plan_shows_captions_and_what_is_left_out(mesh, tmp_path, capsys):
    root = write("folder", tmp_path / "data", [*pairs(150), ("none", png(1), "")])
    assert check(to_dict(captioned(mesh, root, "folder", images=8).config)) == 0
    told = capsys.readouterr().out
    assert f"encoder, frozen, from {T5} (float32" in told
    assert told.count("a caption: picture ") == 3
    assert "1 image(s) without a caption" in told


def test_the_condition_is_what_the_encoder_makes_of_a_caption(mesh, tmp_path):
    method = captioned(mesh, write("folder", tmp_path / "data", pairs(2)), "folder")
    texts = np.array(["a red circle", "two dogs"])
    found = method.prepare({"condition": texts})["condition"]
    want = TextEncoder(T5, make_mesh(1, 1, jax.devices()[:1]), length=24)(texts.tolist())
    np.testing.assert_array_equal(found["features"], want.features)
    np.testing.assert_array_equal(found["mask"], want.left_mask)
    assert not found["dropped"].any() and found["mask"].any() and not found["mask"].all()
    assert found["features"].dtype == np.float32
    assert method.condition.load() is dataclasses.replace(method, local=True).condition.load()


def narrow(recipe):
    recipe["policy"] |= {"caption_dim": 48}


def no_encoder(recipe):
    recipe["condition"]["options"].clear()


def absent(recipe):
    recipe["condition"]["options"]["encoder"] = "/no/such/folder"


@pytest.mark.parametrize(
    "spoil, message",
    [
        (narrow, "width 32.*takes 48"),
        (no_encoder, "condition.options.encoder"),
        (absent, "condition.options.encoder: .*no/such/folder"),
    ],
)
def test_an_encoder_that_does_not_fit_is_refused_before_the_run(
    spoil, message, mesh, tmp_path, capsys
):
    root = write("folder", tmp_path / "data", pairs(150))
    recipe = to_dict(captioned(mesh, root, "folder", images=8).config)
    for size in ("length", "width"):
        recipe["condition"]["options"].pop(size, None)
    spoil(recipe)
    assert check(recipe) == 1
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.slow
def test_a_run_ends_with_samples_of_held_out_captions(mesh, tmp_path):
    root = write("folder", tmp_path / "data", pairs(150))
    config = captioned(mesh, root, "folder", images=8, steps=2).config
    shown = dataclasses.replace(config.eval, grid_classes=3, grid_per_class=2)
    summary = run(dataclasses.replace(config, eval=shown, cpu_devices=8), tmp_path / "run")
    names = summary["sample_classes"]
    assert len(names) == 6 and len(set(names)) == 3
    assert all(name.startswith("picture ") for name in names)
    assert (tmp_path / "run" / "samples.png").is_file()


def test_a_tokenizer_learns_from_images_that_have_captions_and_without_lpips(mesh):
    data = {"name": "scenes", "flip": False, "num_threads": 0}
    method = make_tiny_method(
        "tokenizer", mesh, image_size=32, data={**data, "image_size": 32},
        tokenizer_training={"loss": {"perceptual": 0.0, "adversarial": 0.0}},
    )  # fmt: skip
    batch = next(iter(make_dataset(method.config.data, "train", 8, 0)))
    prepared = shard_batch(method.prepare(batch), mesh)
    assert jax.tree.map(np.shape, prepared) == {"image": (8, 32, 32, 3)}
    params = jax.eval_shape(method.init, jax.random.key(0))
    prepared["index"] = np.arange(8)
    weights_of_lpips = None  # nothing may look at them
    loss, _ = jax.eval_shape(
        method.loss, params, {}, {"perceptual": weights_of_lpips}, prepared, jax.random.key(0),
        np.int32(0),
    )  # fmt: skip
    assert loss.shape == ()
