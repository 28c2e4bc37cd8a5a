"""AR-GRPO on drawn scenes (method "ar_grpo"): a generator draws what captions ask for, and learns from it.

    python -m vapi_jax.main --config=configs/scenes_ar_grpo.py --workdir=runs/scenes_ar_grpo \\
        --config.init.vq=TOKENIZER --config.init.gpt=POLICY --config.condition.options.encoder=FOLDER

The reward is exact: GenEval's rules on what a detector of shapes finds in a sample, by the share of the
caption's clauses that hold. Captions are those of training scenes; held-out rewards are of combinations that
training never tells. Neither guidance nor filters: trained is what was drawn from. The networks are those of
configs/scenes_tokenizer.py and configs/scenes_base.py (docs/text.md makes the folder of the encoder).
Rates are not tuned.
":tiny" runs the same path in seconds with untrained networks, whose groups only pixels tell apart.
"""

from ml_collections import ConfigDict

from vapi_jax.common.recipes import load_recipe


def get_config(variant: str = "") -> ConfigDict:
    """The recipe; variant "tiny"."""
    if variant not in ("", "tiny"):
        raise ValueError(f"configs/scenes_ar_grpo.py:{variant}: known variants are '' and 'tiny'")
    config = load_recipe(__file__, "scenes_base").get_config()
    config.update({"name": "scenes_ar_grpo", "method": "ar_grpo", "steps": 200, "log_every": 1})
    del config.text_base
    config.init = ConfigDict({"vq": "weights/scenes_tokenizer", "gpt": "weights/scenes_policy"})
    config.condition.options.update({"encoder": "weights/scenes_encoder", "dtype": "float32"})
    config.ar_grpo = ConfigDict({"group_size": 8, "kl_weight": 0.02})
    scenes = {"name": "scenes", "options": {"graded": True}}
    config.rewards = (scenes,)
    config.optimizer = ConfigDict({"learning_rate": 3e-4})
    config.eval = ConfigDict({"split": "test", "every": 20, "images": 256})
    config.checkpoint.every = 100
    if variant == "tiny":
        config.update({"steps": 2, "batch_size": 8, "rewards": (scenes, "mse")})
        config.ar_grpo.group_size = 2
        untrained = load_recipe(__file__, "t2i_xl").get_config("tiny")
        for name in ("tokenizer", "policy", "init"):
            config[name] = untrained[name]
        config.condition.options.encoder = untrained.condition.options.encoder
        config.eval.update({"every": 2, "images": 8, "grid_classes": 4})
    return config
