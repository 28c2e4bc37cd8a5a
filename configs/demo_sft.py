"""Cross-entropy alone on the demo's generator (method "sft"): the control without a reward.

    python -m vapi_jax.main --config=configs/demo_sft.py --workdir=runs/demo_sft

The images, contexts and steps of configs/c2i_demo.py, and its table; the paper's row "CE only" (Table 4)
with the released XXL: FID 14.36 -> 14.17, where VA-π has 7.65. As long as the demo on CPU cores.
":tiny" runs the same path in seconds, without a table.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from vapi_jax.common.recipes import load_recipe


def get_config(variant: str = "") -> ConfigDict:
    """The recipe; variant "tiny"."""
    return as_method("demo_sft", "sft", {"noise_rate": 0.0}, variant)


def as_method(name: str, method: str, options: Mapping[str, Any], variant: str) -> ConfigDict:
    """The demo with another method in VA-π's place, its options in a section of its name."""
    if variant not in ("", "tiny"):
        raise ValueError(f"configs/{name}.py:{variant}: known variants are '' and 'tiny'")
    config = load_recipe(__file__, "c2i_demo").get_config(variant)
    config.update({"name": name, "method": method})
    del config.vapi
    config[method] = ConfigDict(options)
    if variant == "tiny":
        config.steps = 2
        config.eval.update({"compare": False, "sampled_every": 0, "every": 2, "grid_classes": 4})
    return config
