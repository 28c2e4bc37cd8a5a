"""Sizes of the models that ship with the package.

Their recipes are no part of it, shapes do not tell heads, and the files say only how they were trained.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from vapi_jax.models.vq import VQConfig
from vapi_jax.weights.store import DEMO, SCENES


@dataclasses.dataclass(frozen=True)
class Shipped:
    """One model.

    Attributes:
      policy: arguments of `vapi_jax.models.policies.make_policy`.
      tokenizer: its sizes.
      image_size: pixels a side of the images that it was trained on.
    """

    policy: Mapping[str, Any]
    tokenizer: VQConfig
    image_size: int = 32


MODELS = {
    DEMO: Shipped(
        {
            "kind": "class",
            "dim": 192,
            "n_layer": 4,
            "n_head": 6,
            "n_kv_head": 2,
            "multiple_of": 64,
            "vocab_size": 1024,
            "block_size": 64,
            "num_classes": 12,
        },
        VQConfig(
            codebook_size=1024,
            ch=32,
            encoder_ch_mult=(1, 2, 3),
            decoder_ch_mult=(1, 2, 3),
            num_res_blocks=1,
            z_channels=96,
        ),
    ),
    SCENES: Shipped(
        {
            "kind": "text",
            "dim": 128,
            "n_layer": 4,
            "n_head": 4,
            "multiple_of": 64,
            "cls_token_num": 12,
            "caption_dim": 64,
            "token_dropout_p": 0.0,
            "resid_dropout_p": 0.0,
            "ffn_dropout_p": 0.0,
            "initializer_range": 0.09,
            "vocab_size": 128,
            "block_size": 64,
        },
        VQConfig(
            codebook_size=128,
            codebook_embed_dim=8,
            ch=16,
            groupnorm_groups=8,
            encoder_ch_mult=(1, 2, 4),
            decoder_ch_mult=(1, 2, 4),
            num_res_blocks=1,
            z_channels=64,
            encoder_patches=True,
        ),
    ),
}
"""By name, as `--ckpt` and `init` take it."""
