"""The demo's tokenizer, trained from scratch on crops of bundled photographs (method "tokenizer").

    python -m vapi_jax.main --config=configs/demo_tokenizer.py --workdir=/tmp/demo_tokenizer

32x32 pixels to 8x8 tokens of 1024 codes; 27 minutes on 2 CPU cores; 22.3 dB and LPIPS 0.236 on
held-out crops. Writes weights/tokenizer.safetensors, from which the
shipped half-precision file is made by

    python launch/ship.py /tmp/demo_tokenizer /tmp/demo_base
"""

from ml_collections import ConfigDict


def tokenizer() -> ConfigDict:
    """Sizes of the demo's tokenizer."""
    return ConfigDict(
        {
            "codebook_size": 1024,
            "codebook_embed_dim": 8,
            "ch": 32,
            "encoder_ch_mult": (1, 2, 3),
            "decoder_ch_mult": (1, 2, 3),
            "num_res_blocks": 1,
            "z_channels": 96,
        }
    )


def get_config(variant: str = "") -> ConfigDict:
    """The recipe; variant "tiny" runs the same path in seconds."""
    config = ConfigDict(
        {
            "name": "demo_tokenizer",
            "method": "tokenizer",
            "seed": 0,
            "steps": 3000,
            "batch_size": 16,
            "log_every": 10,
            "data": {"name": "photos", "image_size": 32},
            "tokenizer": tokenizer(),
            "tokenizer_training": {
                "loss": {"adversarial": 0.05},
                "discriminator_start": 1500,
                "discriminator_ndf": 32,
                "discriminator_layers": 2,
                "restart_below": 0.03,
                "restart_every": 25,
                "restart_until": 0.6,
            },
            "optimizer": {
                "learning_rate": 1e-3,
                "schedule": "cosine",
                "warmup_steps": 50,
                "weight_decay": 1e-4,
                "b2": 0.99,
                "max_grad_norm": 1.0,
            },
            "eval": {"every": 250, "images": 128},
            "checkpoint": {"every": 250},
        }
    )
    if variant == "tiny":
        config.update({"steps": 4, "batch_size": 8, "log_every": 1})
        config.tokenizer.update({"codebook_size": 64, "encoder_ch_mult": (1, 1, 1)})
        config.tokenizer.update({"decoder_ch_mult": (1, 1, 1), "z_channels": 32})
        config.tokenizer_training.update({"discriminator_start": 2, "discriminator_ndf": 8})
        config.tokenizer_training.update({"restart_every": 2})
        config.eval.update({"every": 2, "images": 8})
        config.checkpoint.update({"every": 2})
    elif variant:
        raise ValueError(f"configs/demo_tokenizer.py:{variant}: known variants are '' and 'tiny'")
    return config
