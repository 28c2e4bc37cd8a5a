"""AR-GRPO's class-conditional recipe on LlamaGen-XL at 384 px (method "ar_grpo", arXiv 2508.06924).

    python -m vapi_jax.main --config=configs/xl_ar_grpo.py --workdir=runs/xl_ar_grpo \\
        --config.data.path=DIR_WITH_PREPARED_TFDS

Published, with guidance 2.0: FID 2.79 -> 3.63, IS 286.88 -> 293.07, 149 minutes (VA-π's Table 2; on which
hardware is not known; the released script has 4 GPUs and 400 steps of 32 sequences). No figure without
guidance exists. Not run with this code.

Rewards here are the two of its eight that this project has, with their weights: CLIP B/32 with "a photo of"
and the class's words, and HPSv2.1, from weights/clip-vit-base-patch32 and weights/HPS_v2.1_compressed.pt;
MANIQA, Qwen-VL's three and the two that put the same cosines into four steps are left out.
--config.preset=reference trains the conditional branch alone, as the released code does; the plain recipe
trains what was drawn from. The 4 conditions of a batch want 1, 2 or 4 devices.
":tiny" runs the same path with the demo's models and another reward in seconds on a CPU.
"""

from ml_collections import ConfigDict

from vapi_jax.common.recipes import load_recipe

CLIP, HPS = "weights/clip-vit-base-patch32", "weights/HPS_v2.1_compressed.pt"


def get_config(variant: str = "") -> ConfigDict:
    """The recipe; variant "tiny"."""
    if variant not in ("", "tiny"):
        raise ValueError(f"configs/xl_ar_grpo.py:{variant}: known variants are '' and 'tiny'")
    config = load_recipe(__file__, "c2i_xl").get_config(variant)
    return as_ar_grpo(config, "xl_ar_grpo", variant)


def as_ar_grpo(config: ConfigDict, name: str, variant: str) -> ConfigDict:
    """A recipe of VA-π with AR-GRPO's method and numbers in its place."""
    config.update({"name": name, "method": "ar_grpo", "steps": 400, "batch_size": 4})
    del config.vapi, config.rewards
    config.ar_grpo = ConfigDict({"group_size": 8, "cfg_scale": 2.0, "kl_weight": 0.1})
    config.rewards = (
        {"name": "clip", "weight": 5.0, "options": {"weights": CLIP, "prompts": "imagenet"}},
        {"name": "hpsv2", "weight": 5.0, "options": {"weights": HPS, "prompts": "imagenet"}},
    )
    config.optimizer.update({"learning_rate": 1e-5, "weight_decay": 0.0})
    config.eval.update({"every": 100})
    config.checkpoint.update({"every": 100})
    if variant == "tiny":
        config.update({"steps": 2, "batch_size": 8, "microbatch_size": 0})
        config.update({"rewards": ({"name": "mse"},)})
        config.ar_grpo.update({"group_size": 2})
        config.eval.update({"every": 2, "grid_classes": 4})
        config.checkpoint.update({"every": 2})
    return config
