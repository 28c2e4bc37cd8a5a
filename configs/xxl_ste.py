"""The paper's straight-through baseline (C.1) on LlamaGen-XXL, ImageNet at 384 px (method "ste").

    python -m vapi_jax.main --config=configs/xxl_ste.py --workdir=runs/xxl_ste \\
        --config.data.path=DIR_WITH_PREPARED_TFDS

Published: 381 minutes with the authors' code, where VA-π took 25 (8 x A100 80 GB); FID 14.36 -> 11.46, IS
86.55 -> 102.21 without guidance, 4.17 and 267.34 with 1.75 (Table 2; VA-π: 7.65 and 2.28). Not run with this
code.

The paper gives no learning rate, τ, weights or steps. Here they are those of VA-π's recipe: equal STEPS (100
of 128 images). At the throughput of the authors' code 381 minutes are about 14,000 steps, so equal TIME is
something else: --config.steps=14000. --config.preset=reference is the released script: Gumbel samples, raw
codes, MSE alone, dropout; its learning rate is 1e-5 (--config.optimizer.learning_rate=1e-5).
":tiny" runs the same path with the demo's models on photographs in seconds on a CPU.
"""

from ml_collections import ConfigDict

from vapi_jax.common.recipes import load_recipe


def get_config(variant: str = "") -> ConfigDict:
    """The recipe; variant "tiny"."""
    if variant not in ("", "tiny"):
        raise ValueError(f"configs/xxl_ste.py:{variant}: known variants are '' and 'tiny'")
    config = load_recipe(__file__, "c2i_xxl").get_config(variant)
    config.update({"name": "xxl_ste", "method": "ste"})
    del config.vapi, config.rewards  # so that presets choose both
    config.ste = ConfigDict()
    if variant == "tiny":
        config.update({"steps": 2, "batch_size": 8, "microbatch_size": 0})
        config.eval.update({"grid_classes": 4})
    return config
