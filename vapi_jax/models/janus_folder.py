"""A published folder of Janus into a directory of ours: sizes, tokenizer of prompts, and weights.

The directory is what `vapi_jax.models.conversion` describes, with the generator as "gpt" and the VQ
tokenizer inside as "vq", which has LlamaGen's names. Files that say what the weights are (tokenizer.json,
config.json and the like) are kept beside them, so that prompts find their tokenizer and an export
is a folder again.
"""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from vapi_jax.common.files import LARGEST_JSON, new_folder, read_json
from vapi_jax.models.architecture import Architecture, Shapes, infer_vq
from vapi_jax.models.conversion import SHARD_BYTES, check_pair, check_place, make_part, write_parts
from vapi_jax.models.janus import JanusConfig
from vapi_jax.models.janus_names import TOKENIZER, UNDERSTANDING, layout_of, to_deepseek
from vapi_jax.models.janus_prompts import PromptTokenizer
from vapi_jax.models.loading import CONFIG
from vapi_jax.weights.names import WeightsError
from vapi_jax.weights.tensors import TensorFile, open_tensors

FILES = {
    "config.json": "source_config.json",  # a directory of ours has a config.json of its own
    **{
        name: name
        for name in (
            "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
            "processor_config.json", "preprocessor_config.json", "generation_config.json",
            "chat_template.json", "chat_template.jinja",
        )
    },
}  # fmt: skip
"""What of a published folder is kept beside its weights -> its name there."""

LAYOUT, COMPLETE, KEPT = "janus_layout", "janus_complete", "janus_files"
"""In the manifest: the layout, whether the understanding side is there, and which `FILES`."""

_RELEASED = {(24, 2048): "Janus-Pro-1B's sizes", (30, 4096): "Janus-Pro-7B's sizes"}
_SHAPES = {  # name -> its two sizes
    "language_model.model.embed_tokens.weight": ("text_vocab_size", "dim"),
    "language_model.model.layers.0.mlp.gate_proj.weight": ("hidden_dim", "dim"),
    "language_model.model.layers.0.self_attn.k_proj.weight": ("kv_dim", "dim"),
    "gen_embed.weight": ("vocab_size", "image_embed_dim"),
    "gen_aligner.layers.0.weight": ("aligner_dim", "image_embed_dim"),
    "gen_head.output_mlp_projector.weight": ("gen_head_dim", "dim"),
}
_LAYER = "language_model.model.layers."
_GIVEN = {
    "vocab_size": "text_vocab_size", "hidden_size": "dim", "intermediate_size": "hidden_dim",
    "num_hidden_layers": "n_layer",
}  # fmt: skip
# What Hugging Face's Llama does that this one does not: setting -> the values that it may have.
_ONLY = {
    "hidden_act": ("silu",),
    "rope_scaling": (None,),
    "rope_type": ("default",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
}
_DEFAULT_HEADS = 32  # of a LlamaConfig that does not say, as Janus-Pro-7B's
_TOKENS = 576


def infer_janus(
    shapes: Shapes, settings: Mapping[str, Any], num_tokens: int, pad_id: int
) -> Architecture:
    """The generator that tensors of these names and shapes are.

    Args:
      shapes: DeepSeek's name -> shape.
      settings: of the language model, as in config.json; decides what shapes do not tell.
      num_tokens: of an image.
      pad_id: of the tokenizer.

    Raises:
      WeightsError: listing what is missing, or how the two contradict each other.
    """
    if absent := [name for name in _SHAPES if len(shapes.get(name, ())) != 2]:
        raise WeightsError(f"no Janus generator: {', '.join(absent)} missing")
    facts: dict[str, int] = {}
    for name, sizes in _SHAPES.items():
        facts |= dict(zip(sizes, shapes[name], strict=True))
    numbers = {
        name.removeprefix(_LAYER).partition(".")[0] for name in shapes if name.startswith(_LAYER)
    }
    facts["n_layer"] = len(numbers)
    # What transformers 5 has in place of rope_theta and rope_scaling.
    rope = settings.get("rope_parameters") or {}
    if not isinstance(rope, Mapping):
        raise WeightsError(f"config.json: rope_parameters is {rope!r}, where an object is wanted")
    settings = {**settings, **rope}
    heads = _number(settings, "num_attention_heads", _DEFAULT_HEADS)
    head_dim = _number(settings, "head_dim", facts["dim"] // heads)
    differences = [
        f"{name}: it says {settings[name]}, the tensors have {facts[ours]}"
        for name, ours in _GIVEN.items()
        if name in settings and settings[name] != facts[ours]
    ]
    differences += [
        f"{name}: {settings[name]!r} is not computed here, {allowed[0]!r} is"
        for name, allowed in _ONLY.items()
        if settings.get(name, allowed[0]) not in allowed
    ]
    kv_heads = facts["kv_dim"] // max(head_dim, 1)
    if head_dim * heads != facts["dim"] or kv_heads * head_dim != facts["kv_dim"]:
        differences.append(
            f"num_attention_heads: {heads} of {head_dim} do not make up width {facts['dim']} and keys of "
            f"width {facts['kv_dim']}"
        )
    elif _number(settings, "num_key_value_heads", kv_heads) != kv_heads:
        differences.append(
            f"num_key_value_heads: it says {settings['num_key_value_heads']}, the tensors have {kv_heads}"
        )
    if math.isqrt(num_tokens) ** 2 != num_tokens:
        differences.append(f"num_image_tokens: {num_tokens} do not fill a square")
    if differences:
        raise WeightsError(
            "config.json is not that of these tensors:\n" + "\n".join(f"  {d}" for d in differences)
        )
    fields: dict[str, Any] = {name: size for name, size in facts.items() if name != "kv_dim"}
    for name in ("aligner_dim", "gen_head_dim"):
        if fields[name] == fields["dim"]:
            fields[name] = None
    try:
        config = JanusConfig(
            **fields,
            n_head=heads,
            n_kv_head=None if kv_heads == heads else kv_heads,
            num_tokens=num_tokens,
            pad_id=pad_id,
            rope_base=_number(settings, "rope_theta", 10000.0),
            norm_eps=_number(settings, "rms_norm_eps", 1e-6),
        )
    except ValueError as error:
        raise WeightsError(f"config.json: {error}") from error
    return Architecture(_RELEASED.get((config.n_layer, config.dim), ""), config)


def convert_janus(
    src: Path,
    out: Path,
    *,
    understanding: bool = False,
    dtype: str | None = None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, Any]:
    """Converts a published folder of Janus into the directory `out`.

    Args:
      src: with weights (safetensors or .bin, whole or in shards), config.json, tokenizer.json and
        tokenizer_config.json, in DeepSeek's layout or that of transformers.
      out: must not exist, unless `overwrite`.
      understanding: carry the parts along that generate no image, so that an export is complete.
      dtype, overwrite, shard_bytes: as `vapi_jax.models.conversion.convert` has them.

    Returns:
      The manifest.

    Raises:
      WeightsError: a file is missing or refused, or they do not belong together.
    """
    check_place(out, overwrite)
    if not src.is_dir():
        raise WeightsError(f"{src} is no folder: the one with {CONFIG} and the weights is wanted")
    source = read_json(src / CONFIG, WeightsError)
    settings = source.get("language_config", source.get("text_config", {}))
    if not isinstance(settings, Mapping):
        raise WeightsError(f"{src / CONFIG}: its settings of the language model are no object")
    with open_tensors(src) as file:
        layout = layout_of(file.tensors, str(file.paths[0]))
        file = TensorFile(
            file.paths,
            {to_deepseek(name, layout): tensor for name, tensor in file.tensors.items()},
            file.ignored,
        )
        generator, tokenizer = _split(file, understanding)
        embedding = file.shapes.get("language_model.model.embed_tokens.weight", (0,))
        prompts = PromptTokenizer(src, embedding[0])
        found = infer_janus(generator.shapes, settings, _num_tokens(src, source), prompts.pad_id)
        parts = [make_part("gpt", generator, found)]
        parts.append(make_part("vq", tokenizer, infer_vq(tokenizer.shapes)))
        check_pair(parts)
        kept = {theirs: ours for theirs, ours in FILES.items() if _is_small(src / theirs)}
        more = {ours: partial(shutil.copyfile, src / theirs) for theirs, ours in kept.items()}
        sees = any(name.startswith(UNDERSTANDING[0]) for name in generator.tensors)
        facts = {LAYOUT: layout, COMPLETE: sees, KEPT: kept}
        with new_folder(out, replace=overwrite) as folder:
            return write_parts(folder, parts, more, dtype, shard_bytes, **facts)


def _split(file: TensorFile, understanding: bool) -> tuple[TensorFile, TensorFile]:
    """What belongs to the generator, and the tokenizer under LlamaGen's names."""
    left: Counter[str] = Counter()
    mine, codes = {}, {}
    for name, tensor in file.tensors.items():
        if name.startswith(TOKENIZER):
            codes[name.removeprefix(TOKENIZER)] = tensor
        elif understanding or not name.startswith(UNDERSTANDING):
            mine[name] = tensor
        else:
            left[next(start for start in UNDERSTANDING if name.startswith(start))] += 1
    ignored = tuple(f"{start}* ({count} tensors)" for start, count in left.items())
    return TensorFile(file.paths, mine, (*file.ignored, *ignored)), TensorFile(file.paths, codes)


def _num_tokens(src: Path, source: Mapping[str, Any]) -> int:
    """Tokens of an image: transformers keep them in config.json, DeepSeek beside it."""
    vision, beside = source.get("vision_config"), src / "processor_config.json"
    if not isinstance(vision, Mapping) or "num_image_tokens" not in vision:
        vision = read_json(beside, WeightsError) if beside.is_file() else {}
    return _number(vision, "num_image_tokens", _TOKENS)


def _number(settings: Mapping[str, Any], name: str, default: Any) -> Any:
    """A positive number, whole where its default is; null stands for the default."""
    value = settings.get(name)
    if value is None:
        return default
    kinds = int if isinstance(default, int) else (int, float)
    if not isinstance(value, kinds) or isinstance(value, bool) or not 0 < value < 1e9:
        raise WeightsError(f"config.json: {name} is {value!r}, where a positive number is wanted")
    return value


def _is_small(path: Path) -> bool:
    return path.is_file() and path.stat().st_size <= LARGEST_JSON
