"""The recipe of configs/janus_pro_1b.py on Janus-Pro-7B.

    python -m vapi_jax.main --config=configs/janus_pro_7b.py --workdir=runs/janus_pro_7b \\
        --config.data.path=FLUX_REASON_6M --config.data.options.caption_field=caption_original

Hardware: 8 x H100 80 GB by the plan (docs/janus.md). Time: not measured.
Published: nothing; the paper trains the 1B. Not run with this code yet.

What the 1B's recipe says of weights, presets, ":lora" and ":tiny" holds here, too.
"""

from ml_collections import ConfigDict

from vapi_jax.common.recipes import load_recipe


def get_config(variant: str = "") -> ConfigDict:
    """The recipe; variants "lora" and "tiny"."""
    made: ConfigDict = load_recipe(__file__, "janus_pro_1b").make_config(
        "janus_pro_7b", 100015, variant, dim=4096, n_layer=30, n_head=32, hidden_dim=11008
    )
    return made
