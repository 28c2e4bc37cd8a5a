"""The paper's tokenizer baseline (5.2, C.2): VQ-16's decoder on tokens of LlamaGen-XXL ("tokenizer_post").

    python -m vapi_jax.main --config=configs/xxl_tokenizer_post.py --workdir=runs/xxl_tokenizer_post \\
        --config.data.path=DIR_WITH_PREPARED_TFDS

Published for XXL (Table 2), FID and IS without guidance, then with it; the base 14.36, 86.55, 2.37, 252.16:

    :short   100 steps,     18 min    14.26  86.70   2.72  246.97
    :long    10,000 steps,  207 min   22.99  72.49   4.31  221.57

on 8 x A100 80 GB with code that was not released (the two times contradict each other: 10.8 and 1.24 s a
step). Not run with this code. The paper gives neither learning rate nor λ_p nor batch; these are LlamaGen's
for tokenizers. The plain recipe is ":short".

":robustok" trains the same decoder with an adversary on rollouts mixed with true tokens (arXiv 2509.12474),
which the paper's loss leaves out. ":tiny" runs the path with the demo's models on photographs in seconds on a
CPU.
"""

from ml_collections import ConfigDict

from vapi_jax.common.recipes import load_recipe


def get_config(variant: str = "") -> ConfigDict:
    """The recipe; variants "short", "long", "robustok" and "tiny"."""
    known = ("", "short", "long", "robustok", "tiny")
    if variant not in known:
        names = ", ".join(map(repr, known))
        raise ValueError(f"configs/xxl_tokenizer_post.py:{variant}: known variants are {names}")
    base = variant if variant == "tiny" else ""
    config = load_recipe(__file__, "c2i_xxl").get_config(base)
    config.update({"name": "xxl_tokenizer_post", "method": "tokenizer_post"})
    del config.vapi, config.rewards
    config.tokenizer_post = ConfigDict()
    config.optimizer.update({"learning_rate": 1e-4, "weight_decay": 0.05, "b2": 0.95})
    if variant == "long":
        config.steps = 10_000
        config.eval.every = config.checkpoint.every = 500
    elif variant == "robustok":
        config.update({"preset": "robustok", "steps": 10_000})
        config.eval.every = config.checkpoint.every = 500
        config.optimizer.update({"learning_rate": 5e-5, "schedule": "cosine"})
    elif variant == "tiny":
        config.update({"steps": 2, "batch_size": 8, "microbatch_size": 0})
    return config
