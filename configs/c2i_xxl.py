"""The paper's class-conditional recipe on LlamaGen-XXL (1.4B), ImageNet at 384 px (Table 7).

    python -m vapi_jax.main --config=configs/c2i_xxl.py --workdir=runs/c2i_xxl \\
        --config.data.path=DIR_WITH_PREPARED_TFDS

Hardware: 8 x A100 80 GB. Time: 25 minutes there with the authors' code; ours not measured yet.
Published: FID 14.36 -> 7.65, IS 86.55 -> 116.70 (50k samples, no guidance); 2.37 -> 2.28 and
252.16 -> 273.53 with guidance 1.75 (Table 2). Not run with this code yet.

100 steps of 128 images see 12.8k images, 1 % of ImageNet-1k. `--config.preset=reference` switches
to what the authors' released code does instead of the paper; see the README for the differences.
As it is it fits one H100, and eight with room to spare. ":h100x1", ":h100x8" and ":a100x8" compute
the same with the settings of the least predicted time that the compiler fits there (docs/targets.md);
they have not been timed.
":tiny" runs the same path with the demo's models on photographs in seconds on a CPU.
"""

from ml_collections import ConfigDict

from vapi_jax.common.recipes import load_recipe

TARGETS = {
    "h100x1": {"microbatch_size": 32, "policy": {"remat": "dots"}},
    "h100x8": {"policy": {"remat": "none"}},
    "a100x8": {"policy": {"remat": "none"}},
}
"""Variant -> how the step runs on these devices; it computes the same."""


def get_config(variant: str = "") -> ConfigDict:
    """The recipe; variants "tiny" and those of `TARGETS`."""
    config = ConfigDict(
        {
            "name": "c2i_xxl",
            "method": "vapi",
            "preset": "paper",
            "seed": 0,
            "steps": 100,
            "batch_size": 128,
            "mesh": {"data": 1, "fsdp": -1},
            "data": {
                "name": "tfds",
                "dataset": "imagenet2012",
                "path": "",
                "image_size": 384,
                "crop": "center",
                "num_threads": 16,
                "prefetch": 16,
            },
            "tokenizer": {"decoder_dtype": "bfloat16"},
            "policy": {
                "kind": "class",
                "size": "GPT-XXL",
                "num_classes": 1000,
                "dtype": "bfloat16",
                "remat": "full",
            },
            "init": {
                "vq": "weights/c2i_xxl",
                "gpt": "weights/c2i_xxl",
            },
            "vapi": {
                "group_size": 8,
                "noise_rate": 0.0,
                "ce_weight": 0.1,
                "clip_epsilon": 0.2,
                "advantage_clip": 5.0,
            },
            "rewards": (
                {"name": "mse"},
                {"name": "lpips", "options": {"dtype": "bfloat16"}},
            ),
            "optimizer": {
                "learning_rate": 1e-6,
                "weight_decay": 1e-4,
                "b1": 0.9,
                "b2": 0.999,
                "max_grad_norm": 1.0,
            },
            "eval": {"every": 25, "images": 64},
            "checkpoint": {"every": 50},
        }
    )
    if variant == "tiny":
        config.update({"steps": 3, "batch_size": 16, "microbatch_size": 8, "cpu_devices": 8})
        config.mesh.update({"data": 2, "fsdp": 4})
        config.data.update({"name": "photos", "image_size": 32, "num_threads": 1, "prefetch": 2})
        demo = load_recipe(__file__, "c2i_demo").get_config()
        config.tokenizer.update(demo.tokenizer)
        config.policy = ConfigDict({**demo.policy, "dtype": "bfloat16", "remat": "full"})
        config.init.update(demo.init)
        config.vapi.update({"group_size": 4})
        config.eval.update({"every": 2, "images": 8})
        config.checkpoint.update({"every": 2})
    elif variant in TARGETS:
        config.update(TARGETS[variant])
    elif variant:
        known = ", ".join(("tiny", *TARGETS))
        raise ValueError(f"configs/c2i_xxl.py:{variant}: known variants are '', {known}")
    return config
