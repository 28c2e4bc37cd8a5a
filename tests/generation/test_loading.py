"""What a checkpoint turns into: the same generator by every road, and sentences where there is none."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import vapi_jax as vj
from tests.helpers.paths import CONFIGS
from vapi_jax.common import digests
from vapi_jax.common.digests import sha256_file
from vapi_jax.common.paths import local_text
from vapi_jax.common.recipes import load_recipe
from vapi_jax.common.trees import flatten
from vapi_jax.evaluation.receipt import precision
from vapi_jax.generation import loading as module
from vapi_jax.generation.loading import load_generator
from vapi_jax.generation.prompts import request_prompts
from vapi_jax.generation.shipped import MODELS
from vapi_jax.methods.resolve import resolve
from vapi_jax.models import llama, vq
from vapi_jax.models.conversion import convert
from vapi_jax.parallel.sharding import make_mesh
from vapi_jax.training.export import open_trained
from vapi_jax.weights import store
from vapi_jax.weights.names import WeightsError, to_reference
from vapi_jax.weights.store import (
    DIGESTS,
    SHIPPED,
    load_safetensors,
    resolve_shipped,
    save_safetensors,
)

RECIPE = load_recipe(str(CONFIGS / "demo_base.py"), "demo_base")
NOTED = json.loads(DIGESTS.read_text())


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def demo(mesh):
    return load_generator("demo", mesh)


def write_run(workdir, policy_weights=SHIPPED["demo"]["policy"], **changes):
    """The workdir of a finished run of configs/demo_base.py, as `vapi_jax.training.run` leaves it."""
    recipe = RECIPE.get_config()
    recipe.policy.num_classes = 12
    recipe.update(changes)
    return write_summary(workdir, recipe, policy_weights)


def write_summary(workdir, recipe, policy_weights, **more):
    config = dataclasses.asdict(resolve(recipe))
    (workdir / "weights").mkdir(parents=True)
    digest = save_safetensors(
        workdir / "weights" / "policy.safetensors", load_safetensors(policy_weights), {}
    )
    summary = {
        "config": json.loads(json.dumps(config, default=str)),
        "weights": {"policy.safetensors": digest},
        "versions": {"vapi_jax": "0.1.0"},
        **more,
    }
    (workdir / "summary.json").write_text(json.dumps(summary))
    return workdir


def equal_trees(a, b):
    a, b = flatten(a), flatten(b)
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def test_the_demo_is_the_shipped_weights_in_float32(demo):
    for kind, params in (("policy", demo.params), ("tokenizer", demo.frozen["tokenizer"])):
        assert equal_trees(params, load_safetensors(SHIPPED["demo"][kind], "float32"))
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}
    assert (demo.image_size, demo.num_classes, demo.policy.num_tokens) == (32, 12, 64)
    assert demo.class_names[:3] == ("astronaut", "camera", "chelsea")
    assert demo.facts["sha256"] == {
        kind: {path.name: NOTED[path.name]} for kind, path in SHIPPED["demo"].items()
    }
    assert demo.facts["trained"]["trained_by"] == "configs/demo_base.py"
    assert json.loads(json.dumps(demo.facts))["policy"]["n_kv_head"] == 2


@pytest.mark.parametrize(("name", "recipe"), [("demo", "c2i_demo"), ("scenes", "t2i_demo")])
def test_the_sizes_of_the_shipped_models_are_those_of_their_recipes(name, recipe):
    """The package cannot import the recipes, which are no part of it, so it repeats their sizes."""
    config, model = resolve(load_recipe(str(CONFIGS / "x"), recipe).get_config()), MODELS[name]
    assert model.tokenizer == config.tokenizer
    policy = {**config.policy, "vocab_size": config.tokenizer.codebook_size, "block_size": 64}
    assert {**policy, **({"num_classes": 12} if name == "demo" else {})} == model.policy
    assert model.image_size == config.data.image_size


def test_scenes_are_drawn_from_captions_by_their_own_encoder(mesh):
    scenes = load_generator("scenes", mesh)
    caption = "a photo of two red stars"
    asked = request_prompts(scenes, caption, 1, "flat", None)
    named = request_prompts(scenes, caption, 1, "flat", SHIPPED["scenes"]["encoder"], clean=False)
    assert asked.facts == named.facts
    own = scenes.condition.prepare(np.array([caption]))
    for name, leaf in asked.encode(np.array([0])).items():
        np.testing.assert_allclose(leaf, own[name], atol=1e-6)
    few = [scenes.sample([text], cfg=2.0) for text in (caption, "a photo of a blue ring")]
    assert not np.array_equal(*few)
    assert scenes.facts["trained"]["trained_by"] == "configs/scenes_base.py"


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        ([0, 12, -1], "there is no class -1, 12; give labels 0 to 11"),
        (np.array([99], np.uint8), "there is no class 99"),
        (["tulips"], "labels are whole numbers, not <U6"),
    ],
)
def test_labels_of_no_class_are_refused(mesh, labels, told):
    with pytest.raises(ValueError, match=told):
        load_generator("demo", mesh).sample(labels)


def test_an_encoder_that_has_changed_since_the_training_is_told(
    tmp_path, monkeypatch, mesh, caplog
):
    folder = tmp_path / "encoder"
    shutil.copytree(SHIPPED["scenes"]["encoder"], folder)
    recipe = load_recipe(str(CONFIGS / "x"), "t2i_demo").get_config()
    # Relative paths are those of where the run was started.
    recipe.condition.options = {"encoder": "encoder", "clean": False}
    noted = {path.name: sha256_file(path) for path in folder.iterdir()}
    run = write_summary(
        tmp_path / "run", recipe, SHIPPED["scenes"]["policy"], directory=str(tmp_path),
        condition={"text_encoder": noted},
    )  # fmt: skip
    generator = load_generator(str(run), mesh)
    request_prompts(generator, "a ring", 1, "flat", None)
    assert not caplog.messages
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings, indent=7))
    with pytest.raises(WeightsError, match=r"has changed.*\(config.json\).*--text_encoder"):
        request_prompts(generator, "a ring", 1, "flat", None)
    with pytest.raises(WeightsError, match="has changed"):
        generator.sample(["a ring"])
    request_prompts(generator, "a ring", 1, "flat", folder)
    assert "is not the encoder that" in caplog.text and "config.json differ" in caplog.text


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_damaged_part_of_a_shipped_encoder_is_named(tmp_path, monkeypatch, name):
    folder = tmp_path / "scenes_encoder"
    shutil.copytree(SHIPPED["scenes"]["encoder"], folder)
    monkeypatch.setitem(SHIPPED["scenes"], "encoder", folder)
    assert resolve_shipped("encoder", "scenes") == folder
    (folder / name).write_bytes((folder / name).read_bytes()[:-1] + b"!")
    with pytest.raises(WeightsError, match=rf"{name} is damaged.*SHA-256"):
        resolve_shipped("encoder", "scenes")
    (folder / name).unlink()
    with pytest.raises(WeightsError, match=f"{name} is missing"):
        resolve_shipped("encoder", "scenes")


def test_the_weights_lie_split_over_the_mesh():
    split = load_generator("demo", make_mesh(2, 4))
    kernel = split.params["layers"]["feed_forward"]["w1"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (4, 192 // 4, 512)
    assert equal_trees(split.params, load_safetensors(SHIPPED["demo"]["policy"], "float32"))


def test_a_run_is_read_from_another_folder_than_it_was_started_in(
    tmp_path, demo, mesh, monkeypatch
):
    """Its recipe named the tokenizer by a relative path."""
    started, elsewhere = tmp_path / "started", tmp_path / "elsewhere"
    for folder in (started, elsewhere):
        folder.mkdir()
    (started / "vq.safetensors").write_bytes(SHIPPED["demo"]["tokenizer"].read_bytes())
    run = write_run(started / "run", init={"vq": "vq.safetensors"})
    path = run / "summary.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "directory": str(started)}))
    monkeypatch.chdir(elsewhere)
    assert equal_trees(load_generator(str(run), mesh).frozen, demo.frozen)
    (started / "vq.safetensors").rename(elsewhere / "vq.safetensors")  # both may have been moved
    assert equal_trees(load_generator(str(run), mesh).frozen, demo.frozen)
    (elsewhere / "vq.safetensors").unlink()
    with pytest.raises(WeightsError, match="init.vq='vq.safetensors'") as error:
        load_generator(str(run), mesh)
    assert str(elsewhere / "vq.safetensors") in str(error.value) and str(started) in str(
        error.value
    )


def test_a_run_is_read_by_its_summary(tmp_path, demo, mesh):
    run = load_generator(str(write_run(tmp_path / "run", seed=5)), mesh)
    assert equal_trees(run.params, demo.params)
    assert equal_trees(run.frozen, demo.frozen)
    assert run.policy == demo.policy
    assert run.class_names == demo.class_names
    trained = run.facts["trained"]
    assert (trained["method"], trained["seed"], trained["steps"]) == ("base", 5, 4000)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert run.facts["sha256"]["policy"] == summary["weights"]
    assert run.facts["sha256"]["tokenizer"] == demo.facts["sha256"]["tokenizer"]


def test_a_run_is_sampled_from_the_folder_of_plain_weights_that_it_was_trained_from(
    tmp_path, demo, mesh
):
    folder = tmp_path / "downloaded"
    folder.mkdir()
    shutil.copy(SHIPPED["demo"]["tokenizer"], folder / "vq_any.safetensors")
    run = load_generator(str(write_run(tmp_path / "run", init={"vq": str(folder)})), mesh)
    assert equal_trees(run.frozen, demo.frozen)
    assert run.facts["sha256"]["tokenizer"] == {
        "vq_any.safetensors": NOTED["demo_tokenizer.safetensors"]
    }


CONVERSION = {"n_head": 6, "n_kv_head": 2, "multiple_of": 64, "block_size": 64, "num_classes": 12}


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """The shipped weights under LlamaGen's names."""
    files, folder = {}, tmp_path_factory.mktemp("released")
    for part, kind, rules in (
        ("gpt", "policy", llama.NAME_RULES),
        ("vq", "tokenizer", vq.NAME_RULES),
    ):
        files[part] = folder / f"{kind}.safetensors"
        params = load_safetensors(SHIPPED["demo"][kind], "float32")
        save_file(to_reference(params, rules), files[part])
    return files


def test_converted_weights_give_the_same_generator(tmp_path, released, demo, mesh):
    manifest = convert(tmp_path / "both", **released, gpt_args=CONVERSION)
    found = load_generator(str(tmp_path / "both"), mesh)
    assert equal_trees(found.params, demo.params)
    assert equal_trees(found.frozen, demo.frozen)
    assert found.policy == demo.policy
    assert (found.image_size, found.num_classes, found.class_names) == (32, 12, None)
    digests = {name: facts["sha256"] for name, facts in manifest["outputs"].items()}
    assert found.facts["sha256"] == {"policy": digests, "tokenizer": digests}
    assert [source["file"] for source in found.facts["trained"]["sources"]] == [
        "policy.safetensors", "tokenizer.safetensors",
    ]  # fmt: skip

    convert(tmp_path / "alone", gpt=released["gpt"], gpt_args=CONVERSION)
    with pytest.raises(WeightsError, match="vq.*--gpt.*--vq"):
        load_generator(str(tmp_path / "alone"), mesh)
    weights = tmp_path / "both" / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-5] ^= 1
    weights.write_bytes(damaged)
    with pytest.raises(WeightsError, match=r"model.safetensors.*SHA-256"):
        load_generator(str(tmp_path / "both"), mesh)


def test_a_folder_called_demo_is_not_shadowed_by_the_shipped_weights(
    tmp_path, released, mesh, demo, monkeypatch, caplog
):
    monkeypatch.chdir(tmp_path)
    convert(Path("demo"), **released, gpt_args=CONVERSION)
    monkeypatch.setattr(store, "SHIPPED", {"demo": {}})  # nothing shipped is looked at
    for place in (local_text("./demo"), local_text("demo/")):
        found = load_generator(place, mesh)
        assert (found.facts["kind"], found.facts["path"]) == ("converted", "demo")
    assert vj.load(Path("demo")).facts["kind"] == "converted"
    with open_trained(Path("demo"), "gpt") as (weights, _):
        assert weights.leaves.keys() == flatten(demo.params).keys()
    with pytest.raises(KeyError):
        load_generator("demo", mesh)
    assert "./demo" in caplog.text


@pytest.mark.parametrize("asked", [{}, {"dtype": "bfloat16"}])
def test_every_checkpoint_computes_in_what_is_asked_for(tmp_path, released, mesh, demo, asked):
    """A converted base, its post-trained run in bfloat16 and the demo: in one precision, float32."""
    base, dtype = tmp_path / "base", asked.get("dtype", "float32")
    convert(base, **released, gpt_args=CONVERSION)
    narrow = {"policy": {"dtype": "bfloat16", "attention": "xla"}}
    narrow["tokenizer"] = {"decoder_dtype": "bfloat16"}
    run = write_run(tmp_path / "run", init={"gpt": str(base), "vq": str(base)}, **narrow)
    for ckpt in ("demo", str(base), str(run)):
        found = load_generator(ckpt, mesh, **asked)
        assert found.policy == dataclasses.replace(
            demo.policy, config=dataclasses.replace(demo.policy.config, dtype=dtype)
        )
        sizes = dataclasses.replace(demo.pixels.tokenizer.config, decoder_dtype=dtype)
        assert found.pixels.tokenizer.config == sizes
        assert equal_trees(found.params, demo.params)
        assert precision({"checkpoint": json.loads(json.dumps(found.facts))}) == {
            "policy.dtype": dtype,
            "tokenizer.decoder_dtype": dtype,
        }


def test_every_file_is_hashed_once(tmp_path, released, mesh, monkeypatch):
    base = tmp_path / "base"
    outputs = convert(base, **released, gpt_args=CONVERSION)["outputs"]
    run = write_run(tmp_path / "run", init={"gpt": str(base), "vq": str(base)})
    hashed = []

    def counting(path):
        return sha256_file(path, hashed.append)

    monkeypatch.setattr(digests, "sha256_file", counting)
    load_generator(str(base), mesh)
    size = sum(facts["size"] for facts in outputs.values())
    assert sum(hashed) == size
    load_generator(str(base), mesh)  # and by a process once: a table samples many times
    assert sum(hashed) == size
    load_generator(str(run), mesh)
    weights = run / "weights" / "policy.safetensors"
    assert sum(hashed) == size + weights.stat().st_size
    with weights.open("r+b") as file:  # what has changed is another file
        file.seek(-5, 2)
        file.write(b"x")
    with pytest.raises(WeightsError, match="not the file that the run wrote"):
        load_generator(str(run), mesh)


def test_class_names_are_left_out_where_the_data_is_gone(tmp_path, mesh):
    data = {"name": "image_folder", "path": str(tmp_path / "gone"), "image_size": 32}
    run = load_generator(str(write_run(tmp_path / "run", data=data)), mesh)
    assert (run.class_names, run.num_classes) == (None, 12)


def edit(path, change):
    summary = json.loads(path.read_text())
    change(summary)
    path.write_text(json.dumps(summary))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda run: (run / "summary.json").unlink(), "Looked there for"),
        (lambda run: (run / "summary.json").write_text("{"), "JSON"),
        (lambda run: (run / "summary.json").write_text("[]"), "summary.json.*JSON object"),
        (
            lambda run: edit(run / "summary.json", lambda s: s["config"]["init"].update(new=1)),
            "another version.*config.init.new",
        ),
        (
            lambda run: edit(run / "summary.json", lambda s: s["config"]["init"].update(vq="")),
            "tokenizer",
        ),
        (
            lambda run: (run / "weights" / "policy.safetensors").unlink(),
            "summary.json.*weights/policy.safetensors",
        ),
        (
            lambda run: (run / "weights" / "policy.safetensors").write_bytes(b"other"),
            "SHA-256.*d9298a10d1b0735837dc4bd85dac641b",
        ),
        (
            lambda run: edit(
                run / "summary.json",
                lambda s: (s["config"]["policy"].update(n_layer=3), s["weights"].clear()),
            ),
            "n_layer|layers/|fit",
        ),
    ],
)
def test_a_broken_run_is_refused_with_what_is_wrong(tmp_path, mesh, break_it, message):
    run = write_run(tmp_path / "run")
    break_it(run)
    with pytest.raises(WeightsError, match=f"(?s){message}"):
        load_generator(str(run), mesh)


def test_what_was_looked_for_is_said(tmp_path, mesh):
    with pytest.raises(WeightsError, match="'nowhere'.*'demo'"):
        load_generator("nowhere", mesh)
    (tmp_path / "file").write_text("")
    with pytest.raises(WeightsError, match="is a file"):
        load_generator(str(tmp_path / "file"), mesh)
    with pytest.raises(WeightsError) as caught:
        load_generator(str(tmp_path), mesh)
    for marker, (what, _) in module.DIRECTORIES.items():
        assert f"{marker} of {what}" in str(caught.value)


def test_a_run_that_has_not_finished_is_said_to_be(tmp_path, mesh):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(WeightsError, match="not finished"):
        load_generator(str(tmp_path), mesh)


def test_generator_and_tokenizer_must_fit(monkeypatch, mesh):
    policy = {**MODELS["demo"].policy, "block_size": 49}
    monkeypatch.setitem(MODELS, "demo", dataclasses.replace(MODELS["demo"], policy=policy))
    with pytest.raises(WeightsError, match="49.*1024.*8x8.*1024"):
        load_generator("demo", mesh)
