"""Published folders of tiny Janus models, in both layouts, and a tokenizer for them."""

import json

import jax.numpy as jnp
import numpy as np
import torch
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

from tests.helpers import release_files
from vapi_jax.models.architecture import from_json
from vapi_jax.models.conversion import model_shapes, name_rules
from vapi_jax.models.janus import JanusConfig
from vapi_jax.models.loading import WeightsSource, load_weights
from vapi_jax.models.vq import VQConfig
from vapi_jax.weights.tensors import open_tensors

BOS, PAD, BOI = "<｜begin▁of▁sentence｜>", "<｜▁pad▁｜>", "<begin_of_image>"
USER, ASSISTANT = "<|User|>", "<|Assistant|>"


def write_tokenizer(folder, *, named=True, bos_first=True):
    """A byte-level BPE without merges: 256 bytes, then the marks; pads with 258, begins images with 257."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    add_marks(folder, tokenizer, (BOS, BOI, PAD, USER, ASSISTANT), named, bos_first)


def write_words(folder, size, pad):
    """A tokenizer of `size` tokens that knows few words, with the padding where it is asked for."""
    marks = dict(
        zip((BOS, BOI, USER, ASSISTANT), (i for i in range(size) if i != pad), strict=False)
    )
    marks[PAD] = pad
    free = [i for i in range(size) if i not in marks.values()]
    words = dict(zip((":", "a", "red", "cat", "?"), free, strict=False))
    tokenizer = Tokenizer(models.WordLevel({**marks, **words}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    add_marks(folder, tokenizer, tuple(marks))


def add_marks(folder, tokenizer, marks, named=True, bos_first=True):
    folder.mkdir(exist_ok=True)
    tokenizer.add_special_tokens([AddedToken(mark, normalized=False) for mark in marks])
    if bos_first:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    said = {
        "bos_token": {"content": BOS},
        "pad_token": PAD,
        "tokenizer_class": "LlamaTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(said if named else {}))


def transformers_janus(levels=2):
    """A model of transformers with random weights: 300 words, 64 codes, 16 tokens of 2x2 at two levels."""
    from transformers import JanusConfig, JanusForConditionalGeneration

    torch.manual_seed(0)
    config = JanusConfig(
        text_config={
            "model_type": "llama", "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "initializer_range": 0.2, "rope_theta": 5000.0,
        },
        vision_config={
            "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 2 ** (levels + 1), "patch_size": 2 ** (levels - 1), "projection_dim": 32,
            "num_image_tokens": 16,
        },
        vq_config={
            "embed_dim": 8, "num_embeddings": 64, "latent_channels": 16, "base_channels": 32,
            "channel_multiplier": [1] * levels, "num_res_blocks": 1, "projection_dim": 32,
            "image_token_embed_dim": 32, "initializer_range": 0.2,
        },
    )  # fmt: skip
    return JanusForConditionalGeneration(config).eval()


SIZES = {"1B": (2048, 5632, 24, 16), "7B": (4096, 11008, 30, 32)}


def write_full_size(folder, size):
    """A random model of a released size in bfloat16, of which one tensor is in memory at a time."""
    from transformers import JanusConfig, JanusForConditionalGeneration

    dim, hidden, layers, heads = SIZES[size]
    config = JanusConfig(
        text_config={
            "model_type": "llama", "vocab_size": 102400, "hidden_size": dim,
            "intermediate_size": hidden, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": heads,
        },
        vision_config={"projection_dim": dim},
        vq_config={"projection_dim": dim, "image_token_embed_dim": dim},
    )  # fmt: skip
    with torch.device("meta"):
        model = JanusForConditionalGeneration(config)
    release_files.write(folder, release_files.random_tensors(model, dtype="bfloat16"), "sharded")
    config.save_pretrained(folder)
    write_tokenizer(folder)


def deepseek_tensors(golden, aligner_dim=None, gen_head_dim=None):
    """The golden Janus and VQ tokenizer as one published model, with a side that looks at images."""
    tensors = golden.tensors("janus")
    tensors |= {f"gen_vision_model.{k}": v for k, v in golden.tensors("vq").items()}
    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32)

    dim = tensors["language_model.model.norm.weight"].shape[0]
    codes, width = tensors["gen_embed.weight"].shape
    if aligner_dim:
        tensors["gen_aligner.layers.0.weight"] = draw(aligner_dim, width)
        tensors["gen_aligner.layers.0.bias"] = draw(aligner_dim)
        tensors["gen_aligner.layers.2.weight"] = draw(dim, aligner_dim)
    if gen_head_dim:
        tensors["gen_head.output_mlp_projector.weight"] = draw(gen_head_dim, dim)
        tensors["gen_head.output_mlp_projector.bias"] = draw(gen_head_dim)
        tensors["gen_head.vision_head.weight"] = draw(codes, gen_head_dim)
    tensors["vision_model.vision_tower.blocks.0.attn.qkv.weight"] = draw(12, 4)
    tensors["vision_model.vision_tower.attn_pool.latent"] = draw(1, 1, 4)
    tensors["aligner.layers.0.weight"] = draw(8, 4)
    return tensors


def write_deepseek(folder, golden, tensors, form="safetensors"):
    """A folder of DeepSeek's layout of `deepseek_tensors`: "safetensors", "bin" or sharded "bins"."""
    args, arrays = golden.args("janus"), golden.npz("janus")
    write_words(folder, args["TV"], int(arrays["pad_id"]))
    config = {
        "model_type": "multi_modality",
        "torch_dtype": "float32",
        "language_config": {
            "model_type": "llama", "hidden_size": args["d"], "intermediate_size": args["I"],
            "num_hidden_layers": args["L"], "num_attention_heads": args["H"],
            "num_key_value_heads": args["KV"], "vocab_size": args["TV"], "torch_dtype": "float32",
        },
        "gen_vision_config": {"cls": "VQ-16", "params": {"image_token_size": args["V"], "n_embed": 8}},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    processor = {"num_image_tokens": arrays["gt_tokens"].shape[1], "pad_tag": PAD}
    (folder / "processor_config.json").write_text(json.dumps(processor))
    if form == "safetensors":
        save_file(tensors, folder / "model.safetensors")
        return folder
    shards = {"pytorch_model.bin": tensors}
    if form == "bins":
        names = sorted(tensors)
        cut = {"pytorch_model-00001-of-00002.bin": names[::2]}
        cut["pytorch_model-00002-of-00002.bin"] = names[1::2]
        shards = {file: {n: tensors[n] for n in some} for file, some in cut.items()}
        index = {"weight_map": {n: file for file, some in cut.items() for n in some}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    for file, some in shards.items():
        torch.save({k: torch.from_numpy(v) for k, v in some.items()}, folder / file)
    return folder


def load(directory, part="gpt"):
    """One model of a converted directory: (configuration, parameters)."""
    kind = JanusConfig if part == "gpt" else VQConfig
    config = from_json(json.loads((directory / "config.json").read_text())[part], kind)
    source = WeightsSource(str(directory), part, *name_rules(part, config), config)
    return config, load_weights(source, model_shapes(config))


def assert_holds(folder, tensors, dtype=None):
    """A folder's weights are these, bit for bit or rounded."""
    with open_tensors(folder) as file:
        assert file.tensors.keys() == tensors.keys()
        for name, array in tensors.items():
            found = file.tensors[name].read()
            assert found.dtype == jnp.dtype(dtype or array.dtype), name
            assert found.tobytes() == array.astype(found.dtype).tobytes(), name
