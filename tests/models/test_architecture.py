"""What a file holds, told by names and shapes, and what is said where it cannot be told."""

import dataclasses
import json

import pytest

from vapi_jax.common.trees import flatten
from vapi_jax.models.architecture import (
    Architecture,
    architectural,
    disagreements,
    from_json,
    gpt_differences,
    gpt_facts,
    infer_gpt,
    infer_vq,
)
from vapi_jax.models.conversion import model_shapes, name_rules
from vapi_jax.models.llama import LLAMA_SIZES, LlamaConfig
from vapi_jax.models.vq import VQ_PRESETS, VQConfig
from vapi_jax.weights.names import WeightsError, origin_of


def reference_shapes(config):
    """LlamaGen's names and shapes of a model, from the tables that the converter uses."""
    rules, _ = name_rules("vq" if isinstance(config, VQConfig) else "gpt")
    shapes = {}
    for path, leaf in flatten(model_shapes(config)).items():
        origin = origin_of(path, leaf, rules)
        shapes |= dict.fromkeys(origin.names, origin.their_shape(leaf.shape))
    return shapes


@pytest.mark.parametrize("size", LLAMA_SIZES)
def test_every_released_size_is_recognised_by_its_shapes(size):
    wanted = LlamaConfig(**LLAMA_SIZES[size], block_size=576)
    found = infer_gpt(reference_shapes(wanted), file_name=f"c2i_{size}_384.pt")
    assert found == Architecture(size, wanted)


def test_a_text_model_is_recognised():
    wanted = LlamaConfig(**LLAMA_SIZES["GPT-XL"], model_type="t2i", cls_token_num=120)
    found = infer_gpt(reference_shapes(wanted), file_name="t2i_XL_stage1_256.pt", t2i=True)
    assert found.name == "GPT-XL"
    assert found.config == wanted
    assert "120 text tokens of width 2048" in found.describe()


def test_the_second_stage_of_a_text_model_is_refused_at_the_size_of_the_first():
    """Its crops are why samples look like zooms; nothing but the name of the file tells it."""
    config = LlamaConfig(**LLAMA_SIZES["GPT-XL"], model_type="t2i", cls_token_num=120)
    shapes, name = reference_shapes(config), "t2i_XL_stage2_512.pt"
    with pytest.raises(WeightsError, match="256.*stage 2.*512"):
        infer_gpt(shapes, file_name=name, image_size=256, t2i=True)
    assert "512 px, you asked for 256" in gpt_differences(gpt_facts(shapes, name), config)[0]
    stored = infer_gpt(shapes, file_name=name).to_json()
    [difference] = disagreements(stored, config)
    assert "512 px" in difference and "256 px" in difference


@pytest.mark.parametrize("name", VQ_PRESETS)
def test_both_released_tokenizers_are_recognised(name):
    assert infer_vq(reference_shapes(VQ_PRESETS[name])) == Architecture(name, VQ_PRESETS[name])


def test_a_lopsided_tokenizer_is_read_coarsest_level_first():
    config = VQConfig(
        codebook_size=32, ch=32, encoder_ch_mult=(1, 2, 4), decoder_ch_mult=(1, 1, 3),
        num_res_blocks=1, z_channels=64,
    )  # fmt: skip
    assert infer_vq(reference_shapes(config)) == Architecture("", config)


def test_grouped_queries_and_an_odd_width_are_told_from_shapes():
    config = LlamaConfig(
        dim=64, n_layer=2, n_head=4, n_kv_head=2, multiple_of=32, num_classes=7, vocab_size=48,
        block_size=16,
    )  # fmt: skip
    found = infer_gpt(reference_shapes(config), {"n_head": 4, "block_size": 16})
    assert found.config == dataclasses.replace(config, multiple_of=64)  # the same width
    assert found.config.hidden_dim == config.hidden_dim == 192
    assert disagreements(found.to_json(), config) == []
    wider = dataclasses.replace(config, multiple_of=256)
    assert disagreements(found.to_json(), wider) == [
        "hidden_dim: it has 192, the configuration asks for 256"
    ]


TINY = LlamaConfig(dim=64, n_layer=2, n_head=4, num_classes=7, vocab_size=48, block_size=16)
TINY_ARGS = {"n_head": 4, "block_size": 16}


def test_old_files_tell_the_grid_by_their_rotations():
    shapes = {**reference_shapes(TINY), "freqs_cis": (1 + 36, 8, 2)}
    assert infer_gpt(shapes, {"n_head": 4}, file_name="c2i_256.pt").config.block_size == 36
    with pytest.raises(WeightsError, match=r"6.*96.*64.*4"):
        infer_gpt(shapes, TINY_ARGS)


def test_what_is_given_decides_over_the_name_of_the_file():
    config = LlamaConfig(**LLAMA_SIZES["GPT-B"], block_size=256)
    shapes = reference_shapes(config)
    assert infer_gpt(shapes, file_name="x_384.pt", image_size=256).config.block_size == 256
    assert infer_gpt(shapes, file_name="x_384.pt").config.block_size == 576


@pytest.mark.parametrize(
    "args, message",
    [
        ({}, "heads.*--args"),
        ({"n_head": 4}, "grid.*--image-size"),
        ({"n_head": 4, "block_size": 15}, "square"),
        ({**TINY_ARGS, "n_layer": 3}, "n_layer.*2.*3"),
        ({**TINY_ARGS, "num_classes": 10}, "class_rows.*8.*11"),
        ({**TINY_ARGS, "n_kv_head": 2}, "kv_dim.*64.*32"),
        ({**TINY_ARGS, "multiple_of": 64}, "hidden_dim.*256.*192"),
        ({**TINY_ARGS, "vocab_sise": 48}, "vocab_sise.*vocab_size"),
        ({**TINY_ARGS, "model_type": "t2i"}, "c2i"),
    ],
)
def test_contradictions_and_gaps_are_named(args, message):
    with pytest.raises(WeightsError, match=f"(?s){message}"):
        infer_gpt(reference_shapes(TINY), args)


def test_a_text_file_given_for_a_class_file_is_named_as_such():
    config = LlamaConfig(**{**vars(TINY), "model_type": "t2i", "cls_token_num": 3})
    shapes = reference_shapes(config)
    with pytest.raises(WeightsError, match="t2i.*--t2i"):
        infer_gpt(shapes, {**TINY_ARGS, "model_type": "c2i"})
    assert gpt_differences(gpt_facts(shapes), TINY) == [
        "this is a t2i file: use --t2i, or policy.kind='text' in a configuration"
    ]


def test_files_of_the_other_part_are_named_as_such():
    generator, tokenizer = reference_shapes(TINY), reference_shapes(VQ_PRESETS["VQ-8"])
    with pytest.raises(WeightsError, match="--vq"):
        infer_gpt(tokenizer)
    with pytest.raises(WeightsError, match="--gpt"):
        infer_vq(generator)
    with pytest.raises(WeightsError, match="LlamaGen.* a, b"):
        infer_gpt({"a": (1,), "b": (2,)})


def test_arguments_of_the_tokenizer_are_checked_against_the_file():
    config = VQ_PRESETS["VQ-8"]
    shapes = reference_shapes(config)
    args = {"downsample_factor": 8, "groupnorm_eps": 1e-6, "codebook_show_usage": True}
    assert infer_vq(shapes, {**args, "commit_loss_beta": 0.5}).config.commit_loss_beta == 0.5
    with pytest.raises(WeightsError, match="downsample_factor.*16.*8"):
        infer_vq(shapes, {"downsample_factor": 16})
    with pytest.raises(WeightsError, match="codebook_size.*16384.*99"):
        infer_vq(shapes, {"codebook_size": 99})


def test_what_is_kept_of_a_configuration_is_what_decides_the_meaning_of_weights():
    kept = architectural(TINY)
    assert kept.keys() >= {"dim", "n_head", "rope_base", "norm_eps", "class_dropout_prob"}
    assert not kept.keys() & {"dtype", "remat", "resid_dropout_p"}
    stored = json.loads(json.dumps(Architecture("", TINY).to_json()))
    assert stored == {"name": "", **kept}
    assert from_json(stored, LlamaConfig) == TINY
    with pytest.raises(WeightsError, match="LlamaConfig"):
        from_json({**stored, "dim": 3}, LlamaConfig)
