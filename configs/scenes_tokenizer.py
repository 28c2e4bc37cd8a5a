"""The tokenizer of scenes, trained from scratch on drawn scenes (method "tokenizer").

    python -m vapi_jax.main --config=configs/scenes_tokenizer.py --workdir=/tmp/scenes_tokenizer

32x32 pixels to 8x8 tokens of 128 codes, by pixels alone; 15 minutes on one CPU core; 40.3 dB on held-out
scenes. The detector of drawn shapes finds 600 of 600 reconstructed test scenes right by GenEval's rules.
Each token is encoded from its own pixels (`encoder_patches`): an encoder of the whole picture tells the
tokens of the background what else is there, and a generator that learns by teacher forcing reads it there
and not in the caption.
Writes weights/tokenizer.safetensors, from which the shipped half-precision file is made by
`python launch/ship.py /tmp/scenes_tokenizer`.
"""

from ml_collections import ConfigDict


def tokenizer() -> ConfigDict:
    """Sizes of the tokenizer."""
    return ConfigDict(
        {
            "codebook_size": 128,
            "codebook_embed_dim": 8,
            "ch": 16,
            "groupnorm_groups": 8,
            "encoder_ch_mult": (1, 2, 4),
            "decoder_ch_mult": (1, 2, 4),
            "num_res_blocks": 1,
            "z_channels": 64,
            "encoder_patches": True,
        }
    )


def get_config(variant: str = "") -> ConfigDict:
    """The recipe; variant "tiny" runs the same path in seconds."""
    config = ConfigDict(
        {
            "name": "scenes_tokenizer",
            "method": "tokenizer",
            "seed": 0,
            "steps": 3000,
            "batch_size": 16,
            "log_every": 10,
            "data": {"name": "scenes", "image_size": 32, "flip": False},
            "tokenizer": tokenizer(),
            "tokenizer_training": {
                "loss": {"adversarial": 0.0, "perceptual": 0.0},
                "restart_below": 0.1,
                "restart_every": 25,
                "restart_until": 0.4,
            },
            "optimizer": {
                "learning_rate": 2e-3,
                "schedule": "cosine",
                "warmup_steps": 50,
                "weight_decay": 1e-4,
                "b2": 0.99,
                "max_grad_norm": 1.0,
            },
            "eval": {"every": 1000, "images": 128},
            "checkpoint": {"every": 250},
        }
    )
    if variant == "tiny":
        config.update({"steps": 4, "batch_size": 8, "log_every": 1})
        config.tokenizer.update({"codebook_size": 64, "encoder_ch_mult": (1, 1, 1)})
        config.tokenizer.update({"decoder_ch_mult": (1, 1, 1), "z_channels": 16})
        config.tokenizer_training.update({"restart_every": 2})
        config.eval.update({"every": 2, "images": 8})
        config.checkpoint.update({"every": 2})
    elif variant:
        raise ValueError(f"configs/scenes_tokenizer.py:{variant}: known variants are '' and 'tiny'")
    return config
