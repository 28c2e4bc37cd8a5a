"""Condition contrastive alignment of LlamaGen-XXL, ImageNet at 384 px (method "cca", arXiv 2410.09347).

    python -m vapi_jax.main --config=configs/xxl_cca.py --workdir=runs/xxl_cca \\
        --config.data.path=DIR_WITH_PREPARED_TFDS

Published: one epoch (5000 steps of 256 images), FID 3.12 without guidance for XXL, 3.10 for XL, 3.43 for L,
7.04 for B; VA-π, with 1 % of the data, has 7.65 and 9.23. Hardware and time are not known; it is about 18
EFLOP. Not run with this code. Published runs took ten crops of every image; here they are centre crops,
flipped at random.

":equal" has VA-π's budget in its place, 100 steps of 128 images: the comparison that nobody has published.
For L take --config.cca.negative_weight=300, for 3B 500. --config.preset=reference is the released script.
":tiny" runs the same path with the demo's models on photographs in seconds on a CPU.
"""

from ml_collections import ConfigDict

from vapi_jax.common.recipes import load_recipe


def get_config(variant: str = "") -> ConfigDict:
    """The recipe; variants "equal" and "tiny"."""
    if variant not in ("", "equal", "tiny"):
        raise ValueError(f"configs/xxl_cca.py:{variant}: known variants are '', 'equal', 'tiny'")
    base = variant if variant == "tiny" else ""
    config = load_recipe(__file__, "c2i_xxl").get_config(base)
    config.update({"name": "xxl_cca", "method": "cca"})
    del config.vapi, config.rewards
    config.cca = ConfigDict({"beta": 0.02, "negative_weight": 1000.0, "unconditional": 0.1})
    config.optimizer.update({"learning_rate": 1e-5, "weight_decay": 0.05, "b2": 0.95})
    if variant == "":
        config.update({"steps": 5000, "batch_size": 256})
        config.eval.update({"every": 500})
        config.checkpoint.update({"every": 500})
    elif variant == "tiny":
        config.update({"steps": 2, "batch_size": 8, "microbatch_size": 0})
        config.eval.update({"grid_classes": 4})
    return config
