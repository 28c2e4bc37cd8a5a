"""Condition contrastive alignment of the demo's generator (method "cca"), beside configs/c2i_demo.py.

    python -m vapi_jax.main --config=configs/demo_cca.py --workdir=runs/demo_cca

The demo's images, steps and table; the learning rate is the best of configs/studies/mini_rates.py, above
which the samples fall apart; β and λ are those published for LlamaGen, not tuned for a model of this size.
":tiny" runs the same path in seconds, without a table.
"""

from ml_collections import ConfigDict

from vapi_jax.common.recipes import load_recipe


def get_config(variant: str = "") -> ConfigDict:
    """The recipe; variant "tiny"."""
    config = load_recipe(__file__, "demo_sft").as_method("demo_cca", "cca", {}, variant)
    config.optimizer.update({"learning_rate": 1e-5})
    return config
