"""The two layouts in which Janus is published: DeepSeek's own, and that of transformers' port.

All else here speaks DeepSeek's names. Those of transformers are renamed on their way in and back on
their way out; the tensors are the same in both, but for the understanding side, which is carried
unseen and therefore stays in the layout that it came in.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from vapi_jax.weights.names import WeightsError

DEEPSEEK, TRANSFORMERS = "deepseek", "transformers"

TOKENIZER = "gen_vision_model."
"""Before every name of the VQ tokenizer, whose own names are LlamaGen's."""

UNDERSTANDING = ("vision_model.", "aligner.", "language_model.lm_head.")
"""What the names of parts that generate no image begin with."""

_HALVES = (("encoder", "down"), ("decoder", "up"))
_MIDDLE = ("block_1", "attn_1", "block_2")
# (transformers' name, DeepSeek's); each {} is any text, the same on both sides. First match wins.
_PAIRS: tuple[tuple[str, str], ...] = (
    ("model.language_model.{}", "language_model.model.{}"),
    ("lm_head.{}", "language_model.lm_head.{}"),
    ("model.generation_embeddings.{}", "gen_embed.{}"),
    ("model.generation_aligner.fc1.{}", "gen_aligner.layers.0.{}"),
    ("model.generation_aligner.hidden_layers.0.{}", "gen_aligner.layers.2.{}"),
    ("model.generation_head.proj_out.{}", "gen_head.output_mlp_projector.{}"),
    ("model.generation_head.vision_head.{}", "gen_head.vision_head.{}"),
    *(
        (f"model.vqmodel.{half}.{way}.{{}}.{theirs}.{{}}", f"{TOKENIZER}{half}.conv_blocks.{{}}.{ours}.{{}}")
        for half, way in _HALVES
        for theirs, ours in (("block", "res"), ("attn", "attn"), (f"{way}sample", f"{way}sample"))
    ),
    *(
        (f"model.vqmodel.{half}.mid.{name}.{{}}", f"{TOKENIZER}{half}.mid.{i}.{{}}")
        for half, _ in _HALVES
        for i, name in enumerate(_MIDDLE)
    ),
    ("model.vqmodel.{}", TOKENIZER + "{}"),
    ("model.vision_model.{}", "vision_model.{}"),
    ("model.aligner.{}", "aligner.{}"),
)  # fmt: skip


def layout_of(names: Iterable[str], where: str) -> str:
    """The layout in which tensors of these names are published.

    Raises:
      WeightsError: they are no Janus.
    """
    names = list(names)
    for layout, name in (
        (DEEPSEEK, "gen_head.output_mlp_projector.weight"),
        (TRANSFORMERS, "model.generation_head.proj_out.weight"),
    ):
        if name in names:
            return layout
    raise WeightsError(
        f"{where} holds no Janus: a tensor gen_head.output_mlp_projector.weight, or in transformers' "
        f"layout model.generation_head.proj_out.weight, is wanted; it has {', '.join(names[:4])}, ..."
    )


def to_deepseek(name: str, layout: str) -> str:
    """A name of a layout as DeepSeek has it; one that the table does not know stays."""
    return name if layout == DEEPSEEK else _renamed(name, *zip(*_PAIRS, strict=True))


def from_deepseek(name: str, layout: str) -> str:
    """The inverse of `to_deepseek`."""
    return name if layout == DEEPSEEK else _renamed(name, *tuple(zip(*_PAIRS, strict=True))[::-1])


def _renamed(name: str, patterns: Iterable[str], templates: Iterable[str]) -> str:
    for pattern, template in zip(patterns, templates, strict=True):
        if found := re.fullmatch(re.escape(pattern).replace(r"\{\}", "(.+)"), name):
            return template.format(*found.groups())
    return name
