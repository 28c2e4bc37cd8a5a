"""Released files in, post-trained weights out: streamed, atomic, and the same bits at the other end."""

import argparse
import dataclasses
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
import torch
from safetensors.numpy import load_file, save_file

from tests.helpers import commands, modes
from tests.helpers.compare import assert_close
from tests.helpers.golden import KINDS, nhwc, read_condition
from tests.helpers.messages import assert_mentions
from tests.helpers.tiny import make_tiny_config
from vapi_jax.common.digests import sha256_file
from vapi_jax.common.trees import flatten
from vapi_jax.convert import parse
from vapi_jax.export import main as export_command
from vapi_jax.methods import make_method
from vapi_jax.models import conversion
from vapi_jax.models.architecture import from_json
from vapi_jax.models.classes import read_class_list, write_class_list
from vapi_jax.models.conversion import convert, model_shapes, name_rules
from vapi_jax.models.llama import LlamaConfig
from vapi_jax.models.loading import MANIFEST, WeightsSource, load_weights
from vapi_jax.models.policies import make_policy
from vapi_jax.models.vq import VQModel
from vapi_jax.parallel.sharding import make_mesh
from vapi_jax.training.checkpoint import Checkpointer
from vapi_jax.training.export import export, open_trained
from vapi_jax.weights.names import WeightsError, to_reference
from vapi_jax.weights.store import save_safetensors

CONVERT, EXPORT = "launch/convert_llamagen.py", "launch/export_llamagen.py"


@pytest.fixture
def released(golden, tmp_path):
    """Golden weights as PyTorch would have saved them: name, nesting -> file."""

    def save(name, nest="model", **more):
        state = {k: torch.from_numpy(v) for k, v in golden.tensors(name).items()}
        path = tmp_path / f"{name}.pt"
        torch.save({nest: state, **more} if nest else state, path)
        return path

    return save


def assert_same_tensors(path, wanted):
    """A file of LlamaGen's names holds exactly these tensors."""
    if path.suffix == ".pt":
        state = torch.load(path, weights_only=True)["model"]
        found = {name: tensor.numpy() for name, tensor in state.items()}
    else:
        found = load_file(path)
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype
        assert found[name].tobytes() == array.tobytes(), name


def load_converted(directory, part):
    """The weights of one part of a converted directory, and its configuration."""
    stored = json.loads((directory / "config.json").read_text())[part]
    kind = LlamaConfig if part == "gpt" else conversion.VQConfig
    config = from_json(stored, kind)
    source = WeightsSource(str(directory), part, *name_rules(part), config)
    return load_weights(source, model_shapes(config)), config


# --- in -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_converted_generators_reproduce_their_logits(golden, released, tmp_path, name):
    file = released(name, args=argparse.Namespace(gpt_model="tiny"), steps=7)
    out = tmp_path / "converted"
    manifest = convert(out, gpt=file, gpt_args=golden.args(name))
    params, config = load_converted(out, "gpt")
    arrays = golden.npz(name)
    policy = make_policy(KINDS[name], **dataclasses.asdict(config))
    context = jnp.asarray(arrays["noisy_context"])
    logits = jax.jit(policy.logits)(params, read_condition(name, arrays), context)
    assert_close(logits, arrays["logits_noisy"], 1e-5)
    assert manifest["ignored"] == {"gpt": ["args", "steps"]}
    assert manifest["sources"][0]["sha256"] == sha256_file(file)
    assert manifest["parameters"]["gpt"] == sum(x.size for x in jax.tree.leaves(params))


def test_a_converted_tokenizer_finds_the_same_tokens(golden, released, tmp_path):
    out = tmp_path / "converted"
    convert(out, vq=released("vq"), vq_args=golden.args("vq"))
    params, config = load_converted(out, "vq")
    arrays = golden.npz("vq")
    images = nhwc(arrays["image"])
    tokens = jax.jit(lambda p, x: VQModel(config).apply({"params": p}, x, method="encode"))
    np.testing.assert_array_equal(tokens(params, images), arrays["indices"])


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_the_commands_bring_every_bit_there_and_back(golden, released, tmp_path, suffix):
    for name in ("gpt_c2i", "vq"):
        (tmp_path / f"{name}.json").write_text(json.dumps(golden.args(name)))
    out = tmp_path / "converted"
    done = commands.python(
        CONVERT, "--gpt", released("gpt_c2i", nest=""), "--args",
        tmp_path / "gpt_c2i.json", "--vq", released("vq", "state_dict"), "--vq-args",
        tmp_path / "vq.json", "--out", out,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"--config.init.gpt={out} --config.init.vq={out}" in done.stdout
    assert sorted(p.name for p in out.iterdir()) == [
        "config.json", "manifest.json", "model.safetensors",
    ]  # fmt: skip
    modes.assert_for_all(out)
    for part, name in (("gpt", "gpt_c2i"), ("vq", "vq")):
        again = tmp_path / f"again_{part}{suffix}"
        done = commands.python(EXPORT, "--ckpt", out, "--part", part, "--out", again)
        assert done.returncode == 0, done.stderr
        # Buffers come back too: the reference refuses a tokenizer file without codebook_used.
        assert_same_tensors(again, golden.tensors(name))


def test_bad_input_is_a_sentence_and_leaves_nothing(golden, released, tmp_path):
    file, out = released("gpt_c2i"), tmp_path / "converted"
    done = commands.python(CONVERT, "--gpt", file, "--out", out)
    assert done.returncode == 1
    assert done.stderr.startswith("error: 2 layers of width 64 are none of the released sizes")
    assert "Traceback" not in done.stderr
    with pytest.raises(WeightsError, match="nothing to convert"):
        convert(out)
    args = {**golden.args("gpt_c2i"), "vocab_size": 64}
    other = {**golden.args("vq"), "codebook_size": 64}
    tokenizer = golden.tensors("vq")
    tokenizer["quantize.embedding.weight"] = np.zeros((32, 8), np.float32)
    path = tmp_path / "vq32.pt"
    torch.save({k: torch.from_numpy(v) for k, v in tokenizer.items()}, path)
    with pytest.raises(WeightsError, match="predicts 64 codes and the tokenizer has 32"):
        convert(out, gpt=file, vq=path, gpt_args=args, vq_args={**other, "codebook_size": 32})
    assert not out.exists()
    assert not out.with_name("converted.partial").exists()


def test_every_tensor_is_accounted_for_by_name(golden, tmp_path):
    state = {k: torch.from_numpy(v) for k, v in golden.tensors("gpt_c2i").items()}
    del state["layers.1.ffn_norm.weight"]
    state["lora.weight"] = torch.zeros(1)
    state["norm.weight"] = torch.zeros(63)
    state["output.weight"] = state["output.weight"].to(torch.int32)
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(WeightsError) as error:
        convert(tmp_path / "out", gpt=tmp_path / "x.pt", gpt_args=golden.args("gpt_c2i"))
    for line in (
        "taken for a GPT, c2i (10 classes): 2 layers, 4 heads, width 64, 64 codes, grid 4x4",
        "missing: layers.1.ffn_norm.weight",
        "wrong shape: norm.weight (63,), norm/scale wants (64,)",
        "wrong dtype: output.weight int32",
        "unexpected: lora.weight",
    ):
        assert line in str(error.value)


def test_weights_that_are_not_finite_are_refused_by_name(golden, tmp_path):
    state = {k: torch.from_numpy(v) for k, v in golden.tensors("gpt_c2i").items()}
    name, path, out = "layers.1.feed_forward.w2.weight", tmp_path / "x.pt", tmp_path / "out"
    args = golden.args("gpt_c2i")
    for value, dtype, told in (
        (np.nan, None, "1 of"),
        (np.inf, None, "1 of"),
        (1e6, "float16", "1e+06"),
    ):
        state[name][3, 2] = value
        torch.save(state, path)
        with pytest.raises(WeightsError) as error:
            convert(out, gpt=path, gpt_args=args, dtype=dtype)
        assert_mentions(str(error.value), name, path, told)
        assert list(tmp_path.iterdir()) == [path]
    convert(out, gpt=path, gpt_args=args, dtype="bfloat16")


def test_the_average_of_a_shard_folder_and_the_names_of_classes_can_be_asked_for(golden, tmp_path):
    args, classes = golden.args("gpt_c2i"), [f"class {i}" for i in range(10)]
    release = tmp_path / "release"
    release.mkdir()
    names = {f"ema.{k}": v for k, v in golden.tensors("gpt_c2i").items()}
    save_file(names, release / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (release / "model.safetensors.index.json").write_text(json.dumps(index))
    write_class_list(tmp_path / "mine.txt", classes)
    (tmp_path / "args.json").write_text(json.dumps(args))
    out = tmp_path / "out"
    done = commands.python(
        CONVERT, "--gpt", release, "--entry", "ema", "--args", tmp_path / "args.json", "--classes",
        tmp_path / "mine.txt", "--out", out,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert read_class_list(out / "classes.txt").names == tuple(classes)
    manifest = json.loads((out / "manifest.json").read_text())
    assert "classes.txt" in manifest["outputs"]
    (out / "classes.txt").write_text("others\n")
    with pytest.raises(WeightsError, match=r"classes\.txt"):
        load_converted(out, "gpt")
    given = {"gpt": release, "gpt_args": args, "entry": "ema"}
    with pytest.raises(WeightsError, match=r"imagenet.* 1000 .* 10"):
        convert(tmp_path / "other", **given, classes="imagenet")
    with pytest.raises(WeightsError, match="imagenet"):
        convert(tmp_path / "other", vq=golden.directory / "vq.safetensors", classes="imagenet")


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        # The averaged tokenizer is asked for, and would not be what is converted.
        (("--vq=x.pt", "--entry=ema"), "--entry is of --gpt.*--vq-entry"),
        (("--vq=x.pt", "--args=x.json"), "--args is of --gpt.*--vq-args"),
        (("--vq=x.pt", "--image-size=384"), "--image-size is of --gpt"),
        (("--gpt=x.pt", "--vq-args=x.json"), "--vq-args is of --vq"),
    ],
)
def test_flags_of_a_model_that_is_not_converted_are_refused(flags, told, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["convert", "--out=out", *flags])
    with pytest.raises(SystemExit):
        parse()
    assert re.search(told, capsys.readouterr().err)


def test_half_precision_can_be_asked_for_and_is_kept_by_default(golden, released, tmp_path):
    file, args = released("gpt_c2i"), golden.args("gpt_c2i")
    convert(tmp_path / "half", gpt=file, gpt_args=args, dtype="bfloat16")
    stored = load_file(tmp_path / "half" / "model.safetensors")
    assert {array.dtype.name for array in stored.values()} == {"bfloat16"}
    narrow = tmp_path / "narrow.pt"
    torch.save({k: v.half() for k, v in torch.load(file)["model"].items()}, narrow)
    convert(tmp_path / "kept", gpt=narrow, gpt_args=args)
    assert {a.dtype.name for a in load_file(tmp_path / "kept" / "model.safetensors").values()} == {
        "float16"
    }
    params, _ = load_converted(tmp_path / "kept", "gpt")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}


def test_shards_load_as_one_file_does(golden, released, tmp_path):
    file, args = released("gpt_c2i"), golden.args("gpt_c2i")
    convert(tmp_path / "one", gpt=file, gpt_args=args)
    convert(tmp_path / "many", gpt=file, gpt_args=args, shard_bytes=100_000)
    assert len(list((tmp_path / "many").glob("model-*-of-*.safetensors"))) > 3
    one, many = (flatten(load_converted(tmp_path / name, "gpt")[0]) for name in ("one", "many"))
    assert one.keys() == many.keys()
    for name, array in one.items():
        np.testing.assert_array_equal(array, many[name])


def test_an_existing_directory_is_replaced_only_when_asked_and_only_when_it_is_ours(
    golden, released, tmp_path
):
    file, args, out = released("gpt_c2i"), golden.args("gpt_c2i"), tmp_path / "out"
    convert(out, gpt=file, gpt_args=args)
    with pytest.raises(WeightsError, match="--overwrite"):
        convert(out, gpt=file, gpt_args=args)
    convert(out, gpt=file, gpt_args=args, dtype="float16", overwrite=True)
    assert json.loads((out / MANIFEST).read_text())["dtype"] == "float16"
    precious = tmp_path / "photos"
    precious.mkdir()
    with pytest.raises(WeightsError, match="was not made by a conversion"):
        convert(precious, gpt=file, gpt_args=args, overwrite=True)


def test_a_killed_conversion_leaves_nothing_that_loads_and_can_be_repeated(
    golden, released, tmp_path
):
    """Killed for real, in the middle of writing tensors."""
    file, args, out = released("gpt_c2i"), golden.args("gpt_c2i"), tmp_path / "out"
    slow = (
        "import json, sys, time\n"
        "from pathlib import Path\n"
        "from vapi_jax.models import conversion\n"
        "read = conversion.read_origin\n"
        "def slowly(*args):\n"
        "    print('reading', flush=True)\n"
        "    time.sleep(0.5)\n"
        "    return read(*args)\n"
        "conversion.read_origin = slowly\n"
        "file, args, out = sys.argv[1:]\n"
        "conversion.convert(Path(out), gpt=Path(file), gpt_args=json.loads(args))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", slow, file, json.dumps(args), out],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=commands.environment(),
    )
    assert process.stdout is not None
    for _ in range(3):
        assert process.stdout.readline() == "reading\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = out.with_name("out.partial")
    assert left.is_dir()
    assert not out.exists()
    source = WeightsSource(str(left), "gpt", *name_rules("gpt"))
    with pytest.raises(WeightsError, match=r"manifest\.json.*interrupted"):
        load_weights(source, {})
    started = time.monotonic()
    convert(out, gpt=file, gpt_args=args)
    assert time.monotonic() - started < 60
    assert not left.exists()
    assert load_converted(out, "gpt")


# --- out ------------------------------------------------------------------------------------------


@pytest.fixture
def trained(tmp_path):
    """The workdir of a tiny run: its configuration, final weights and two checkpoints."""
    config = make_tiny_config("base")
    shapes = jax.eval_shape(make_method(config, make_mesh()).init, jax.random.key(0))
    rng = np.random.default_rng(0)
    draws = [
        jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
        for _ in range(3)
    ]
    workdir = tmp_path / "run"
    (workdir / "weights").mkdir(parents=True)
    (workdir / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    with Checkpointer(workdir / "checkpoints") as saver:
        for step, params in zip((5, 10), draws[:2], strict=True):
            saver.save(step, {"params": params, "rest": {"step": np.int32(step)}})
    save_safetensors(workdir / "weights" / "policy.safetensors", draws[2])
    return workdir, dict(zip((5, 10, None), draws, strict=True))


@pytest.mark.parametrize("step, meant", [(None, None), (5, 5), (10, 10), (-1, 10)])
def test_runs_and_their_checkpoints_are_exported(trained, tmp_path, step, meant):
    workdir, draws = trained
    out = tmp_path / "out.pt"
    with open_trained(workdir, step=step) as (weights, rules):
        assert export(out, weights, rules) == sha256_file(out)
    assert_same_tensors(out, to_reference(draws[meant], name_rules("gpt")[0]))


def test_a_checkpoint_of_a_generator_and_its_text_encoder_is_exported(trained, tmp_path):
    workdir, draws = trained
    with Checkpointer(workdir / "checkpoints") as saver:
        params = {"policy": draws[5], "encoder": {"scale": np.ones(3, np.float32)}}
        saver.save(15, {"params": params, "rest": {"step": np.int32(15)}})
    with open_trained(workdir, step=15) as (weights, rules):
        export(tmp_path / "out.pt", weights, rules)
    assert_same_tensors(tmp_path / "out.pt", to_reference(draws[5], name_rules("gpt")[0]))


def test_an_export_that_is_impossible_is_a_sentence(trained, tmp_path):
    workdir, _ = trained
    done = commands.python(EXPORT, "--ckpt", workdir, "--out", tmp_path / "x.bin")
    assert done.returncode == 1
    assert ".safetensors or .pt" in done.stderr
    for arguments, message in (
        ({"step": 7}, "step 7.*5, 10"),
        ({"part": "vq"}, "gpt"),
    ):
        with pytest.raises(WeightsError, match=message), open_trained(workdir, **arguments):
            pass
    nothing = pytest.raises(WeightsError, match="workdir")
    with nothing, open_trained(tmp_path):
        pass


def test_an_export_replaces_nothing_that_it_is_made_of_and_other_files_when_told(
    trained, tmp_path, monkeypatch, capsys
):
    def run(out, *more):
        monkeypatch.setattr("sys.argv", ["export", f"--ckpt={workdir}", f"--out={out}", *more])
        return export_command(), capsys.readouterr().err

    workdir, _ = trained
    own = workdir / "weights" / "policy.safetensors"
    stored = tmp_path / "stored.safetensors"
    own.rename(stored)
    own.symlink_to(stored)
    before = stored.read_bytes()
    for out, told in (
        (own, "is read, and would be replaced"),
        (workdir / "new.pt", "which is exported"),
        (stored, "is read, and would be replaced"),
    ):
        status, message = run(out, "--overwrite")
        assert (status, told in message) == (1, True), message
    assert stored.read_bytes() == before and not (workdir / "new.pt").exists()
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"mine")
    status, message = run(out)
    assert (status, out.read_bytes()) == (1, b"mine") and "say --overwrite" in message
    assert run(out, "--overwrite")[0] == 0
    assert out.stat().st_size > 1000


def test_a_damaged_checkpoint_is_not_exported(trained, tmp_path):
    workdir, _ = trained
    files = [p for p in (workdir / "checkpoints" / "10").rglob("*") if p.stat().st_size > 5000]
    for path in files:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 0xFF
        path.write_bytes(bytes(data))
    assert files
    done = commands.python(EXPORT, "--ckpt", workdir, "--step", 10, "--out", tmp_path / "x.pt")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "x.pt").exists()


@pytest.mark.parametrize(
    "script", [CONVERT, EXPORT, "launch/convert_janus.py", "launch/export_janus.py"]
)
def test_help_comes_without_importing_jax(script):
    text, imported = commands.show_help(script)
    assert "python -m vapi_jax." in text
    assert "argparse" in imported and "jax" not in imported
