"""A user's T5 folder: every layout of its files, what does not belong together, and damage."""

import functools
import json
import shutil

import jax
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from tests.helpers.compare import assert_close_in_norm
from tests.helpers.compilers import optimised
from tests.helpers.jaxprs import every_equation
from tests.helpers.paths import GOLDEN
from vapi_jax.models import t5
from vapi_jax.models.text_encoder import TextEncoder, read_config
from vapi_jax.models.text_tokens import T5Tokenizer
from vapi_jax.parallel.sharding import make_mesh
from vapi_jax.weights.names import WeightsError

T5 = GOLDEN / "t5"
CAPTIONS = ["a red circle left of a blue square", "", "two  dogs", "日本 かな", "word " * 200]


def folder(path, *names):
    """Some of the golden folder's files."""
    path.mkdir()
    for name in names:
        shutil.copyfile(T5 / name, path / name)
    return path


def encoder(path, **options):
    return TextEncoder(path, make_mesh(2, 4), **options)


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture(scope="module")
def theirs():
    """A model of transformers with a decoder, and more heads than its width has room for."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=412, d_model=24, d_kv=16, d_ff=40, num_layers=3, num_heads=4, num_decoder_layers=1,
        feed_forward_proj="gated-gelu", relative_attention_num_buckets=16,
        relative_attention_max_distance=40,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).eval()


@pytest.mark.parametrize("safe", [False, True])
def test_shards_of_a_model_with_a_decoder_give_the_features_of_transformers(
    theirs, safe, tmp_path, capsys
):
    theirs.save_pretrained(tmp_path, max_shard_size="30KB", safe_serialization=safe)
    shutil.copyfile(T5 / "tokenizer.json", tmp_path / "tokenizer.json")
    assert len(list(tmp_path.glob("*.index.json"))) == 1
    encode = encoder(tmp_path)
    assert "decoder" in capsys.readouterr().out
    got = encode(CAPTIONS)
    with torch.no_grad():
        inputs = (torch.tensor(x, dtype=torch.int64) for x in (got.ids, got.mask))
        want = theirs.encoder(*inputs).last_hidden_state.numpy()
    assert_close_in_norm(got.features[got.left_mask], want[got.mask], 2e-4)
    assert got.cut.tolist() == [False] * 4 + [True]
    assert got.empty.tolist() == [False, True, False, False, False]
    assert got.unknown.tolist() == [False, False, False, True, False]
    assert got.other_script.tolist() == [False, False, False, True, False]


def test_tied_embeddings_of_a_torch_file_are_read_once(tmp_path):
    here = folder(tmp_path / "t5", "config.json", "tokenizer.json")
    from safetensors.torch import load_file

    tensors = load_file(T5 / "model.safetensors")
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"]
    tensors["decoder.embed_tokens.weight"] = tensors["shared.weight"]
    torch.save(tensors, here / "pytorch_model.bin")
    want = encoder(T5)(CAPTIONS).features
    np.testing.assert_array_equal(encoder(here)(CAPTIONS).features, want)
    del tensors["shared.weight"]
    torch.save(tensors, here / "pytorch_model.bin")
    np.testing.assert_array_equal(encoder(here)(CAPTIONS).features, want)


def test_no_device_holds_all_weights_and_no_program_gathers_all_layers():
    encode = encoder(T5)
    for leaf in jax.tree.leaves(encode._params["layers"]):
        if leaf.ndim == 3:
            assert leaf.addressable_shards[0].data.size * 4 == leaf.size
    rows = jax.ShapeDtypeStruct((8, 16), np.int32)
    with optimised():
        program = encode._features.lower(encode._params, rows, rows.update(dtype=bool)).compile()
    gathers = [line for line in program.as_text().splitlines() if "all-gather(" in line]
    width, inner = encode.config.d_model, encode.config.num_heads * encode.config.d_kv
    assert any(f"[1,{width},{inner}]" in line or f"[{width},{inner}]" in line for line in gathers)
    layers = encode.config.num_layers
    assert not any(f"[{layers},{width},{inner}]" in line for line in gathers)


def test_a_batch_may_be_short_and_is_what_each_caption_is_alone():
    encode = encoder(T5)
    together = encode(CAPTIONS, rows=16)
    alone = encode(CAPTIONS[:1], rows=16)
    assert together.features.shape == (5, 120, 32)
    assert_close_in_norm(alone.features[0], together.features[0], 1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_float32_is_multiplied_as_such_on_every_device(dtype):
    config = read_config(T5)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), t5.shapes(config))
    ids = jax.ShapeDtypeStruct((2, 8), np.int32)
    run = functools.partial(t5.encode, config=config)
    traced = jax.make_jaxpr(run)(params, ids, ids.update(dtype=bool))
    products = [e for e in every_equation(traced.jaxpr) if e.primitive.name == "dot_general"]
    wanted = jax.lax.Precision.HIGHEST if dtype == "float32" else jax.lax.Precision.DEFAULT
    assert len(products) == 9 and {p for e in products for p in e.params["precision"]} == {wanted}


@pytest.mark.parametrize("settings_file", [True, False])
def test_spiece_alone_gives_ids(settings_file, tmp_path):
    """With the settings that transformers saved, those of its tokenizer.json; else sentencepiece's."""
    names = ["spiece.model"] + ["tokenizer_config.json"] * settings_file
    texts = [*json.loads((GOLDEN / "t5_captions.json").read_text())["cleaned"], "two  dogs  "]
    got = T5Tokenizer(folder(tmp_path / "t5", *names), 412)(texts, 120)
    if settings_file:
        want = T5Tokenizer(T5, 412)(texts, 120).ids
    else:
        from sentencepiece import SentencePieceProcessor

        pieces = SentencePieceProcessor(str(T5 / "spiece.model"))
        want = np.zeros((len(texts), 120), np.int32)
        for row, text in zip(want, texts, strict=True):
            ids = [*pieces.encode(text)[:119], 1]
            row[: len(ids)] = ids
    np.testing.assert_array_equal(got.ids, want)


def test_spiece_marks_words_after_a_sentinel_as_its_settings_say(tmp_path):
    found = []
    for legacy in (True, False):
        here = folder(tmp_path / str(legacy), "spiece.model")
        (here / "tokenizer_config.json").write_text(json.dumps({"legacy": legacy}))
        found.append(T5Tokenizer(here, 412)(["two<extra_id_0>two"], 30).ids[0].tolist())
    old, new = (ids[: ids.index(1)] for ids in found)
    start = old.index(399)
    assert old == [*old[:start], 399, *old[:start]]  # a word like the first
    assert new[: start + 1] == old[: start + 1] and new != old


def test_distances_fall_into_the_buckets_of_the_paper():
    near = t5.buckets(200, 32, 128)[0]
    ends = {d: int(near[d]) for d in (0, 1, 7, 8, 11, 12, 16, 23, 31, 32, 46, 63, 64, 90, 91, 199)}
    assert ends == {
        0: 0, 1: 17, 7: 23, 8: 24, 11: 24, 12: 25, 16: 26, 23: 27, 31: 27, 32: 28, 46: 29, 63: 29,
        64: 30, 90: 30, 91: 31, 199: 31,
    }  # fmt: skip
    assert (t5.buckets(200, 32, 128)[:, 0][1:] == near[1:] - 16).all()


def remove(name):
    return lambda path: (path / name).unlink()


def change(name, **changes):
    return lambda path: edit(path / name, **changes)


def fewer_rows(path):
    tensors = {"shared.weight": torch.zeros(8, 32)}
    torch.save(tensors, path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()


def overflown(path):
    """As a T5 in float16 may be."""
    tensors = load_file(path / "model.safetensors")
    tensors["encoder.block.1.layer.1.DenseReluDense.wo.weight"][3, 1] = np.inf
    save_file(tensors, path / "model.safetensors")


@pytest.mark.parametrize(
    "spoil, message",
    [
        (remove("config.json"), "config.json"),
        (remove("model.safetensors"), "pytorch_model.bin"),
        (remove("tokenizer.json"), "spiece.model"),
        (change("config.json", model_type="bert"), "'bert'"),
        (change("config.json", feed_forward_proj="relu"), "'relu'.*Flan-T5"),
        (change("config.json", num_layers=3), "encoder.block.2"),
        (change("config.json", d_model=40), "shared.weight"),
        (change("config.json", num_heads=0), "num_heads=0"),
        (change("config.json", d_model="many"), "d_model='many'"),
        (change("config.json", vocab_size=300), "does not belong.*399"),
        (change("config.json", eos_token_id=5), "does not belong"),
        (fewer_rows, "encoder.final_layer_norm.weight"),
        (overflown, "feed_forward/w2/kernel in .*1 of .* not finite"),
        (lambda path: (path / "tokenizer.json").write_text("{}"), "tokenizer.json"),
    ],
)
def test_what_does_not_belong_together_is_said(spoil, message, tmp_path):
    here = folder(tmp_path / "t5", "config.json", "tokenizer.json", "model.safetensors")
    spoil(here)
    with pytest.raises(WeightsError, match=message):
        encoder(here)


def test_another_width_and_a_folder_too_high_are_named(tmp_path):
    with pytest.raises(WeightsError, match="32, the generator takes 2048"):
        encoder(T5, width=2048)
    folder(tmp_path / "flan-t5-xl", "config.json")
    with pytest.raises(WeightsError, match="flan-t5-xl"):
        read_config(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "spiece.model"])
@settings(max_examples=25)
@given(data=st.data())
def test_a_damaged_tokenizer_is_refused_or_read(name, data, tmp_path_factory):
    content = bytearray((T5 / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, 4000) | st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    end = data.draw(st.just(len(content)) | st.integers(0, len(content)))
    here = tmp_path_factory.mktemp("t5")
    (here / name).write_bytes(content[:end])
    try:
        found = T5Tokenizer(here, 412)(["two dogs"], 120)
    except WeightsError:  # any other error fails
        return
    assert found.ids.shape == found.mask.shape == (1, 120)
    assert 0 <= found.ids.min() <= found.ids.max() < 412
