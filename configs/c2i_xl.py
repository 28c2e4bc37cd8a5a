"""The paper's class-conditional recipe on LlamaGen-XL (775M), ImageNet at 384 px (Table 7).

    python -m vapi_jax.main --config=configs/c2i_xl.py --workdir=runs/c2i_xl \\
        --config.data.path=DIR_WITH_PREPARED_TFDS

Hardware: 8 x A100 80 GB. Time: 20 minutes there with the authors' code; ours not measured yet.
Published: FID 15.55 -> 9.23, IS 79.16 -> 111.59 (50k samples, no guidance); 2.79 -> 2.94 and
286.88 -> 299.63 with guidance 2.0 (Table 2). Not run with this code yet.

":h100x1", ":h100x8" and ":a100x8" compute the same with other settings, see c2i_xxl.py.
":tiny" runs the same path on small models and photographs in seconds on a CPU.
"""

from ml_collections import ConfigDict

from vapi_jax.common.recipes import load_recipe


def get_config(variant: str = "") -> ConfigDict:
    """The recipe of c2i_xxl with the smaller generator, and its variants."""
    larger = load_recipe(__file__, "c2i_xxl")
    known = ("tiny", *larger.TARGETS)
    if variant not in ("", *known):
        raise ValueError(f"configs/c2i_xl.py:{variant}: known variants are '', {', '.join(known)}")
    config = larger.get_config(variant)
    config.name = "c2i_xl"
    if variant != "tiny":
        config.policy.size = "GPT-XL"
        config.init.gpt = config.init.vq = "weights/c2i_xl"
    return config
