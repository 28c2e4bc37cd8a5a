"""VA-π from captions in minutes, on a laptop, with nothing from outside.

    bash launch/demo.sh runs/t2i_demo --config=configs/t2i_demo.py
    python -m vapi_jax.main --config=configs/t2i_demo.py --workdir=runs/t2i_demo

Post-trains the shipped text-conditional generator of drawn scenes and judges its samples of held-out
captions by GenEval's rules with an exact detector: six scores before and after, beside the base at equal
entropy and with guidance. ":tiny" runs the same path with so few samples that its numbers mean nothing.
"""

from ml_collections import ConfigDict

from vapi_jax.common.recipes import load_recipe


def get_config(variant: str = "") -> ConfigDict:
    """The recipe; variant "tiny"."""
    base = load_recipe(__file__, "scenes_base")
    config = ConfigDict(
        {
            "name": "t2i_demo",
            "method": "vapi",
            "preset": "paper",
            "seed": 2,
            "steps": 60,
            "batch_size": 16,
            "cpu_devices": 8,
            "mesh": {"data": 2, "fsdp": 4},
            "data": {"name": "scenes", "image_size": 32, "flip": False},
            "tokenizer": load_recipe(__file__, "scenes_tokenizer").tokenizer(),
            "policy": base.policy(),
            "condition": {
                "name": "caption",
                "options": {"encoder": "scenes", "dtype": "float32", "clean": False},
            },
            "init": {"vq": "scenes", "gpt": "scenes"},
            "vapi": {"group_size": 8, "noise_rate": 0.0, "ce_weight": 0.1},
            "optimizer": {"learning_rate": 1e-5, "weight_decay": 1e-4},
            "eval": {
                "split": "test",
                "every": 20,
                "images": 64,
                "compare": True,
                "samples": 768,
                "seeds": 2,
                "temperatures": (0.9,),
                "cfg_scales": (2.0, 4.0),
                "grid_classes": 12,
            },
        }
    )
    if variant == "tiny":
        config.update({"steps": 4, "batch_size": 8})
        config.vapi.update({"group_size": 4})
        config.eval.update({"every": 4, "images": 8, "samples": 36, "seeds": 2})
        config.eval.update({"allow_singular": True})
    elif variant:
        raise ValueError(f"configs/t2i_demo.py:{variant}: known variants are '' and 'tiny'")
    return config
