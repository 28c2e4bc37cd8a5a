"""A base generator of drawn scenes and its text encoder, trained together (method "text_base").

    python -m vapi_jax.main --config=configs/scenes_base.py --workdir=/tmp/scenes_base \\
        --config.init.vq=/tmp/scenes_tokenizer/weights/tokenizer.safetensors

The encoder knows the words of the captions and no others: its sizes and its tokenizer ship with the package
(launch/scene_words.py writes them). Without the second flag it builds on the shipped tokenizer. Writes
weights/policy.safetensors and weights/encoder.safetensors, from which the shipped half-precision files are
made by `python launch/ship.py /tmp/scenes_base`.
":tiny" takes the photographs' tokenizer. 1 h 31 min on one CPU core beside other work; cross-entropy 0.168
nats per token on scenes of held-out combinations. docs/text.md has what it draws right.
"""

from pathlib import Path

from ml_collections import ConfigDict

import vapi_jax
from vapi_jax.common.recipes import load_recipe

WORDS = Path(vapi_jax.__file__).parent / "assets" / "scenes_encoder"


def policy() -> ConfigDict:
    """Sizes of the generator; vocabulary and grid follow tokenizer and data."""
    return ConfigDict(
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
            # 1/sqrt(dim): with LlamaGen's 0.02 for 1024 and more, captions go unheard for thousands of steps.
            "initializer_range": 0.09,
        }
    )


def get_config(variant: str = "") -> ConfigDict:
    """The recipe; variant "tiny" runs the same path in seconds."""
    config = ConfigDict(
        {
            "name": "scenes_base",
            "method": "text_base",
            "seed": 1,
            "steps": 20000,
            "batch_size": 16,
            "log_every": 10,
            "text_base": {"label_dropout": 0.1, "encoder": str(WORDS)},
            "data": {
                "name": "scenes",
                "image_size": 32,
                "flip": False,
                "options": {"images": 400_000},
            },
            "tokenizer": load_recipe(__file__, "scenes_tokenizer").tokenizer(),
            "policy": policy(),
            # The captions of scenes need no cleaning.
            "condition": {"name": "caption", "options": {"clean": False}},
            "init": {"vq": "scenes"},
            "optimizer": {
                "learning_rate": 1e-3,  # at 3e-3 colours stay unheard
                "schedule": "cosine",
                "warmup_steps": 100,
                "weight_decay": 0.02,
                "b2": 0.95,
                "max_grad_norm": 1.0,
            },
            "eval": {"every": 500, "images": 128},
            "checkpoint": {"every": 250},
        }
    )
    if variant == "tiny":
        config.update({"steps": 4, "batch_size": 8, "log_every": 1})
        config.tokenizer = load_recipe(__file__, "demo_tokenizer").tokenizer()
        config.init = ConfigDict({"vq": "demo"})
        config.policy.update({"dim": 32, "n_layer": 2, "n_head": 2})
        config.eval.update({"every": 2, "images": 8})
        config.checkpoint.update({"every": 2})
    elif variant:
        raise ValueError(f"configs/scenes_base.py:{variant}: known variants are '' and 'tiny'")
    return config
