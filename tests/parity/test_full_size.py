"""The models at the size of the releases against PyTorch, and files in the layout of the releases.

The weights are random: names, shapes and arithmetic are what is compared.
"""

import argparse
import dataclasses
import json
import math
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from skimage.data import astronaut

from tests.helpers import commands, release_files, torch_models
from tests.helpers.compare import assert_close
from tests.helpers.golden import pick
from tests.helpers.paths import ROOT
from vapi_jax.models import vq
from vapi_jax.models.conditions import text_condition
from vapi_jax.models.policies import make_policy
from vapi_jax.weights import names as weights

# About five times the largest difference measured between the two float32 computations, which was
# about what each of them is away from float64. Only latents have more: by which kernel it happens
# to choose, PyTorch itself is 3e-6 or 4e-5 off with VQ-16.
LOGITS, LATENTS, IMAGES = 1e-5, 5e-5, 2e-5
KINDS = {"c2i": "class", "t2i": "text"}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def fill(module, **options):
    """Gives a module (on "meta") random weights: (module, its state dict as arrays)."""
    tensors = release_files.random_tensors(module, **options)
    arrays = {name: tensor.read() for name, tensor in tensors.items()}
    state = {name: torch.from_numpy(array) for name, array in arrays.items()}
    module.load_state_dict(state, assign=True)
    return module.eval(), arrays


def there_and_back(arrays, target, rules, ignored, buffers=frozenset()):
    """The arrays under our names, after a look whether all of them come back unchanged."""
    params = weights.from_reference(arrays, target, rules, ignored)
    back = weights.to_reference(params, rules)
    assert back.keys() == arrays.keys() - buffers
    for name, array in back.items():
        assert array.dtype == arrays[name].dtype
        assert np.array_equal(array, arrays[name]), name
    return params


# Names, shapes and the oracle itself ------------------------------------------------------------


# As LlamaGen gives them, but for t2i-XL, which it rounds to the number of GPT-XL.
PARAMETERS = {
    "GPT-B": "111M", "GPT-L": "343M", "GPT-XL": "775M", "GPT-XXL": "1.4B", "GPT-XXXL": "3.9B",
    "GPT-1B": "1.2B", "GPT-3B": "3.1B", "GPT-7B": "6.6B", "t2i-XL": "778M", "VQ-16": "72M",
    "VQ-8": "70M",
}  # fmt: skip


@pytest.mark.parametrize("model", PARAMETERS)
def test_every_size_has_the_names_and_shapes_of_the_reference(model):
    tensors = release_files.release_tensors(model, 384, freqs_cis=True)
    if model in vq.VQ_PRESETS:
        tokenizer = vq.VQModel(vq.VQ_PRESETS[model])
        image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
        target = jax.eval_shape(tokenizer.init, jax.random.key(0), image)["params"]
        rules, ignored, buffers = vq.NAME_RULES, vq.IGNORED_NAMES, {"quantize.codebook_used"}
    else:
        kind = "text" if model.startswith("t2i") else "class"
        policy = make_policy(kind, size=model.replace("t2i", "GPT"), block_size=576)
        target = jax.eval_shape(policy.init, jax.random.key(0))
        rules, ignored, buffers = policy.name_rules, policy.ignored_names, {"freqs_cis"}
    origins = weights.check_reference(tensors, target, rules, ignored)
    read = [name for origin in origins.values() for name in origin.names]
    assert sorted([*read, *buffers]) == sorted(tensors)
    count = sum(math.prod(tensors[name].shape) for name in read)
    short = f"{count / 1e6:.0f}M" if count < 1e9 else f"{count / 1e9:.1f}B"
    assert short == PARAMETERS[model]
    assert count == sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(target))


@pytest.mark.parametrize("name", ["gpt_c2i", "gpt_t2i"])
def test_the_torch_generator_gives_the_golden_numbers(golden, name):
    arrays, args = golden.npz(name), pick(torch_models.GPTArgs, golden.args(name))
    model = torch_models.GPT(torch_models.GPTArgs(**args))
    state = {key: torch.from_numpy(value) for key, value in golden.tensors(name).items()}
    state.pop("freqs_cis", None)
    model.load_state_dict(state)
    context = torch.from_numpy(arrays["tokens"][:, :-1]).long()
    if args["model_type"] == "c2i":
        logits = model(torch.from_numpy(arrays["class_ids"]).long(), context)
    else:
        seen = torch.from_numpy(arrays["emb_mask"]).bool()
        logits = model(torch.from_numpy(arrays["caption"]), context, seen)
    assert_close(logits, arrays["logits_clean"], LOGITS)
    if "freqs_cis" in arrays:
        table = torch.view_as_real(torch_models.rotations(model.args))
        assert_close(table, arrays["freqs_cis"], 1e-6)


def test_the_torch_tokenizer_gives_the_golden_numbers(golden):
    arrays, args = golden.npz("vq"), golden.args("vq")
    sizes = pick(torch_models.VQArgs, args) | {"ch_mult": tuple(args["encoder_ch_mult"])}
    model = torch_models.VQ(torch_models.VQArgs(**sizes))
    state = {key: torch.from_numpy(value) for key, value in golden.tensors("vq").items()}
    model.load_state_dict({"quantize.codebook_used": torch.zeros(65536)} | state)
    latents = model.latents(torch.from_numpy(arrays["image"]))
    assert_close(latents, arrays["z"], LATENTS)
    tokens = model.quantize(latents)
    np.testing.assert_array_equal(tokens, arrays["indices"])
    images = model.decode(tokens, tuple(latents.shape[2:]))
    assert_close(images, arrays["decode_code_indices"], IMAGES)


# Generators -------------------------------------------------------------------------------------


def build_generator(args, **options):
    """One random generator twice: (PyTorch model, policy, parameters)."""
    with torch.device("meta"):
        model = torch_models.GPT(args)
    model, arrays = fill(model, **options)
    policy = make_policy(KINDS[args.model_type], **dataclasses.asdict(args))
    target = jax.eval_shape(policy.init, jax.random.key(0))
    params = there_and_back(arrays, target, policy.name_rules, policy.ignored_names)
    return model, policy, params


def compare_logits(model, policy, params, ours, theirs, seen=None, within=LOGITS):
    """Logits of both for random contexts, under one condition in both forms."""
    config, batch = policy.config, len(theirs)
    rng = np.random.default_rng(1)
    context = rng.integers(0, config.vocab_size, (batch, policy.context_length), np.int32)
    want = model(torch.as_tensor(theirs), torch.from_numpy(context), seen).numpy()
    got = jax.jit(policy.logits)(params, ours, jnp.asarray(context))
    assert got.shape == want.shape == (batch, config.block_size, config.vocab_size)
    assert want.std() > 0.3  # logits that say something
    assert_close(got, want, within)


def class_conditions(labels):
    return jnp.asarray(labels, jnp.int32), torch.as_tensor(labels)


def text_conditions(model, lengths):
    """Left-padded captions, the last of them without condition: (ours, features, mask)."""
    slots, width = model.args.cls_token_num, model.args.caption_dim
    # Padding is noise here, so that a read of it would show.
    features = np.random.default_rng(2).standard_normal((len(lengths), slots, width), np.float32)
    mask = np.arange(slots) >= slots - np.asarray(lengths)[:, None]
    ours = text_condition(features, mask)
    ours["dropped"] = ours["dropped"].at[-1].set(True)
    theirs = torch.from_numpy(features.copy())
    theirs[-1] = model.cls_embedding.uncond_embedding
    return ours, theirs, torch.from_numpy(mask)


@pytest.mark.slow
def test_class_conditional_logits_of_gpt_b():
    args = torch_models.GPTArgs(*torch_models.GPT_SIZES["GPT-B"])
    model, policy, params = build_generator(args)
    assert policy == make_policy("class", size="GPT-B")
    # Row 1000 is the one without condition.
    compare_logits(model, policy, params, *class_conditions([207, 1000]))


@pytest.mark.slow
def test_text_conditional_logits_at_the_width_of_gpt_b():
    sizes = torch_models.GPT_SIZES["GPT-B"]
    args = torch_models.GPTArgs(*sizes, model_type="t2i", cls_token_num=120)
    model, policy, params = build_generator(args)
    conditions = text_conditions(model, [23, 120, 7])
    compare_logits(model, policy, params, *conditions)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_with_grouped_queries_and_unusual_sizes(kind):
    args = torch_models.GPTArgs(
        n_layer=3,
        n_head=6,
        n_kv_head=2,
        dim=96,
        multiple_of=24,
        ffn_dim_multiplier=1.3,
        rope_base=100.0,
        norm_eps=1e-3,
        num_classes=5,
        caption_dim=40,
        model_type=kind,
        vocab_size=97,
        cls_token_num=1 if kind == "c2i" else 9,
        block_size=25,
    )
    model, policy, params = build_generator(args, std=0.12)
    text = kind == "t2i"
    conditions = text_conditions(model, [2, 9, 5]) if text else class_conditions([0, 4, 5])
    compare_logits(model, policy, params, *conditions)


# Tokenizers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, side", [pytest.param("VQ-16", 256, marks=pytest.mark.slow), ("VQ-8", 64)]
)
def test_a_photograph_through_the_whole_tokenizer(name, side):
    module, arrays = fill(release_files.release_module(name))
    model = vq.VQModel(vq.VQ_PRESETS[name])
    picture = Image.fromarray(astronaut()).resize((side, side))
    image = np.asarray(picture, np.float32)[None] / 127.5 - 1
    target = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
    buffers = {"quantize.codebook_used"}
    params = there_and_back(arrays, target, vq.NAME_RULES, vq.IGNORED_NAMES, buffers)

    latents = module.latents(torch.from_numpy(image).permute(0, 3, 1, 2).contiguous())
    want_tokens = module.quantize(latents)
    nearest = module.quantize.distances(latents).topk(2, largest=False).values
    # Far from ties, so equality is fair; and many different codes, so it is not easy.
    assert (nearest[..., 1] - nearest[..., 0]).min() > LATENTS
    assert len(want_tokens.unique()) > 0.9 * want_tokens.numel()

    @jax.jit
    def encode(params, image):
        variables = {"params": params}
        return tuple(
            model.apply(variables, image, method=method) for method in ("encode_latents", "encode")
        )

    z, tokens = encode(params, image)
    assert_close(z, latents.permute(0, 2, 3, 1), LATENTS)
    np.testing.assert_array_equal(tokens, want_tokens)
    grid = tuple(latents.shape[2:])
    want = module.decode(want_tokens, grid).permute(0, 2, 3, 1)
    decode = jax.jit(lambda p, t: model.apply({"params": p}, t, method="decode_tokens"))
    assert_close(decode(params, tokens), want, IMAGES)


# Files ------------------------------------------------------------------------------------------


@pytest.fixture
def tiny():
    """The state dict of a tiny generator, not yet made."""
    with torch.device("meta"):
        args = torch_models.GPTArgs(2, 2, 32, multiple_of=16, num_classes=3, vocab_size=11)
        return release_files.random_tensors(torch_models.GPT(args), seed=5)


def assert_equal(state, tensors):
    """A state dict of PyTorch's holds these tensors, in this order and bit for bit."""
    assert list(state) == list(tensors)
    for name, tensor in tensors.items():
        want = tensor.read()
        assert state[name].shape == want.shape
        assert torch.equal(state[name].float(), torch.from_numpy(want.astype(np.float32)))


@pytest.mark.parametrize("model", ["GPT-XL", "VQ-16"])
@pytest.mark.parametrize("layout", release_files.LAYOUTS)
def test_torch_reads_every_layout(tmp_path, tiny, layout, model):
    path = tmp_path / "weights.pt"
    size = release_files.write(path, release_files.nest(tiny, layout, model, 384))
    assert size == path.stat().st_size
    with torch.serialization.safe_globals([argparse.Namespace]):
        value = torch.load(path, weights_only=True)
    if layout == "ddp":
        assert ("discriminator" in value) == (model == "VQ-16")
        assert value["steps"] == 100
        assert vars(value["args"])["image_size"] == 384
        assert model in vars(value["args"]).values()
        assert value["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.95)
        assert value["optimizer"]["state"][0]["step"] == 100
    state = value if layout == "fsdp" else value["model" if layout == "ddp" else layout]
    assert_equal(state, tiny)


@pytest.mark.parametrize("dtype", release_files.DTYPES)
def test_the_safetensors_library_reads_whole_and_sharded_files(tmp_path, dtype):
    with torch.device("meta"):
        module = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(5)))
    tensors = release_files.random_tensors(module, dtype=dtype)
    whole = tmp_path / "weights.safetensors"
    release_files.write(whole, tensors, "safetensors")
    state = load_file(whole)
    assert state["0.weight"].dtype == getattr(torch, dtype)
    assert_equal({name: state[name] for name in tensors}, tensors)

    size = release_files.write(tmp_path / "shards", tensors, "sharded", shard_bytes=40_000)
    files = sorted((tmp_path / "shards").iterdir())
    assert size == sum(path.stat().st_size for path in files)
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == len(files) - 1 > 1
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    found = {}
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "shards" / file, framework="pt") as shard:
            found[name] = shard.get_tensor(name)
    assert_equal({name: found[name] for name in tensors}, tensors)


def test_values_depend_on_name_and_seed_alone(tiny):
    tensor = tiny["layers.1.attention.wqkv.weight"]
    again = dataclasses.replace(tensor).read()
    np.testing.assert_array_equal(tensor.read(), again)
    for change in ({"seed": 6}, {"name": "layers.0.attention.wqkv.weight"}):
        assert not np.any(dataclasses.replace(tensor, **change).read() == again)
    narrow = dataclasses.replace(tensor, dtype=release_files.DTYPES["bfloat16"]).read()
    np.testing.assert_allclose(narrow.astype(np.float32), again, rtol=2**-8)


@pytest.mark.parametrize("file_format", ["pt", "safetensors"])
def test_a_file_is_written_with_one_tensor_in_memory(tmp_path, file_format):
    with torch.device("meta"):
        module = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024, False) for _ in range(12)))
    tensors = release_files.random_tensors(module)
    release_files.write(tmp_path / "warm", dict(list(tensors.items())[:1]), file_format)
    tracemalloc.start()
    try:
        size = release_files.write(tmp_path / "weights", tensors, file_format)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert size > 12 * 4 * 1024**2
    assert peak < 3 * 4 * 1024**2


def test_buffers_are_added_and_left_out():
    plain = release_files.release_tensors("VQ-8", codebook_used=False)
    whole = release_files.release_tensors("VQ-8")
    assert whole.keys() - plain.keys() == {"quantize.codebook_used"}
    uses = whole["quantize.codebook_used"].read()
    assert uses.shape == (65536,) and uses.dtype == np.float32
    assert uses.min() >= 0 and 16000 < uses.max() < 16384 and not np.any(uses % 1)

    table = release_files.release_tensors("t2i-XL", 256, freqs_cis=True)["freqs_cis"]
    assert table.shape == (120 + 256, 32, 2) and table.dtype == np.float32
    assert not table[:120].any()
    np.testing.assert_array_equal(table[120], [[1, 0]] * 32)
    assert "freqs_cis" not in release_files.release_tensors("t2i-XL", 256)


def test_the_command_writes_a_release_with_its_buffers(tmp_path):
    out = tmp_path / "vq"
    env = commands.environment()
    del env["PYTHONPATH"]  # it finds the package itself, wherever it is started
    run = commands.python(
        ROOT / "tests/helpers/release_files.py", "VQ-8", out, "--format", "sharded",
        "--shard-mb", "60", "--dtype", "bfloat16", cwd=tmp_path, env=env,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == release_files.release_tensors("VQ-8").keys()
    assert "quantize.codebook_used" in index["weight_map"]
    assert run.stdout.startswith(f"{out}: VQ-8, {len(index['weight_map'])} tensors, ")
    assert f"{len(index['weight_map'])}/{len(index['weight_map'])}" in run.stderr


@pytest.mark.parametrize(
    "options, message",
    [
        (["--format", "safetensors", "--layout", "ddp"], "--layout is about .pt files"),
        (["--image-size", "250"], "multiple of 16, not 250"),
        (["--shard-mb", "0"], "--shard-mb must be positive"),
        (["--seed", "-1"], "--seed must not be negative"),
    ],
)
def test_bad_options_are_refused_in_a_sentence(tmp_path, capsys, options, message):
    with pytest.raises(SystemExit, match="2"):
        release_files.main(["GPT-B", str(tmp_path / "out"), *options])
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_named(tmp_path, capsys):
    out = tmp_path / "absent" / "b.pt"
    assert release_files.main(["GPT-B", str(out)]) == 1
    assert f"error: {out} cannot be written" in capsys.readouterr().err
