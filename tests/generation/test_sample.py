"""The sampler's command: the images it promises, by any route, and what it says when it cannot."""

import dataclasses
import errno
import json
import re
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests.helpers import commands
from tests.helpers.paths import ROOT
from vapi_jax import sample
from vapi_jax.common.images import to_uint8
from vapi_jax.common.locks import LOCK
from vapi_jax.generation.files import SampleFiles
from vapi_jax.generation.loading import load_generator
from vapi_jax.generation.requests import make_requests
from vapi_jax.generation.sampler import Sampler, decode, in_batches
from vapi_jax.methods import make_method
from vapi_jax.methods.resolve import resolve
from vapi_jax.models import sampling
from vapi_jax.models.conditions import text_condition
from vapi_jax.models.policies import make_policy
from vapi_jax.models.resize import bicubic_torch
from vapi_jax.parallel.sharding import make_mesh, replicated, shard_whole
from vapi_jax.weights.store import save_safetensors

LABELS = np.array([2, 4, 2, 4, 2, 4, 2, 4, 2, 4, 2], np.int64)
ASKED = ["--ckpt=demo", "--num=11", "--batch=8", "--seed=3", "--labels=chelsea,coffee"]


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    """A run of a tiny model with random weights: 8x8 pixels, 16 tokens, classes of photographs."""
    workdir = tmp_path_factory.mktemp("run")
    config = resolve({
        "name": "tiny", "method": "base", "data": {"name": "photos", "image_size": 8},
        "tokenizer": {
            "codebook_size": 64, "ch": 32, "encoder_ch_mult": (1, 1), "decoder_ch_mult": (1, 1),
            "num_res_blocks": 1, "z_channels": 32,
        },
        "policy": {
            "kind": "class", "dim": 32, "n_layer": 2, "n_head": 2, "multiple_of": 16, "num_classes": 12
        },
        "init": {"vq": str(workdir / "weights" / "tokenizer.safetensors")},
    })  # fmt: skip
    (workdir / "weights").mkdir()
    task = make_method(config, make_mesh())
    tokenizer = task.pixels.tokenizer
    shapes = {
        "policy": jax.eval_shape(task.policy.init, jax.random.key(0)),
        "tokenizer": jax.eval_shape(tokenizer.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))[
            "params"
        ],
    }
    for kind, tree in shapes.items():
        save_safetensors(workdir / "weights" / f"{kind}.safetensors", random_weights(tree))
    (workdir / "summary.json").write_text(json.dumps({"config": dataclasses.asdict(config)}))
    return workdir


def random_weights(shapes):
    """Of order one everywhere, so that tokens and pixels vary."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: np.float32(rng.normal(size=leaf.shape) * max(leaf.shape[-1], 4) ** -0.5),
        shapes,
    )


@pytest.fixture(scope="module")
def asked(ckpt):
    return [f"--ckpt={ckpt}", *ASKED[1:]]


@pytest.fixture(scope="module")
def many(ckpt):
    """The generator on all eight devices, as the command has it here."""
    return load_generator(str(ckpt), make_mesh())


@pytest.fixture(scope="module")
def alone(ckpt):
    return load_generator(str(ckpt), make_mesh(devices=jax.devices()[:1]))


@pytest.fixture(scope="module")
def expected_tokens(alone):
    """Of eleven samples, in one batch on one device."""
    labels = jnp.asarray(LABELS, jnp.int32)
    return sampling.generate(alone.policy, alone.params, labels, jax.random.key(3))


@pytest.fixture(scope="module")
def expected(alone, expected_tokens):
    """Their images, float32."""
    return np.asarray(decode(alone.pixels, alone.frozen, expected_tokens))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, asked):
    """A finished run of the command, on all eight devices."""
    out = tmp_path_factory.mktemp("samples") / "out"
    assert sample.main([*asked, "--format=both", "--grid", "--out", str(out)]) == 0
    return out


@pytest.fixture
def no_model(monkeypatch):
    """Tokens that cost nothing, where only what becomes of the images matters."""

    def generate(policy, params, condition, rng, **options):
        return jax.device_put(np.zeros((len(condition), 16), np.int32), condition.sharding)

    monkeypatch.setattr(sampling, "generate", generate)


def assert_same_pictures(got, want):
    """Equal but for the odd value that rounds to its neighbour where another batch adds differently."""
    assert got.dtype == want.dtype == np.uint8
    difference = np.abs(got.astype(int) - want.astype(int))
    assert difference.max() <= 1
    assert np.mean(difference > 0) < 1e-3


def pngs(folder):
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))])


# --- images ---------------------------------------------------------------------------------------


def test_the_files_hold_the_samples_of_their_numbers(finished, expected):
    with np.load(finished / "samples.npz") as archive:
        np.testing.assert_array_equal(archive["arr_1"], LABELS)
        images = archive["arr_0"]
    assert_same_pictures(images, to_uint8(expected))
    np.testing.assert_array_equal(pngs(finished / "images"), images)


def test_a_sample_is_the_same_in_any_batch_at_any_place_and_on_any_devices(
    many, alone, ckpt, expected_tokens
):
    """Batches of 3 on one device, of 3 and 8 on eight, padded; parameters split as well."""
    split = load_generator(str(ckpt), make_mesh(2, 4))
    options = sample.draw_options(sample.parse([*ASKED, "--out=x"]))
    for generator, batch, rows in ((alone, 3, 3), (many, 3, 8), (many, 8, 8), (split, 8, 8)):
        conditions = make_requests(generator, 11, 3, "chelsea,coffee", None)
        sampler = Sampler(generator.policy, generator.pixels, generator.frozen, batch, options)
        weights = sampler.weights(generator.params)
        for samples in in_batches(11, batch):
            tokens = sampler.tokens(weights, conditions.of, samples, sampler.key(3))
            assert len(tokens) == rows
            np.testing.assert_array_equal(
                np.asarray(tokens)[: len(samples)], np.asarray(expected_tokens)[list(samples)]
            )


def test_resized_samples_are_those_of_the_published_protocol(tmp_path, asked, expected):
    assert sample.main([*asked, "--resize=21", "--format=npz", "--out", str(tmp_path)]) == 0
    images = np.load(tmp_path / "samples.npz")["arr_0"]
    assert_same_pictures(images, to_uint8(bicubic_torch(jnp.asarray(expected), 21, 21)))
    recipe = json.loads((tmp_path / "recipe.json").read_text())
    assert (recipe["image_size"], recipe["decoded_size"]) == (21, 8)
    assert recipe["resize"] == "bicubic, a = -0.75, half-pixel centres, no antialias"


def test_settings_reach_the_sampler(tmp_path, asked, monkeypatch):
    seen = []

    def noted(policy, params, condition, rng, *, sample_ids, **options):
        seen.append((policy.config.dtype, np.asarray(sample_ids).tolist(), options))
        return jnp.zeros((len(condition), 16), jnp.int32)

    monkeypatch.setattr(sampling, "generate", noted)
    given = ["--temperature=0.8", "--top_k=50", "--top_p=0.9", "--cfg=2.5", "--cfg_schedule=cosine"]
    given = [*asked, *given, "--cfg_power=1.5", "--dtype=bfloat16"]
    assert sample.main([*given, f"--out={tmp_path / 'a'}"]) == 0
    options = {
        "temperature": 0.8, "top_k": 50, "top_p": 0.9, "greedy": False, "cfg_scale": 2.5,
        "cfg_schedule": "cosine", "cfg_interval": -1, "cfg_power": 1.5,
    }  # fmt: skip
    batches = [list(range(8)), list(range(8, 16))]
    assert seen == [("bfloat16", ids, options) for ids in batches]
    recipe = json.loads((tmp_path / "a" / "recipe.json").read_text())
    assert recipe["sampling"] == options
    assert recipe["checkpoint"]["policy"]["dtype"] == "bfloat16"

    seen.clear()
    given = [*asked, "--greedy", "--cfg=3", "--cfg_schedule=interval", "--cfg_interval=5"]
    assert sample.main([*given, "--num=8", f"--out={tmp_path / 'b'}"]) == 0
    options = {
        "temperature": 1.0, "top_k": 0, "top_p": 1.0, "greedy": True, "cfg_scale": 3.0,
        "cfg_schedule": "interval", "cfg_interval": 5, "cfg_power": 1.0,
    }  # fmt: skip
    assert seen == [("float32", batches[0], options)]


@pytest.mark.parametrize(("room", "each"), [(1000, 64), (3, 3)])
def test_as_many_are_drawn_at_once_as_the_devices_have_room_for(
    tmp_path, ckpt, monkeypatch, room, each
):
    monkeypatch.setattr(sample, "most_at_once", lambda *_: room)
    out = tmp_path / "out"
    sample.run(sample.parse([f"--ckpt={ckpt}", f"--out={out}", "--num=2"]))
    assert json.loads((out / "recipe.json").read_text())["batch"] == each * jax.device_count()


def test_the_recipe_says_what_a_receipt_needs(finished, many):
    recipe = json.loads((finished / "recipe.json").read_text())
    assert recipe["checkpoint"] == json.loads(json.dumps(many.facts))
    assert (recipe["seed"], recipe["count"], recipe["batch"], recipe["format"]) == (
        3,
        11,
        8,
        "both",
    )
    assert recipe["labels"]["rule"] == "chelsea,coffee"
    assert recipe["uint8"] == "truncate(clamp(127.5 x + 128, 0, 255))"
    assert recipe["resize"] is None
    assert recipe["devices"] == {"kind": "cpu", "count": 8}
    assert {"vapi_jax", "jax", "flax", "numpy", "pillow", "python"} <= recipe["versions"].keys()
    assert recipe["started"].endswith("+00:00")
    assert "resumed" not in recipe


def test_the_grid_has_a_named_row_for_each_class(finished):
    picture = np.asarray(Image.open(finished / "grid.png"))
    names, images = picture[:, :110], pngs(finished / "images")
    assert picture.shape == (2 * (96 + 2), 110 + 6 * 98, 3)
    for row, first in enumerate((0, 1)):
        assert (names[98 * row : 98 * (row + 1)] < 128).any(), "no name"
        np.testing.assert_array_equal(
            picture[98 * row + 1 : 98 * row + 97 : 12, 111:207:12], images[first]
        )
    assert (picture[99:195, 110 + 5 * 98 :] == 255).all(), "a class with fewer samples"


def test_the_grid_tells_long_and_equal_names_apart(tmp_path, many):
    names = ("crane", "crane", "a very long name indeed", "a very long name again")
    conditions = dataclasses.replace(make_requests(many, 4, 0, "0,1,2,3", None), names=names)
    files = SampleFiles(tmp_path, 4, 4, 8)
    files.write(0, np.zeros((4, 8, 8, 3), np.uint8))
    assert sample.grid(files, conditions).shape[0] == 4 * (96 + 2)


# --- going on -------------------------------------------------------------------------------------


def test_a_repeated_command_draws_what_is_missing_and_nothing_else(
    tmp_path, asked, finished, capsys
):
    out = tmp_path / "out"
    command = [*asked, "--out", str(out)]
    assert sample.main(command) == 0
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    (out / "images" / "000009.png").unlink()
    (out / "images" / "000003.png.partial").write_bytes(b"half")
    assert sample.main(command) == 0
    after = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    changed = {path.name for path, written in after.items() if before[path] != written}
    assert changed == {"000008.png", "000009.png", "000010.png"}  # the chunk of the missing one
    assert not list(out.rglob("*.partial"))
    np.testing.assert_array_equal(pngs(out / "images"), pngs(finished / "images"))
    assert "3 of them drawn" in capsys.readouterr().out
    recipe = json.loads((out / "recipe.json").read_text())
    assert len(recipe.get("resumed", [])) <= 1


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("rule", ["balanced", "random", "chelsea,coffee"])
def test_more_samples_and_smaller_batches_go_on_from_what_is_there(tmp_path, asked, rule, capsys):
    command = [*asked, f"--labels={rule}", "--format=both", f"--out={tmp_path}"]
    assert sample.main([*command, "--num=7"]) == 0
    first = (tmp_path / "labels.txt").read_text()
    assert sample.main([*command, "--num=19", "--batch=5"]) == 0
    assert "14 of them drawn" in capsys.readouterr().out
    assert (tmp_path / "labels.txt").read_text().startswith(first)
    with np.load(tmp_path / "samples.npz") as archive:
        assert archive["arr_0"].shape == (19, 8, 8, 3)
    assert json.loads((tmp_path / "recipe.json").read_text())["count"] == 19


@pytest.mark.usefixtures("no_model")
def test_when_a_run_went_on_is_noted(tmp_path, asked, monkeypatch):
    now = {"versions": {"jax": "1"}, "devices": {"kind": "cpu", "count": 8}, "date": "monday"}
    monkeypatch.setattr("vapi_jax.sample.environment", lambda: now)
    command = [*asked, "--out", str(tmp_path)]
    assert sample.main(command) == 0
    (tmp_path / "images" / "000001.png").unlink()
    now = {**now, "date": "tuesday", "devices": {"kind": "tpu", "count": 4}}
    assert sample.main(command) == 0
    now = {**now, "date": "wednesday"}  # nothing left to do
    assert sample.main(command) == 0
    recipe = json.loads((tmp_path / "recipe.json").read_text())
    assert (recipe["started"], recipe["devices"]["kind"]) == ("monday", "cpu")
    assert [(again["started"], again["devices"]["kind"]) for again in recipe["resumed"]] == [
        ("tuesday", "tpu")
    ]


def test_other_settings_in_the_same_place_are_refused_with_the_difference(finished, ckpt, capsys):
    before = (finished / "recipe.json").read_bytes()
    command = [f"--ckpt={ckpt}", "--num=11", "--batch=8", "--seed=4", "--labels=balanced"]
    assert sample.main([*command, "--format=both", "--out", str(finished)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("error: ")
    assert '  labels.rule: "chelsea,coffee" there, "balanced" asked for' in lines
    assert lines[-1] == "  seed: 3 there, 4 asked for"
    assert (finished / "recipe.json").read_bytes() == before


def shell(out, *more):
    """The command as a user runs it."""
    return subprocess.Popen(
        [sys.executable, "-m", "vapi_jax.sample", "--ckpt=demo", "--num=90", "--batch=10",
         "--labels=random", "--format=both", f"--out={out}", *more],
        cwd=ROOT,
        env=commands.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


def contents(directory):
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in files
        if path.name not in ("recipe.json", LOCK)  # of which the time is part
    }


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_byte_for_byte_like_one_that_was_not(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    process = shell(whole)
    assert process.wait(240) == 0, process.stderr.read()
    for files in (1, 37, 80):  # with the first file, in the middle, and close to the end
        process = shell(broken)
        while process.poll() is None and sum(p.is_file() for p in broken.rglob("*.*")) < files:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait(60)
    process = shell(broken)
    assert process.wait(240) == 0, process.stderr.read()
    assert contents(broken) == contents(whole)
    # The last kill may find it finished; the others cannot.
    assert len(json.loads((broken / "recipe.json").read_text())["resumed"]) >= 2


# --- captions ---------------------------------------------------------------------------------------


TEXT = make_policy(
    "text", dim=32, n_head=4, n_layer=2, vocab_size=64, block_size=16, multiple_of=16,
    cls_token_num=4, caption_dim=6,
)  # fmt: skip


@pytest.fixture(scope="module")
def captioned(many):
    """A text-conditional generator with random weights over the same tokenizer."""
    params = random_weights(jax.eval_shape(TEXT.init, jax.random.key(0)))
    params = jax.device_put(params, replicated(many.mesh))
    facts = {**many.facts, "policy": {"kind": "text"}}
    return dataclasses.replace(many, policy=TEXT, params=params, class_names=None, facts=facts)


def test_captions_are_sampled_in_turn(tmp_path, monkeypatch, captioned):
    rng = np.random.default_rng(1)
    features = rng.normal(size=(3, 4, 6)).astype(np.float32)
    mask = np.arange(4) >= np.array([[0], [3], [1]])
    np.savez(tmp_path / "c.npz", features=features, mask=mask)
    monkeypatch.setattr("vapi_jax.sample.load_generator", lambda *args, **kwargs: captioned)
    out, flags = tmp_path / "out", ["--batch=8", "--seed=3", "--format=npz", "--cfg=2", "--grid"]
    command = ["--ckpt=text", "--num=8", *flags, f"--out={out}"]
    assert sample.main([*command, f"--conditions={tmp_path / 'c.npz'}"]) == 0
    rows = [0, 1, 2, 0, 1, 2, 0, 1]
    condition = text_condition(features[rows], mask[rows])
    condition = shard_whole(jax.tree.map(np.asarray, condition), captioned.mesh)
    tokens = sampling.generate(TEXT, captioned.params, condition, jax.random.key(3), cfg_scale=2.0)
    want = to_uint8(decode(captioned.pixels, captioned.frozen, tokens))
    archive = np.load(out / "samples.npz")
    assert archive.files == ["arr_0"]
    assert_same_pictures(archive["arr_0"], want)
    recipe = json.loads((out / "recipe.json").read_text())
    assert (recipe["captions"]["rule"], recipe["captions"]["captions"]) == ("c.npz", 3)
    assert "labels" not in recipe
    assert (out / "grid.png").exists()


# --- the command line -----------------------------------------------------------------------------


def test_help_has_examples():
    text, imported = commands.show_help("-m", "vapi_jax.sample")
    assert "--ckpt demo --num 96 --grid" in text
    assert "torch" not in imported


def test_the_flags_name_the_samplers_schedules():
    assert sample.SCHEDULES == sampling.SCHEDULES


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "the following arguments are required: --ckpt, --out"),
        (["--ckpt=demo"], "required: --out"),
        ([*ASKED, "--out=x", "--num=0"], "argument --num: 0: wants 1 to"),
        ([*ASKED, "--out=x", "--num=many"], "invalid whole number value: 'many'"),
        ([*ASKED, "--out=x", "--seed=-1"], "argument --seed: -1: wants 0 to 4294967295"),
        ([*ASKED, "--out=x", "--temperature=0"], "argument --temperature: 0: wants more than 0"),
        ([*ASKED, "--out=x", "--top_p=1.5"], "argument --top_p: 1.5: wants more than 0"),
        ([*ASKED, "--out=x", "--cfg=nan"], "argument --cfg: nan"),
        ([*ASKED, "--out=x", "--cfg_schedule=linear"], "invalid choice: 'linear'"),
        ([*ASKED, "--out=x", "--cfg_power=2"], "--cfg_power belongs to --cfg_schedule cosine"),
        ([*ASKED, "--out=x", "--cfg_schedule=interval"], "interval wants --cfg_interval"),
        ([*ASKED, "--out=x", "--greedy", "--top_k=3"], "--greedy draws nothing: leave --top_k out"),
        ([*ASKED, "--out=x", "--labels="], "--labels: wants a path"),
        ([*ASKED, f"--out={__file__}"], "is a file where a folder is wanted"),
        ([*ASKED, "--out=x", "--temp=1"], "unrecognized arguments: --temp=1"),
    ],
)
def test_flags_that_make_no_sense_end_with_a_sentence(flags, message, capsys):
    with pytest.raises(SystemExit) as caught:
        sample.main(flags)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ckpt=nowhere"], "error: checkpoint 'nowhere' does not exist. Give 'demo'"),
        (["--labels=dog"], "error: --labels: there is no class and no file 'dog'"),
        (["--conditions=c.npz"], "error: --conditions: this checkpoint takes class labels"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(tmp_path, flags, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert sample.main([*ASKED, f"--out={tmp_path / 'out'}", *flags]) == 1
    assert capsys.readouterr().err.startswith(message)
    assert not (tmp_path / "out").exists()


def test_guidance_of_a_model_without_an_unconditional_embedding_is_refused(
    tmp_path, monkeypatch, many, capsys
):
    config = dataclasses.replace(many.policy.config, class_dropout_prob=0.0)
    bare = dataclasses.replace(many, policy=dataclasses.replace(many.policy, config=config))
    monkeypatch.setattr("vapi_jax.sample.load_generator", lambda *args, **kwargs: bare)
    assert sample.main([*ASKED, "--cfg=2", f"--out={tmp_path / 'out'}"]) == 1
    assert "error: --cfg 2: class_dropout_prob is 0" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_model")
def test_broken_weights_are_not_written_as_pictures(tmp_path, monkeypatch, many, capsys):
    frozen = jax.tree.map(jnp.array, many.frozen)
    last = frozen["tokenizer"]["decoder"]["conv_out"]
    last["bias"] = jnp.full_like(last["bias"], jnp.nan)
    broken = dataclasses.replace(many, frozen=frozen)
    monkeypatch.setattr("vapi_jax.sample.load_generator", lambda *args, **kwargs: broken)
    assert sample.main([*ASKED, f"--out={tmp_path}"]) == 1
    assert "error: samples 0 to 7 hold NaN or infinite values" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.usefixtures("no_model")
def test_an_error_of_the_writer_is_the_commands(tmp_path, monkeypatch, many, capsys):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device", "000001.png")

    monkeypatch.setattr("vapi_jax.sample.load_generator", lambda *args, **kwargs: many)
    monkeypatch.setattr(SampleFiles, "write", full)
    assert sample.main([*ASKED, f"--out={tmp_path}"]) == 1
    assert re.search("error: .*No space left on device", told := capsys.readouterr().err)
    assert "000001.png" in told
