"""What model a file of LlamaGen weights holds, told by the names and shapes of its tensors.

Names and shapes give everything but the number of heads, which the table of released sizes knows,
and the grid, which only the old `freqs_cis` buffer or the file's name tells. What is still open, or
differs from the released models, comes from a JSON file with LlamaGen's argument names.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from vapi_jax.models.janus import JanusConfig
from vapi_jax.models.llama import LLAMA_SIZES, LlamaConfig
from vapi_jax.models.vq import VQ_PRESETS, VQConfig
from vapi_jax.weights.names import WeightsError

Shapes = Mapping[str, tuple[int, ...]]
ModelConfig = LlamaConfig | JanusConfig | VQConfig

PATCH = 16
"""Pixels per token of the released generators' tokenizer, along each side."""

_GPT_NAMES = (
    "tok_embeddings.weight",
    "layers.0.attention.wqkv.weight",
    "layers.0.feed_forward.w1.weight",
)
_TYPE_CAUSES = {
    "t2i": "this is a t2i file: use --t2i, or policy.kind='text' in a configuration",
    "c2i": "this is a c2i file: leave --t2i out, or policy.kind='class' in a configuration",
}
_LAYER = re.compile(r"layers\.(\d+)\.")
# Released text-conditional files; nothing but their names tells the first stage from the second.
_STAGE = re.compile(r"t2i_XL_stage([12])_(256|512)")
_SIDE_IN_NAME = re.compile(r"(?<!\d)(256|384|512)(?!\d)")
# Arguments that describe a run and not the model. Keys that begin with "_" are comments.
_NOT_THE_MODEL = ("max_batch_size", "max_seq_len", "codebook_show_usage")
# Of a tokenizer; the one is fixed here, the other follows from the widths.
_CHECKED_VQ = {
    "groupnorm_eps": lambda config: 1e-6,
    "downsample_factor": lambda c: c.downsample_factor,
}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A model by its released name (or "" for none of them) and its hyper-parameters."""

    name: str
    config: ModelConfig

    def to_json(self) -> dict[str, Any]:
        """As it is kept in a converted directory's config.json."""
        return {"name": self.name, **architectural(self.config)}

    def describe(self) -> str:
        """One line for people."""
        c = self.config
        if isinstance(c, VQConfig):
            return (
                f"{self.name or 'a VQ tokenizer'}: {c.codebook_size} codes of width "
                f"{c.codebook_embed_dim}, 1 token for {c.downsample_factor}x{c.downsample_factor} pixels"
            )
        if isinstance(c, JanusConfig):
            side = math.isqrt(c.num_tokens)
            return (
                f"{self.name or 'a Janus'}: {c.n_layer} layers, {c.n_head} heads, width {c.dim}, gen_head "
                f"{c.gen_head_dim or c.dim}, {c.text_vocab_size} words, {c.vocab_size} codes, grid "
                f"{side}x{side}, padding {c.pad_id}"
            )
        kind = (
            f"{c.num_classes} classes"
            if c.model_type == "c2i"
            else f"{c.cls_token_num} text tokens of width {c.caption_dim}"
        )
        side = math.isqrt(c.block_size)
        return (
            f"{self.name or 'a GPT'}, {c.model_type} ({kind}): {c.n_layer} layers, {c.n_head} heads, "
            f"width {c.dim}, {c.vocab_size} codes, grid {side}x{side}"
        )


# How to compute or to train, which no file of weights says.
_NOT_ARCHITECTURE = frozenset(
    {
        "dtype", "encoder_dtype", "decoder_dtype", "remat", "attention", "initializer_range",
        "token_dropout_p", "attn_dropout_p", "resid_dropout_p", "ffn_dropout_p", "drop_path_rate",
        "lora", "commit_loss_beta", "entropy_loss_ratio", "entropy_temperature", "dropout_p",
    }
)  # fmt: skip


def architectural(config: ModelConfig) -> dict[str, Any]:
    """The fields of a configuration that decide what its weights mean."""
    fields = dataclasses.asdict(config)
    return {name: value for name, value in fields.items() if name not in _NOT_ARCHITECTURE}


def disagreements(stored: Mapping[str, Any], config: ModelConfig) -> list[str]:
    """How what a converted directory says of its weights differs from what is asked for."""
    # What was stored before there was such an encoder does not name it.
    asked, have = architectural(config), {"encoder_patches": False, **stored}
    if isinstance(config, LlamaConfig):
        have["hidden_dim"] = from_json(stored, LlamaConfig).hidden_dim
        asked["hidden_dim"] = config.hidden_dim
        for name in ("multiple_of", "ffn_dim_multiplier"):  # several give the same width
            del asked[name]
    return [
        f"{name}: it has {have.get(name)}{_pixels(name, have.get(name))}, the configuration asks for "
        f"{value}{_pixels(name, value)}"
        for name, value in json.loads(json.dumps(asked)).items()
        if have.get(name) != value
    ]


def _pixels(name: str, value: Any) -> str:
    known = name == "block_size" and isinstance(value, int)
    return f" ({math.isqrt(value) * PATCH} px)" if known else ""


def policy_kind(stored: Mapping[str, Any]) -> str:
    """The kind of generator, a name of `POLICIES`, whose architecture `Architecture.to_json` stored."""
    if "gen_head_dim" in stored:
        return "janus"
    return "class" if stored.get("model_type") == "c2i" else "text"


def from_json(stored: Mapping[str, Any], kind: type) -> Any:
    """The configuration that `Architecture.to_json` stored, of class `kind`.

    Raises:
      WeightsError: if it is not that of such a model.
    """
    try:
        return kind(**{name: value for name, value in stored.items() if name != "name"})
    except (TypeError, ValueError) as error:
        raise WeightsError(f"a stored architecture is no {kind.__name__}: {error}") from error


# --- generators -----------------------------------------------------------------------------------


def gpt_facts(shapes: Shapes, file_name: str = "") -> dict[str, Any]:
    """What names and shapes alone say about a generator, as fields of `LlamaConfig`.

    `block_size` is there where a `freqs_cis` buffer or the file's name tells, `n_kv_head` is not:
    "kv_dim", the width of all keys of a position, stands for it, and "hidden_dim" for the two
    arguments that it follows from.

    Raises:
      WeightsError: if these are no weights of a LlamaGen generator.
    """
    layers = [int(found.group(1)) for name in shapes if (found := _LAYER.match(name))]
    absent = [name for name in _GPT_NAMES if len(shapes.get(name, ())) != 2]
    if absent or not layers:
        raise WeightsError(
            f"no LlamaGen generator: {', '.join(absent) or 'its layers'} missing.{_what_it_is(shapes)}"
        )
    (vocab, dim), (qkv, _), (hidden, _) = (shapes[name] for name in _GPT_NAMES)
    facts: dict[str, Any] = {
        "n_layer": max(layers) + 1,
        "dim": dim,
        "vocab_size": vocab,
        "hidden_dim": hidden,
        "kv_dim": (qkv - dim) // 2,
    }
    table, caption = "cls_embedding.embedding_table.weight", "cls_embedding.cap_proj.fc1.weight"
    uncond = "cls_embedding.uncond_embedding"
    if len(shapes.get(table, ())) == 2:
        facts |= {"model_type": "c2i", "cls_token_num": 1, "class_rows": shapes[table][0]}
    elif len(shapes.get(caption, ())) == 2 and len(shapes.get(uncond, ())) == 2:
        facts |= {"model_type": "t2i", "cls_token_num": shapes[uncond][0]}
        facts |= {"caption_dim": shapes[caption][1]}
    else:
        raise WeightsError(f"no LlamaGen generator: neither {table} nor {caption} with {uncond}")
    if side := _SIDE_IN_NAME.search(file_name):
        facts["block_size"] = (int(side.group(1)) // PATCH) ** 2
    if "freqs_cis" in shapes:
        facts["block_size"] = shapes["freqs_cis"][0] - facts["cls_token_num"]
    return facts


def _what_it_is(shapes: Shapes) -> str:
    if "quantize.embedding.weight" in shapes:
        return " These are weights of a VQ tokenizer: give them as --vq"
    if "gen_head.output_mlp_projector.weight" in shapes:
        return " These look like Janus weights: convert their folder with python -m vapi_jax.convert janus"
    return f" It has {', '.join(list(shapes)[:4])}, ..."


def infer_gpt(
    shapes: Shapes,
    args: Mapping[str, Any] | None = None,
    *,
    file_name: str = "",
    image_size: int | None = None,
    t2i: bool = False,
) -> Architecture:
    """The generator that a file holds.

    Args:
      shapes: reference name -> shape.
      args: LlamaGen's arguments, where the file is none of the released sizes.
      file_name: released names tell the image size ("c2i_XXL_384.pt").
      image_size: pixels a side it was trained for; decides over the name.
      t2i: the caller expects a text-conditional file.

    Raises:
      WeightsError: listing what contradicts or is still unknown, with what to give.
    """
    facts = gpt_facts(shapes, file_name)
    given = _known_args(args or {}, LlamaConfig)
    if t2i and "model_type" not in given:
        given["model_type"] = "t2i"
    stage = _STAGE.search(file_name)
    if stage and image_size not in (None, int(stage[2])):
        raise WeightsError(
            f"--image-size {image_size}: {file_name} is of stage {stage[1]}, trained on {stage[2]} px, and "
            f"draws crops at any other size; leave --image-size out, or take the other stage's file"
        )
    if image_size is not None and "block_size" not in given:
        given["block_size"] = (image_size // PATCH) ** 2
    if given.get("model_type", facts["model_type"]) != facts["model_type"]:
        raise WeightsError(_TYPE_CAUSES[facts["model_type"]])
    # The name of a file is a hint; a table of rotations in it is a fact.
    if "block_size" in given and "freqs_cis" not in shapes:
        facts.pop("block_size", None)
    name = next(
        (
            name
            for name, size in LLAMA_SIZES.items()
            if (size["n_layer"], size["dim"]) == (facts["n_layer"], facts["dim"])
        ),
        "",
    )
    fields: dict[str, Any] = {**LLAMA_SIZES.get(name, {}), **given}
    if "n_head" not in fields:
        raise WeightsError(
            f"{facts['n_layer']} layers of width {facts['dim']} are none of the released sizes "
            f"({', '.join(LLAMA_SIZES)}), and the number of heads cannot be told from shapes: give "
            "LlamaGen's arguments in a JSON file, --args FILE.json"
        )
    if "block_size" not in fields and "block_size" not in facts:
        raise WeightsError(
            "the grid cannot be told from this file (no freqs_cis in it, no 256, 384 or 512 in its "
            "name): give --image-size, or block_size in --args FILE.json"
        )
    fields = _complete(fields, facts)
    try:
        config = LlamaConfig(**fields)
    except (TypeError, ValueError) as error:
        raise WeightsError(f"arguments of the generator: {error}") from error
    differences = gpt_differences(facts, config)
    if differences:
        raise WeightsError(
            "the file is not what its arguments say:\n" + "\n".join(f"  {d}" for d in differences)
        )
    return Architecture(name, config)


def _complete(fields: dict[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """The given fields, and those that the facts decide where none is given."""
    direct = ("n_layer", "dim", "vocab_size", "model_type", "cls_token_num", "caption_dim")
    done = {name: facts[name] for name in (*direct, "block_size") if name in facts} | fields
    if "class_rows" in facts:
        without = done.get("class_dropout_prob", 0.1) <= 0
        done.setdefault("num_classes", facts["class_rows"] - (not without))
    head_dim = done["dim"] // done["n_head"]
    if "n_kv_head" not in fields and head_dim and facts["kv_dim"] % head_dim == 0:
        heads = facts["kv_dim"] // head_dim
        done["n_kv_head"] = None if heads == done["n_head"] else heads
    if "multiple_of" not in fields and "ffn_dim_multiplier" not in fields:
        exact = int(8 * done["dim"] / 3)
        # The release rounds the width of the feed-forward up to a multiple of 256.
        steps = (2**i for i in range(8, -1, -1))
        fitting = (m for m in steps if -(-exact // m) * m == facts["hidden_dim"])
        done["multiple_of"] = next(fitting, 256)
    return done


def gpt_differences(facts: Mapping[str, Any], config: LlamaConfig) -> list[str]:
    """Each way in which a file is not what a configuration asks for, with the likely cause."""
    asked = {
        **architectural(config),
        "hidden_dim": config.hidden_dim,
        "kv_dim": (config.n_kv_head or config.n_head) * (config.dim // config.n_head),
        "class_rows": config.num_classes + (config.class_dropout_prob > 0),
    }
    if facts["model_type"] != config.model_type:
        return [_TYPE_CAUSES[facts["model_type"]]]
    differences = []
    for name, value in facts.items():
        if asked[name] == value:
            continue
        if name == "block_size":
            here, there = math.isqrt(value), math.isqrt(asked[name])
            differences.append(
                f"grid {here} for {here * PATCH} px, you asked for {there * PATCH} (grid {there})"
            )
        else:
            differences.append(f"{name}: the file has {value}, you asked for {asked[name]}")
    return differences


# --- tokenizers -----------------------------------------------------------------------------------


def vq_facts(shapes: Shapes) -> dict[str, Any]:
    """What names and shapes say about a tokenizer: fields of `VQConfig`.

    Raises:
      WeightsError: if these are no weights of a LlamaGen tokenizer.
    """
    codes, first = shapes.get("quantize.embedding.weight"), shapes.get("encoder.conv_in.weight")
    latent = shapes.get("quant_conv.weight")
    if codes is None or first is None or latent is None or len(codes) != 2 or len(latent) != 4:
        other = " These are weights of a generator: give them as --gpt"
        raise WeightsError(
            "no LlamaGen tokenizer: quantize.embedding.weight, encoder.conv_in.weight and "
            f"quant_conv.weight are wanted.{other if 'tok_embeddings.weight' in shapes else ''}"
        )

    def widths(half: str) -> list[int]:
        found = {
            int(match.group(1)): shape[0]
            for name, shape in shapes.items()
            if (match := re.fullmatch(rf"{half}\.conv_blocks\.(\d+)\.res\.0\.conv1\.weight", name))
        }
        return [found[level] for level in sorted(found)]

    ch = first[0]
    blocks = [
        name
        for name in shapes
        if re.fullmatch(r"encoder\.conv_blocks\.0\.res\.\d+\.conv1\.weight", name)
    ]
    return {
        "codebook_size": codes[0],
        "codebook_embed_dim": codes[1],
        "ch": ch,
        "z_channels": latent[1],
        "encoder_ch_mult": tuple(width // ch for width in widths("encoder")),
        # The decoder lists its levels coarsest first.
        "decoder_ch_mult": tuple(width // ch for width in reversed(widths("decoder"))),
        "num_res_blocks": len(blocks),
    }


def infer_vq(shapes: Shapes, args: Mapping[str, Any] | None = None) -> Architecture:
    """The tokenizer that a file holds; `args` are LlamaGen's, where it is none of the released.

    Raises:
      WeightsError: if the file is no tokenizer, or is not what the arguments say.
    """
    facts = vq_facts(shapes)
    given = _known_args(args or {}, VQConfig, tuple(_CHECKED_VQ))
    checks = {name: given.pop(name) for name in _CHECKED_VQ if name in given}
    try:
        config = VQConfig(**{**facts, **given})
    except (TypeError, ValueError) as error:
        raise WeightsError(f"arguments of the tokenizer: {error}") from error
    differences = vq_differences(facts, config)
    differences += [
        f"{name}: {value} is asked for, these weights have {_CHECKED_VQ[name](config)}"
        for name, value in checks.items()
        if value != _CHECKED_VQ[name](config)
    ]
    if differences:
        raise WeightsError(
            "the file is not what its arguments say:\n" + "\n".join(f"  {d}" for d in differences)
        )
    fields = architectural(config)
    names = (name for name, preset in VQ_PRESETS.items() if architectural(preset) == fields)
    return Architecture(next(names, ""), config)


def vq_differences(facts: Mapping[str, Any], config: VQConfig) -> list[str]:
    """Each way in which a file is not what a configuration asks for."""
    asked = dataclasses.asdict(config)
    return [
        f"{name}: the file has {value}, you asked for {asked[name]}"
        for name, value in facts.items()
        if asked[name] != value
    ]


# --- arguments ------------------------------------------------------------------------------------


def _known_args(args: Mapping[str, Any], kind: type, more: Sequence[str] = ()) -> dict[str, Any]:
    """The arguments that describe the model; raises WeightsError at a name that nothing knows."""
    known = [field.name for field in dataclasses.fields(kind)] + list(more)
    found = {}
    for name, value in args.items():
        if name in known:
            found[name] = tuple(value) if isinstance(value, list) else value
        elif name not in _NOT_THE_MODEL and not name.startswith("_"):
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
            raise WeightsError(f"argument {name!r}: nothing reads it; {hint}")
    return found
