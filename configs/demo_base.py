"""The demo's base generator: next-token prediction on crops of bundled photographs (method "base").

    python -m vapi_jax.main --config=configs/demo_base.py --workdir=/tmp/demo_base \\
        --config.init.vq=/tmp/demo_tokenizer/weights/tokenizer.safetensors

Without the second flag it builds on the shipped tokenizer. 29 minutes on 2 CPU cores; cross-entropy 3.0
nats per token on training crops, 5.1 on strips of the photographs that it never sees. Writes
weights/policy.safetensors.
"""

from ml_collections import ConfigDict

from vapi_jax.common.recipes import load_recipe


def policy() -> ConfigDict:
    """Sizes of the demo's generator; vocabulary, grid and classes follow tokenizer and data."""
    return ConfigDict(
        {"kind": "class", "dim": 192, "n_layer": 4, "n_head": 6, "n_kv_head": 2, "multiple_of": 64}
    )


def get_config(variant: str = "") -> ConfigDict:
    """The recipe; variant "tiny" runs the same path in seconds."""
    config = ConfigDict(
        {
            "name": "demo_base",
            "method": "base",
            "seed": 1,
            "steps": 4000,
            "batch_size": 32,
            "log_every": 10,
            "base": {"label_dropout": 0.1},
            "data": {"name": "photos", "image_size": 32},
            "tokenizer": load_recipe(__file__, "demo_tokenizer").tokenizer(),
            "policy": policy(),
            "init": {"vq": "demo"},
            "optimizer": {
                "learning_rate": 1.5e-3,
                "schedule": "cosine",
                "warmup_steps": 100,
                "weight_decay": 0.05,
                "b2": 0.95,
                "max_grad_norm": 1.0,
            },
            "eval": {"every": 250, "images": 128},
            "checkpoint": {"every": 500},
        }
    )
    if variant == "tiny":
        config.update({"steps": 4, "batch_size": 8, "log_every": 1})
        config.policy.update({"dim": 32, "n_layer": 2, "n_head": 2, "n_kv_head": 1})
        config.eval.update({"every": 2, "images": 8})
        config.checkpoint.update({"every": 2})
    elif variant:
        raise ValueError(f"configs/demo_base.py:{variant}: known variants are '' and 'tiny'")
    return config
