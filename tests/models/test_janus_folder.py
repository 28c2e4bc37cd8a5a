"""Published folders of Janus in, folders out: both layouts, every bit, and what is refused."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.helpers import commands
from tests.helpers.compare import assert_close
from tests.helpers.golden import nhwc
from tests.helpers.janus import assert_holds, deepseek_tensors, load, write_deepseek
from tests.helpers.messages import assert_mentions
from vapi_jax.common.digests import sha256_file
from vapi_jax.common.trees import flatten, unflatten
from vapi_jax.export import main as export_command
from vapi_jax.generation.loading import load_generator
from vapi_jax.models.janus_folder import convert_janus
from vapi_jax.models.policies import JanusPolicy, make_policy
from vapi_jax.models.vq import VQModel
from vapi_jax.parallel.sharding import make_mesh
from vapi_jax.training.export_janus import export_janus
from vapi_jax.weights.names import WeightsError
from vapi_jax.weights.store import save_safetensors

CONVERT, EXPORT = "launch/convert_janus.py", "launch/export_janus.py"


@pytest.fixture
def published(golden, tmp_path):
    """DeepSeek's folder of the golden models, and its tensors."""
    tensors = deepseek_tensors(golden)
    return write_deepseek(tmp_path / "published", golden, tensors), tensors


@pytest.fixture
def converted(published, tmp_path):
    convert_janus(published[0], tmp_path / "converted", understanding=True)
    return tmp_path / "converted"


def test_a_folder_gives_the_golden_logits_and_tokens(golden, published, tmp_path):
    out = tmp_path / "converted"
    manifest = convert_janus(published[0], out)
    config, params = load(out)
    arrays = golden.npz("janus")
    assert config.pad_id == arrays["pad_id"]
    assert config.num_tokens == arrays["gt_tokens"].shape[1]
    options = dataclasses.asdict(config)
    policy = make_policy("janus", **options, alignment="shifted_by_one", padding="counted")
    tokens = jnp.asarray(arrays["prompt_tokens"], jnp.int32)
    mask = jnp.asarray(arrays["attention_mask"][:, : tokens.shape[1]]).astype(bool)
    context = jnp.asarray(arrays["noisy_tokens"], jnp.int32)[:, : policy.context_length]
    logits = jax.jit(policy.logits)(params, {"tokens": tokens, "mask": mask}, context)
    assert_close(logits, arrays["logits_cfg1_shifted_by_one"], 1e-5)
    vq, params = load(out, "vq")
    arrays = golden.npz("vq")
    encode = jax.jit(lambda p, x: VQModel(vq).apply({"params": p}, x, method="encode"))
    np.testing.assert_array_equal(encode(params, nhwc(arrays["image"])), arrays["indices"])
    left = dict(text.split("*") for text in manifest["ignored"]["gpt"])
    assert left.keys() == {"vision_model.", "aligner.", "language_model.lm_head."}
    assert left["vision_model."] == " (2 tensors)"


def test_the_commands_bring_every_bit_there_and_back(golden, tmp_path):
    tensors = deepseek_tensors(golden)
    src = write_deepseek(tmp_path / "published", golden, tensors, "bins")
    out, again = tmp_path / "converted", tmp_path / "again"
    done = commands.python(CONVERT, "--src", src, "--out", out, "--understanding")
    assert done.returncode == 0, done.stderr
    assert f"--config.init.gpt={out} --config.init.vq={out}" in done.stdout
    done = commands.python(EXPORT, "--ckpt", out, "--out", again)
    assert done.returncode == 0, done.stderr
    assert_holds(again, tensors)
    assert sha256_file(again / "model.safetensors") in done.stdout
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "processor_config.json"):
        assert (again / name).read_bytes() == (src / name).read_bytes()


def test_one_file_of_pickles_is_the_same_model(golden, published, converted, tmp_path):
    write_deepseek(tmp_path / "bin", golden, published[1], "bin")
    convert_janus(tmp_path / "bin", tmp_path / "again", understanding=True)
    again, first = (path / "model.safetensors" for path in (tmp_path / "again", converted))
    assert again.read_bytes() == first.read_bytes()
    export_janus(tmp_path / "again", tmp_path / "out")
    assert_holds(tmp_path / "out", published[1])


def test_other_widths_inside_the_gen_modules_come_from_the_tensors(golden, tmp_path):
    tensors = deepseek_tensors(golden, aligner_dim=20, gen_head_dim=56)
    src = write_deepseek(tmp_path / "published", golden, tensors)
    convert_janus(src, tmp_path / "converted", understanding=True)
    config, params = load(tmp_path / "converted")
    assert (config.aligner_dim, config.gen_head_dim) == (20, 56)
    condition = {"tokens": jnp.ones((1, 3), jnp.int32), "mask": jnp.ones((1, 3), bool)}
    policy = make_policy("janus", **dataclasses.asdict(config))
    context = jnp.zeros((1, policy.context_length), jnp.int32)
    logits = jax.eval_shape(policy.logits, params, condition, context)
    assert logits.shape == (1, config.num_tokens, config.vocab_size)
    export_janus(tmp_path / "converted", tmp_path / "again", shard_bytes=100_000)
    assert len(list((tmp_path / "again").glob("model-*-of-*.safetensors"))) > 1
    assert_holds(tmp_path / "again", tensors)


@pytest.mark.parametrize(
    "said", [{"rope_theta": 5e3}, {"rope_parameters": {"rope_theta": 5e3, "rope_type": "default"}}]
)
def test_the_base_of_positions_is_where_either_transformers_keeps_it(golden, tmp_path, said):
    src = write_deepseek(tmp_path / "published", golden, deepseek_tensors(golden))
    language(**said)(src)
    convert_janus(src, tmp_path / "converted")
    assert load(tmp_path / "converted")[0].rope_base == 5e3


def test_a_converted_folder_is_a_generator_by_itself(converted):
    generator = load_generator(str(converted), make_mesh())
    config, params = load(converted)
    assert isinstance(generator.policy, JanusPolicy)
    assert dataclasses.replace(generator.policy.config, attention="auto") == config
    jax.tree.map(np.testing.assert_array_equal, generator.params, params)


def test_a_folder_in_bfloat16_says_so(published, converted, tmp_path):
    export_janus(converted, tmp_path / "narrow", dtype="bfloat16")
    assert_holds(tmp_path / "narrow", published[1], "bfloat16")
    config = json.loads((tmp_path / "narrow" / "config.json").read_text())
    assert config["torch_dtype"] == config["language_config"]["torch_dtype"] == "bfloat16"


@pytest.fixture
def trained(converted, tmp_path):
    """The workdir of a run that moved every weight by less than bfloat16 resolves, but one table."""
    config, params = load(converted)
    moved = {path: np.nextafter(leaf, np.inf) for path, leaf in flatten(params).items()}
    moved["gen_embed/embedding"] = moved["gen_embed/embedding"] + 1
    workdir = tmp_path / "run"
    (workdir / "weights").mkdir(parents=True)
    save_safetensors(workdir / "weights" / "policy.safetensors", unflatten(moved))
    policy = {"kind": "janus", **dataclasses.asdict(config)}
    said = {"method": "vapi", "policy": policy, "init": {"gpt": str(converted)}}
    (workdir / "config.json").write_text(json.dumps(said))
    return workdir, moved


def test_a_run_is_exported_with_what_it_left_alone(published, trained, tmp_path):
    workdir, moved = trained
    done = export_janus(workdir, tmp_path / "out")
    found, before = load_file(tmp_path / "out" / "model.safetensors"), published[1]
    assert found.keys() == before.keys()
    np.testing.assert_array_equal(found["gen_embed.weight"], moved["gen_embed/embedding"])
    for name, array in before.items():
        same = name.startswith(
            ("gen_vision_model.", "vision_model.", "aligner.", "language_model.lm_head")
        )
        assert np.array_equal(found[name], array) == same, name
    total = sum(leaf.size for leaf in moved.values())
    assert (done.unchanged.weights, done.unchanged.float32) == (total, 0)
    free = moved["gen_embed/embedding"].size
    # A step to the next float32 seldom reaches the next bfloat16.
    assert (total - free) * 0.99 <= done.unchanged.bfloat16 <= total - free
    assert done.complete


def test_an_export_that_is_impossible_is_a_sentence(
    published, trained, converted, tmp_path, monkeypatch, capsys
):
    def export(*more):
        flags = ["export", "janus", "--ckpt", workdir, "--out", tmp_path / "out", *more]
        monkeypatch.setattr("sys.argv", [*map(str, flags)])
        return export_command(), capsys.readouterr()

    workdir, _ = trained
    shutil.move(converted, tmp_path / "moved")
    status, told = export()
    assert status == 1
    assert_mentions(told.err, converted, "--source")
    status, told = export("--source", tmp_path / "moved", "--dtype", "bfloat16")
    assert status == 0, told.err
    assert_mentions(told.out, "0.00 %", "bfloat16")
    with pytest.raises(WeightsError, match="exists"):
        export_janus(tmp_path / "moved", published[0], overwrite=True)
    assert not (published[0] / "vapi_jax.json").exists()


def edit(path, change):
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


def language(**changes):
    return lambda folder: edit(
        folder / "config.json", lambda found: found["language_config"].update(changes)
    )


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (language(hidden_size=64), ("hidden_size", 64, 32)),
        (language(num_hidden_layers=30), ("num_hidden_layers", 30, 2)),
        (language(num_attention_heads=5), ("num_attention_heads", 5)),
        (language(num_key_value_heads=2), ("num_key_value_heads", 2, 4)),
        (language(num_attention_heads="4"), ("num_attention_heads", "'4'")),
        (language(rope_scaling={"type": "linear"}), ("rope_scaling", "linear")),
        (language(rope_parameters={"rope_type": "linear"}), ("rope_type", "linear")),
        (language(rope_parameters=[1.0]), ("rope_parameters", "[1.0]")),
        (
            lambda folder: edit(
                folder / "processor_config.json", lambda found: found.update(num_image_tokens=15)
            ),
            ("num_image_tokens", 15),
        ),
        (lambda folder: (folder / "config.json").unlink(), ("config.json",)),
        (lambda folder: (folder / "config.json").write_text("{"), ("config.json",)),
        (lambda folder: (folder / "tokenizer.json").unlink(), ("tokenizer.json",)),
        (
            lambda folder: (folder / "pytorch_model-00002-of-00002.bin").unlink(),
            ("pytorch_model-00002-of-00002.bin",),
        ),
    ],
)
def test_a_folder_that_does_not_fit_is_a_sentence_and_leaves_nothing(
    golden, tmp_path, damage, told
):
    src = write_deepseek(tmp_path / "published", golden, deepseek_tensors(golden), "bins")
    damage(src)
    with pytest.raises(WeightsError) as error:
        convert_janus(src, tmp_path / "out")
    assert_mentions(str(error.value), *told)
    assert [path.name for path in tmp_path.iterdir()] == ["published"]


def test_every_tensor_is_accounted_for(golden, tmp_path):
    tensors = deepseek_tensors(golden)
    del tensors["gen_head.vision_head.bias"]
    tensors["lora.weight"] = np.zeros(3, np.float32)
    src = write_deepseek(tmp_path / "published", golden, tensors)
    with pytest.raises(WeightsError) as error:
        convert_janus(src, tmp_path / "out")
    assert_mentions(
        str(error.value), "missing: gen_head.vision_head.bias", "unexpected: lora.weight"
    )
    (tmp_path / "llama").mkdir()
    shutil.copyfile(golden.directory / "gpt_c2i.safetensors", tmp_path / "llama" / "a.safetensors")
    shutil.copyfile(src / "config.json", tmp_path / "llama" / "config.json")
    with pytest.raises(WeightsError, match=r"gen_head\.output_mlp_projector\.weight"):
        convert_janus(tmp_path / "llama", tmp_path / "out")
