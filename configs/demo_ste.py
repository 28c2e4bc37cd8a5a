"""Straight-through training of the demo's generator (method "ste", the paper's C.1).

    python -m vapi_jax.main --config=configs/demo_ste.py --workdir=runs/demo_ste

The demo's images, steps, learning rate and table; losses and weights are the paper's, as in
configs/xxl_ste.py. ":tiny" runs the same path in seconds, without a table.
"""

from ml_collections import ConfigDict

from vapi_jax.common.recipes import load_recipe


def get_config(variant: str = "") -> ConfigDict:
    """The recipe; variant "tiny"."""
    return load_recipe(__file__, "demo_sft").as_method("demo_ste", "ste", {}, variant)
