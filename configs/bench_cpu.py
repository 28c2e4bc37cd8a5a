"""A step that suits a CPU, to compare ways of computing it: what docs/performance.md measures.

    python -m vapi_jax.bench --config=configs/bench_cpu.py --plain --steps=12
    python -m vapi_jax.bench --config=configs/bench_cpu.py --sweep --plain --steps=3 --docs=docs

One device; 16 images of 32x32 pixels and G = 8, 64 tokens of 1024 codes, a generator of 6 layers and
width 256, LPIPS with VGG. Random weights: speed does not depend on their values. On 2 CPU cores the two
commands take 2 and 5 minutes; the figures to expect are in docs/performance.md.

With a tokenizer of these sizes it also trains:

    python -m vapi_jax.main --config=configs/bench_cpu.py --workdir=runs/bench_cpu \\
        --config.init.vq=runs/tokenizer

":tiny" runs the same path with the demo's models in seconds.
"""

from ml_collections import ConfigDict

from vapi_jax.common.recipes import load_recipe


def get_config(variant: str = "") -> ConfigDict:
    """The recipe; variant "tiny"."""
    config = ConfigDict(
        {
            "name": "bench_cpu",
            "method": "vapi",
            "preset": "paper",
            "seed": 0,
            "steps": 20,
            "batch_size": 16,
            "cpu_devices": 1,
            "mesh": {"data": 1, "fsdp": 1},
            "data": {"name": "photos", "image_size": 32},
            "tokenizer": {
                "codebook_size": 1024,
                "ch": 32,
                "encoder_ch_mult": (1, 2, 2),
                "decoder_ch_mult": (1, 2, 2),
                "z_channels": 64,
            },
            "policy": {"kind": "class", "dim": 256, "n_layer": 6, "n_head": 8},
            "init": {"vq": "", "gpt": ""},
            "vapi": {"group_size": 8, "noise_rate": 0.0, "ce_weight": 0.1},
            "optimizer": {"learning_rate": 1e-6, "weight_decay": 1e-4},
            "eval": {"every": 20, "images": 16},
        }
    )
    if variant == "tiny":
        config.update({"steps": 3, "batch_size": 8, "cpu_devices": 8})
        config.mesh.update({"data": 2, "fsdp": 4})
        demo = load_recipe(__file__, "c2i_demo").get_config()
        config.tokenizer = demo.tokenizer
        config.policy = demo.policy
        config.init = demo.init
        config.vapi.update({"group_size": 4})
        config.eval.update({"every": 2, "images": 8})
    elif variant:
        raise ValueError(f"configs/bench_cpu.py:{variant}: known variants are '' and 'tiny'")
    return config
