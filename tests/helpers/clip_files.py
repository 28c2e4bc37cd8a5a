"""Tiny CLIPs of random weights as published ones lie in folders, made by transformers."""

import gzip
import json

import torch
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig
from transformers.models.clip.tokenization_clip import bytes_to_unicode

MERGES = ("t h", "th e</w>", "c a", "ca t</w>", "p h", "o t", "ph ot", "phot o</w>")


def vocabulary():
    """Ids of letters, words of merges, and the two marks, in OpenAI's order."""
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(f"{x}</w>" for x in letters), *("".join(m.split()) for m in MERGES)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    return {word: i for i, word in enumerate(words)}


def make_model(activation="gelu", side=32, seed=0):
    """A CLIPModel with the vocabulary above."""
    torch.manual_seed(seed)
    vocab = len(vocabulary())
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_act": activation}
    vision = {"hidden_size": 16, "intermediate_size": 32, "image_size": side, "patch_size": 8}
    text = {
        "hidden_size": 12, "intermediate_size": 24, "vocab_size": vocab, "max_position_embeddings": 12,
        "bos_token_id": vocab - 2, "eos_token_id": vocab - 1,
    }  # fmt: skip
    made = CLIPConfig.from_text_vision_configs(
        CLIPTextConfig(**sizes, **text), CLIPVisionConfig(**sizes, **vision), projection_dim=8
    )
    model = CLIPModel(made).eval()
    with torch.no_grad():  # transformers' own draw is so small that all images look the same
        for name, leaf in model.named_parameters():
            if leaf.ndim > 1 or name.endswith(("bias", "class_embedding")):
                leaf.copy_(torch.randn_like(leaf) * 0.3)
    return model


def write_tokenizer(folder, kind="hf"):
    """The vocabulary's files: vocab.json and merges.txt, or OpenAI's list of merges."""
    if kind == "openai":
        text = "\n".join(["#version", *MERGES]) + "\n"
        (folder / "bpe_simple_vocab_16e6.txt.gz").write_bytes(gzip.compress(text.encode()))
        return
    (folder / "vocab.json").write_text(json.dumps(vocabulary()))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES]) + "\n")


def as_open_clip(model):
    """The same weights under open_clip's names."""
    state, found = model.state_dict(), {}
    plain = {
        "vision_model.embeddings.class_embedding": "visual.class_embedding",
        "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
        "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "logit_scale": "logit_scale",
    }
    for theirs, name in plain.items():
        found[name] = state[theirs]
    found["visual.proj"] = state["visual_projection.weight"].T.contiguous()
    found["text_projection"] = state["text_projection.weight"].T.contiguous()
    for leaf in ("weight", "bias"):
        found[f"visual.ln_pre.{leaf}"] = state[f"vision_model.pre_layrnorm.{leaf}"]
        found[f"visual.ln_post.{leaf}"] = state[f"vision_model.post_layernorm.{leaf}"]
        found[f"ln_final.{leaf}"] = state[f"text_model.final_layer_norm.{leaf}"]
        for tower, prefix in (("vision", "visual."), ("text", "")):
            for i in range(2):
                layer = f"{tower}_model.encoder.layers.{i}"
                block = f"{prefix}transformer.resblocks.{i}"
                parts = [state[f"{layer}.self_attn.{x}_proj.{leaf}"] for x in "qkv"]
                found[f"{block}.attn.in_proj_{leaf}"] = torch.cat(parts)
                for ours, name in {
                    "self_attn.out_proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
                    "layer_norm1": "ln_1", "layer_norm2": "ln_2",
                }.items():  # fmt: skip
                    found[f"{block}.{name}.{leaf}"] = state[f"{layer}.{ours}.{leaf}"]
    return found
