"""VA-π on real photographs in minutes, on a laptop: what `bash launch/demo.sh` runs.

    python -m vapi_jax.main --config=configs/c2i_demo.py --workdir=runs/demo
    python -m vapi_jax.main --config=configs/c2i_demo.py:full --workdir=runs/demo_full

Post-trains the shipped class-conditional generator (2M parameters, 64 tokens of 32x32 pixels) over a
mesh of eight virtual CPU devices, then compares it with its base, with its base sharpened, and with
the tokenizer's floor. ":full" adds controls (CE only, shuffled advantages), more temperatures and
more samples, enough for EfficientNet-Lite0 to judge, which the reward has not seen; ":tiny" runs the same
path with so few samples that its distances mean nothing.
":best" trains the decoder on the generator's own tokens in place of the generator (method "tokenizer_post"),
which on these photographs beats the base at equal entropy beyond noise: 265.6 +- 5.7 in VGG's features and
291.5 +- 2.5 in EfficientNet's (base 324.8, 313.9), in 24 minutes of processor time; docs/studies.md has four
trainings.

On 2 CPU cores: 7 minutes, ":tiny" 50 seconds; ":full" 40 minutes of processor time. Measured with
":full": held-out reward -0.4709 -> -0.4669; Fréchet distance in LPIPS-VGG features 324.8 +- 7.9 ->
318.5 +- 8.2, the base sampled at the same entropy 322.3 +- 6.7; in EfficientNet-Lite0's 313.9 +- 2.7 ->
313.7 +- 2.2, at the same entropy 313.0 +- 3.1.

The paper's learning rate (1e-6) is meant for 1.4B parameters; this model wants 1e-5.
"""

from ml_collections import ConfigDict

from vapi_jax.common.recipes import load_recipe


def get_config(variant: str = "") -> ConfigDict:
    """The recipe; variants "full", "best" and "tiny"."""
    config = ConfigDict(
        {
            "name": "c2i_demo",
            "method": "vapi",
            "preset": "paper",
            "seed": 2,
            "steps": 100,
            "batch_size": 16,
            "cpu_devices": 8,
            "mesh": {"data": 2, "fsdp": 4},
            "data": {"name": "photos", "image_size": 32},
            "tokenizer": load_recipe(__file__, "demo_tokenizer").tokenizer(),
            "policy": load_recipe(__file__, "demo_base").policy(),
            "init": {"vq": "demo", "gpt": "demo"},
            "vapi": {"group_size": 8, "noise_rate": 0.0, "ce_weight": 0.1},
            "optimizer": {"learning_rate": 1e-5, "weight_decay": 1e-4},
            "eval": {
                "split": "test",
                "every": 20,
                "images": 64,
                "compare": True,
                "samples": 1024,
                "seeds": 3,
                "temperatures": (0.9,),
                "grid_classes": 12,
                "sampled_every": 25,
                "sampled": 256,
            },
        }
    )
    if variant == "full":
        config.eval.update({"controls": True, "samples": 2048, "seeds": 3})
        config.eval.update({"temperatures": (0.95, 0.9, 0.85)})
        config.eval.update({"unseen": "efficientnet_lite0_112"})  # wants more samples than 1,280
    elif variant == "tiny":
        config.update({"steps": 4, "batch_size": 8})
        config.vapi.update({"group_size": 4})
        config.eval.update({"every": 4, "images": 8, "samples": 32, "seeds": 2})
        config.eval.update({"sampled_every": 4, "sampled": 32, "allow_singular": True})
    elif variant == "best":
        config = load_recipe(__file__, "demo_tokenizer_post").get_config()
        config.update({"name": "c2i_demo_best", "steps": 200})
        config.eval.update({"samples": 2048, "unseen": "efficientnet_lite0_112"})
    elif variant:
        known = "'', 'best', 'full', 'tiny'"
        raise ValueError(f"configs/c2i_demo.py:{variant}: known variants are {known}")
    return config
