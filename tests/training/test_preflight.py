"""What a run lacks on this machine: found all at once, before anything is allocated or written."""

import dataclasses
import json
import os
import shutil

import jax
import numpy as np
import pytest

from tests.helpers.image_folders import write_images
from tests.helpers.messages import assert_mentions
from tests.helpers.tiny import TOKENIZER, make_tiny_config
from vapi_jax.common import locks
from vapi_jax.common.options import Errors
from vapi_jax.data.images import UnreadableImage
from vapi_jax.data.photos import PhotoSource
from vapi_jax.methods import make_method
from vapi_jax.methods.classes import with_classes
from vapi_jax.methods.config import ConfigError
from vapi_jax.methods.resolve import resolve
from vapi_jax.models.conversion import convert, model_shapes
from vapi_jax.models.discriminator import PatchGAN
from vapi_jax.models.loading import read_manifest
from vapi_jax.models.vq import VQConfig
from vapi_jax.parallel.sharding import make_mesh
from vapi_jax.training import resume, train
from vapi_jax.training.checkpoint import Checkpointer
from vapi_jax.training.preflight import (
    look_at_data,
    look_at_weights,
    look_at_workdir,
    notes_on_weights,
    open_mesh,
    require,
)
from vapi_jax.weights.store import load_safetensors, save_safetensors

POLICY = {"kind": "class", "dim": 32, "n_layer": 2, "n_head": 4, "multiple_of": 16}
RUNNABLE = {
    "name": "x",
    "method": "vapi",
    "batch_size": 16,
    "data": {"image_size": 16},
    "tokenizer": TOKENIZER,
    "policy": {**POLICY, "num_classes": 12},
    "rewards": ("mse",),
    "init": {"vq": ""},
    "eval": {"images": 24},
}
TRAINING = {"method": "tokenizer", "tokenizer_training": {"discriminator_layers": 1}}


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "tokenizer.safetensors"
    shapes = model_shapes(VQConfig(**TOKENIZER))
    save_safetensors(path, jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes), {})
    return str(path)


@pytest.fixture
def recipe(tokenizer_file):
    """A recipe that can run, with changes by section."""

    def make(**changes):
        raw = {**RUNNABLE, "init": {"vq": tokenizer_file}}
        for name, change in changes.items():
            old = raw.get(name, {})
            raw[name] = {**old, **change} if isinstance(change, dict) else change
        return raw

    return make


def problems(raw):
    try:
        require(raw)
    except ConfigError as error:
        count, *lines = str(error).split("\n  - config.")
        assert count == f"{len(lines)} error(s) in the configuration:"
        return lines
    return []


def test_a_recipe_that_can_run_is_resolved(recipe):
    assert require(recipe()) == resolve(recipe())


def test_everything_is_said_at_once_and_nothing_is_allocated_or_written(
    recipe, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    before = sum(array.nbytes for array in jax.live_arrays())
    found = problems(
        recipe(
            steps=0,
            batch_size=12,
            mesh={"data": 3},
            data={"name": "image_folder", "path": "nowhere"},
            init={"gpt": "no/such/policy.pt", "vq": ""},
        )
    )
    assert [line.split("=")[0].split(":")[0] for line in found] == [
        "steps",
        "mesh",
        "batch_size",
        "data.path",
        "init.gpt",
        "init.vq",
    ]
    assert sum(array.nbytes for array in jax.live_arrays()) - before < 10_000
    assert list(tmp_path.iterdir()) == []


# Devices -----------------------------------------------------------------------------------------


def test_devices_are_compared_with_the_mesh_the_batch_and_the_kernels(recipe):
    assert problems(recipe(mesh={"data": 3, "fsdp": 2})) == [
        "mesh: mesh data=3, fsdp=2 does not fit 8 device(s): the two must multiply to 8; -1 for one "
        "of them takes what is left"
    ]
    assert problems(recipe(batch_size=20)) == [
        "batch_size=20: not a multiple of the 8 devices; take 24"
    ]
    found = problems(recipe(policy={"attention": "cudnn"}))
    assert [line.split(":")[0] for line in found] == ["policy.attention='cudnn'"]
    assert found[0].endswith("; choose 'auto'")


def test_the_mesh_is_the_one_of_the_configuration():
    errors = Errors()
    mesh = open_mesh(make_tiny_config("base", mesh={"data": 2, "fsdp": -1}), errors)
    assert (dict(mesh.shape), errors) == ({"data": 2, "fsdp": 4}, [])


# Data --------------------------------------------------------------------------------------------


def folder(path, **options):
    return {"name": "image_folder", "path": str(path), **options}


@pytest.fixture
def images(tmp_path):
    """Twelve classes of 20 training and 4 held-out images."""
    root = tmp_path / "data"
    for label in range(12):
        write_images(root / "train" / f"{label:02d}", 20)
        write_images(root / "val" / f"{label:02d}", 4)
    return root


def test_a_folder_that_has_all_is_fine(recipe, images):
    assert problems(recipe(data=folder(images))) == []


def test_what_lies_among_the_images_is_told(recipe, images):
    (images / "train" / "00" / "notes.txt").write_text("x")
    errors = Errors()
    found = look_at_data(resolve(recipe(data=folder(images))), errors)
    assert (errors, found.notes) == (
        [],
        [f"data.path='{images}': left out: 1 file(s) ending in .txt"],
    )


def test_data_that_is_not_there_is_said_once(recipe, images, tmp_path):
    (line,) = problems(recipe(data=folder(tmp_path / "nowhere")))
    assert line.startswith(f"data.path='{tmp_path}/nowhere': there is no folder {tmp_path}/nowhere")
    (line,) = problems(recipe(data=folder(images / "train" / "00" / "000.png")))
    assert "there is no folder" in line
    (line,) = problems(recipe(data=folder("")))
    assert line.startswith("data.name='image_folder': image_folder needs `path`")
    (line,) = problems(recipe(data={"name": "tfds", "dataset": "tiny", "path": str(tmp_path)}))
    assert "'tiny' is not prepared" in line
    shutil.rmtree(images / "val")
    (line,) = problems(recipe(data=folder(images)))
    assert f"there is no folder {images}/val for split 'val'; {images} holds 1 folder(s)" in line


def test_labels_that_the_generator_has_no_embedding_for_are_refused(recipe, images):
    for data in ({}, folder(images)):
        assert problems(recipe(data=data, policy={"num_classes": 5})) == [
            "policy.num_classes=5: the data has 12 classes, and labels from 5 on have no embedding; "
            "take 12"
        ]


def test_the_class_count_of_the_data_is_taken_where_none_is_named(recipe):
    raw = recipe()
    raw["policy"] = POLICY
    errors = Errors()
    assert with_classes(resolve(raw), errors).policy["num_classes"] == 12
    named = recipe(policy={"num_classes": 1000})
    assert with_classes(resolve(named), errors).policy["num_classes"] == 1000
    assert errors == []


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"eval": {"images": 56}},
            "eval.images=56: split 'val' has 48 images, and at least 56 are looked at",
        ),
        (
            {"eval": {"compare": True, "samples": 600, "images": 24}, "data": {"image_size": 16}},
            "eval.samples=600: split 'train' has 240 images, and at least 600 are looked at",
        ),
    ],
)
def test_splits_must_hold_what_is_looked_at(recipe, images, changes, line):
    changes = {**changes, "data": {**changes.get("data", {}), **folder(images)}}
    assert problems(recipe(**changes)) == [line]


@pytest.mark.parametrize(("broken", "fatal"), [(1, False), (2, True)])
def test_a_look_at_some_images_tells_whether_they_can_be_read(recipe, images, broken, fatal):
    for path in sorted((images / "train").rglob("*.png"))[::239][:broken]:
        path.write_bytes(b"")
    errors = Errors()
    found = look_at_data(resolve(recipe(data=folder(images))), errors, images=32)
    lines = errors if fatal else found.notes
    assert len(errors) + len(found.notes) == 1
    assert (
        f"{broken} of 32 train images tried cannot be read: {images}/train/00/000.png" in lines[0]
    )
    assert look_at_data(resolve(recipe(data=folder(images))), Errors()).notes == []


def test_no_image_is_opened_unless_a_look_is_asked_for(recipe, monkeypatch):
    def fail(*_):
        raise UnreadableImage("opened")

    monkeypatch.setattr(PhotoSource, "sample", fail)
    assert problems(recipe()) == []


# Weights -----------------------------------------------------------------------------------------


def weights(raw, errors=None, **look):
    config = resolve(raw)
    errors = Errors() if errors is None else errors
    return look_at_weights(config, None, errors, **look)


def test_every_network_is_told_where_it_comes_from(recipe, tokenizer_file):
    found = weights(recipe(rewards=("mse", "lpips")))
    assert {name: (w.origin, w.state) for name, w in found.items()} == {
        "policy": ("from scratch", ""),
        "tokenizer": (tokenizer_file, "no digest known"),
        "reward lpips": ("bundled LPIPS (vgg)", "digest verified"),
    }
    assert weights({**RUNNABLE, **TRAINING})["tokenizer"].origin == "from scratch"


def test_the_demo_vouches_for_its_weights():
    recipe = {
        "name": "x",
        "method": "base",
        "tokenizer": {
            "codebook_size": 512, "ch": 32, "encoder_ch_mult": (1, 2, 3),
            "decoder_ch_mult": (1, 2, 3), "num_res_blocks": 1, "z_channels": 96,
        },
        "policy": POLICY,
        "init": {"vq": "demo"},
    }  # fmt: skip
    assert weights(recipe)["tokenizer"].state == "digest verified"


@pytest.mark.parametrize("option", ["gpt", "vq"])
def test_weights_that_are_not_there_are_named(recipe, tmp_path, option):
    path = str(tmp_path / "absent.safetensors")
    (line,) = problems(recipe(init={option: path}))
    assert line.startswith(f"init.{option}={path!r}: ")
    assert path in line.split(": ", 1)[1]


def test_perceptual_files_that_are_not_there_are_named(recipe, tokenizer_file):
    lpips = {"name": "lpips", "options": {"files": (tokenizer_file, "heads.pth")}}
    gan = {"name": "gan", "options": {"weights": "gone.safetensors", "layers": 1}}
    found = problems(recipe(rewards=(lpips, gan)))
    assert found[0] == "rewards.lpips: there is no file heads.pth"
    assert found[1] == "rewards.gan: there is no file gone.safetensors"
    files = {"perceptual_files": (tokenizer_file, "heads.pth"), "discriminator_layers": 1}
    (line,) = problems({**RUNNABLE, **TRAINING, "tokenizer_training": files})
    assert line == "tokenizer_training.perceptual_files: there is no file heads.pth"


def test_a_generator_without_a_tokenizer_is_refused(recipe):
    (line,) = problems(recipe(init={"vq": ""}))
    assert line.startswith("init.vq='': the method needs these weights; name 'demo' or")


def test_weights_of_another_model_are_refused_by_their_header(recipe, tokenizer_file):
    (line,) = problems(recipe(init={"gpt": tokenizer_file}))
    assert line.startswith(f"init.gpt={tokenizer_file!r}: the weights in {tokenizer_file}")
    wider = recipe(tokenizer={"z_channels": 16})
    found = problems(wider)
    assert any(line.startswith(f"init.vq={tokenizer_file!r}") for line in found)


@pytest.mark.parametrize(
    "content", [b"", b"no weights", b"\x08\0\0\0\0\0\0\0{}"], ids=["empty", "text", "bare"]
)
def test_files_that_hold_no_weights_are_refused(recipe, tmp_path, content):
    path = tmp_path / "vq.safetensors"
    path.write_bytes(content)
    (line,) = problems(recipe(init={"vq": str(path)}))
    assert line.startswith(f"init.vq={str(path)!r}: ")


def test_a_directory_that_is_neither_converted_nor_a_run_is_refused(recipe, tmp_path):
    (line,) = problems(recipe(init={"vq": str(tmp_path)}))
    assert "without manifest.json" in line


def converted(path, config, **facts):
    """A converted directory, but for its weights, of which only the size is looked at."""
    path.mkdir()
    (path / "model.safetensors").write_bytes(b"12345")
    (path / "config.json").write_text(json.dumps({"vq": dataclasses.asdict(config)}))
    outputs = {"model.safetensors": {"size": 5, "sha256": "-", **facts}}
    (path / "manifest.json").write_text(json.dumps({"outputs": outputs}))
    return str(path)


def test_a_converted_directory_is_compared_without_reading_its_weights(recipe, tmp_path):
    same = VQConfig(**TOKENIZER)
    path = converted(tmp_path / "same", same)
    assert weights(recipe(init={"vq": path}))["tokenizer"].state == "digests known"
    other = dataclasses.replace(same, codebook_size=99)
    (line,) = problems(recipe(init={"vq": converted(tmp_path / "other", other)}))
    assert "it holds another model; codebook_size: it has 99, the configuration asks for" in line
    (line,) = problems(recipe(init={"vq": converted(tmp_path / "short", same, size=6)}))
    assert "model.safetensors is missing or not of its size; convert the weights again" in line
    found = problems(recipe(init={"gpt": converted(tmp_path / "half", same)}))
    assert any("it holds vq and no gpt" in line for line in found)


@pytest.mark.parametrize("kind", ["demo", "run", "file of a run"])
def test_weights_that_have_never_seen_such_a_grid_are_worth_a_note(recipe, tmp_path, kind):
    (tmp_path / "config.json").write_text(json.dumps({"data": {"image_size": 32}}))
    weights = tmp_path / "weights"
    weights.mkdir()
    paths = {"run": str(tmp_path), "file of a run": str(weights / "policy.safetensors")}
    init = {"gpt": paths.get(kind, "demo")}
    (note,) = notes_on_weights(resolve(recipe(data={"image_size": 64}, init=init)))
    assert_mentions(note, f"init.gpt={init['gpt']!r}", "32 px", "data.image_size=64")
    assert notes_on_weights(resolve(recipe(data={"image_size": 32}, init=init))) == []
    assert notes_on_weights(resolve(recipe(data={"image_size": 64}))) == []


def test_a_thorough_look_reads_what_a_run_will_read(recipe, golden, tokenizer_file, tmp_path):
    """Damage and values that are not finite are no matter of headers."""
    errors, path = Errors(), tmp_path / "converted"
    convert(path, vq=golden.directory / "vq.safetensors")
    sizes = {name: value for name, value in read_manifest(path)[0]["vq"].items() if name != "name"}
    asked = recipe(tokenizer=sizes, init={"vq": str(path)})
    assert weights(asked, errors, thorough=True)["tokenizer"].state == "digests verified"
    assert errors == []
    weights_file = path / "model.safetensors"
    data = bytearray(weights_file.read_bytes())
    data[-1] ^= 1
    weights_file.write_bytes(data)
    weights(asked, errors)
    assert errors == [], "a size and a header tell nothing"
    weights(asked, errors, thorough=True)
    assert_mentions(errors[0], "init.vq", "model.safetensors", "SHA-256")
    broken = load_safetensors(tokenizer_file)
    broken["codebook"]["embedding"][3, 1] = np.nan
    save_safetensors(tmp_path / "nan.safetensors", broken)
    asked = recipe(init={"vq": str(tmp_path / "nan.safetensors")})
    for thorough, count in ((False, 0), (True, 1)):
        errors = Errors()
        weights(asked, errors, thorough=thorough)
        assert len(errors) == count
    assert_mentions(errors[0], "init.vq", "codebook/embedding", "1 of 64 values")


@pytest.mark.parametrize("wrong", [{"ndf": 4}, {"ndf": 8}])
def test_a_reward_whose_weights_do_not_fit_is_refused(recipe, tmp_path, wrong):
    """At once, though the header is fine; only one of the two widths is that of the file."""
    network = PatchGAN(ndf=4, n_layers=1)
    image = jax.ShapeDtypeStruct((1, 16, 16, 3), np.float32)
    shapes = jax.eval_shape(lambda x: network.init(jax.random.key(0), x, train=False), image)
    path = tmp_path / "discriminator.safetensors"
    save_safetensors(path, jax.tree.map(lambda x: np.ones(x.shape, x.dtype), shapes))
    gan = {"name": "gan", "options": {"weights": str(path), "layers": 1, **wrong}}
    errors = Errors()
    weights(recipe(rewards=(gan,)), errors, thorough=True)
    assert len(errors) == (0 if wrong["ndf"] == 4 else 1)
    save_safetensors(path, jax.tree.map(lambda x: np.full(x.shape, np.nan, x.dtype), shapes))
    weights(recipe(rewards=(gan,)), errors, thorough=True)
    told = "not finite" if wrong["ndf"] == 4 else "wrong shape"
    assert errors[-1].startswith("rewards.gan") and told in errors[-1]


def test_a_reward_without_its_weights_says_which_option(recipe):
    (line,) = problems(recipe(data={"image_size": 32}, rewards=("gan",)))
    assert line.startswith("rewards.gan: weights=''")


# Workdir -----------------------------------------------------------------------------------------


def at(workdir, raw):
    errors = Errors()
    look_at_workdir(resolve(raw), workdir, errors)
    return errors


def test_a_workdir_of_another_run_is_refused_and_nothing_is_made(recipe, tmp_path):
    workdir = tmp_path / "run"
    assert at(workdir, recipe()) == []
    assert not workdir.exists()
    config = resolve(recipe())
    with Checkpointer(workdir / "checkpoints") as saver:
        facts = resume.facts_of(config, resume.Progress(step=2), {}, resume.code_facts())
        saver.save(2, {"params": {"w": np.ones(3, np.float32)}}, facts)
        saver.wait()
    assert at(workdir, recipe()) == []
    (line,) = at(workdir, recipe(batch_size=32))
    assert_mentions(line, f"--workdir={workdir}", "batch_size: 16 -> 32", "--resume_with_changes")
    (line,) = at(workdir, recipe(steps=1))
    assert_mentions(line, "step 2", "steps: 100 -> 1")
    with locks.hold(workdir):
        (line,) = at(workdir, recipe())
    assert_mentions(line, f"process {os.getpid()}")
    assert at(workdir, recipe()) == []


def test_other_frozen_weights_than_those_of_the_checkpoint_are_refused(
    recipe, tokenizer_file, tmp_path
):
    """As the run refuses them, by their digests; the file has kept its name."""
    weights = shutil.copy(tokenizer_file, tmp_path / "vq.safetensors")
    config = resolve(recipe(init={"vq": str(weights)}))
    mesh = make_mesh(1, 1, jax.devices()[:1])
    origin = resume.origin_facts(train.load_frozen(make_method(config, mesh)), None)
    with Checkpointer(tmp_path / "run" / "checkpoints") as saver:
        facts = resume.facts_of(config, resume.Progress(step=2), origin, resume.code_facts())
        saver.save(2, {"params": {"w": np.ones(3, np.float32)}}, facts)
        saver.wait()

    def found():
        errors = Errors()
        look_at_workdir(config, tmp_path / "run", errors, mesh=mesh)
        return errors

    assert found() == []
    save_safetensors(weights, jax.tree.map(lambda leaf: leaf + 1, load_safetensors(weights)), {})
    (line,) = found()
    assert_mentions(line, f"--workdir={tmp_path / 'run'}", "tokenizer", "--resume_with_changes")


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_workdir_that_cannot_be_written_is_refused(recipe, tmp_path):
    tmp_path.chmod(0o500)
    (line,) = at(tmp_path / "a" / "b", recipe())
    assert_mentions(line, f"--workdir={tmp_path}/a/b", "permission denied")


def test_a_finished_run_serves_as_weights(recipe, tokenizer_file, tmp_path):
    (tmp_path / "weights").mkdir()
    shutil.copy(tokenizer_file, tmp_path / "weights" / "tokenizer.safetensors")
    assert problems(recipe(init={"vq": str(tmp_path)})) == []
