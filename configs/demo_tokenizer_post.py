"""The demo's decoder, trained on tokens of its generator (method "tokenizer_post", the paper's C.2).

    python -m vapi_jax.main --config=configs/demo_tokenizer_post.py --workdir=runs/demo_tokenizer_post

The demo's images and steps; losses are the paper's and the learning rate is LlamaGen's for tokenizers, as in
configs/xxl_tokenizer_post.py. Samples of the run, in its table and those of python -m vapi_jax.sample --ckpt
RUN, are the shipped generator's, through the trained decoder.
":tiny" runs the same path in seconds.
"""

from ml_collections import ConfigDict

from vapi_jax.common.recipes import load_recipe


def get_config(variant: str = "") -> ConfigDict:
    """The recipe; variant "tiny"."""
    base = load_recipe(__file__, "demo_sft")
    config = base.as_method("demo_tokenizer_post", "tokenizer_post", {}, variant)
    config.optimizer.update({"learning_rate": 1e-4})
    return config
