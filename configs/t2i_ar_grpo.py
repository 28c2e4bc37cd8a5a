"""AR-GRPO's text-conditional recipe on LlamaGen-XL at 256 px (method "ar_grpo", arXiv 2508.06924).

    python -m vapi_jax.main --config=configs/t2i_ar_grpo.py --workdir=runs/t2i_ar_grpo \\
        --config.data.path=DIR_WITH_SHARDS --config.data.options.caption_field=json:caption

Published (VA-π's Tables 1 and 3): CLIP 0.245 -> 0.274, HPSv2 0.153 -> 0.208 on DrawBench, GenEval 0.306 ->
0.324, after 600 steps of 64 sequences on 4 GPUs, captions of COCO. Not run with this code.

The released code pads captions on the right and trains weights in pure bfloat16, in which steps of 1e-5 move
little; here captions are padded as the generator was trained, and weights are float32. Rewards and presets
are as in configs/xl_ar_grpo.py, of the captions themselves. Images of the data are read and not looked at.
":tiny" runs the same path in seconds on a CPU, with what configs/t2i_xl.py:tiny makes and another reward.
"""

from ml_collections import ConfigDict

from vapi_jax.common.recipes import load_recipe


def get_config(variant: str = "") -> ConfigDict:
    """The recipe; variant "tiny"."""
    if variant not in ("", "tiny"):
        raise ValueError(f"configs/t2i_ar_grpo.py:{variant}: known variants are '' and 'tiny'")
    classes = load_recipe(__file__, "xl_ar_grpo")
    config = load_recipe(__file__, "t2i_xl").get_config(variant)
    config = classes.as_ar_grpo(config, "t2i_ar_grpo", variant)
    config.ar_grpo.update({"cfg_scale": 4.0, "kl_weight": 1.0})
    if variant == "tiny":
        config.optimizer.update({"learning_rate": 1e-3})  # it starts from scratch
    else:
        config.update({"steps": 600, "batch_size": 8})
        config.rewards = (
            {"name": "clip", "weight": 5.0, "options": {"weights": classes.CLIP}},
            {"name": "hpsv2", "weight": 5.0, "options": {"weights": classes.HPS}},
        )
    return config
