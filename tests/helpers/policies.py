"""One small policy of every kind that there is, conditions for it, and weights that matter."""

import jax
import jax.numpy as jnp
import numpy as np

from vapi_jax.models.conditions import text_condition

GRID = 3
TOKENS = GRID * GRID
BATCH = TOKENS - 1  # one row per context token, so that a single compilation serves every test
VOCAB = 11
LLAMA = {
    "dim": 32, "n_head": 4, "n_layer": 2, "vocab_size": VOCAB, "block_size": TOKENS,
    "multiple_of": 16, "num_classes": 5,
}  # fmt: skip
TEXT = {"cls_token_num": 4, "caption_dim": 6}
JANUS = {
    "dim": 32, "n_head": 4, "n_layer": 2, "vocab_size": VOCAB, "num_tokens": TOKENS,
    "hidden_dim": 48, "text_vocab_size": 13, "image_embed_dim": 5, "pad_id": 2,
}  # fmt: skip
CASES = {
    "class": ("class", LLAMA),
    "class, grouped heads": ("class", {**LLAMA, "n_kv_head": 2, "n_layer": 3}),
    "class, bfloat16": ("class", {**LLAMA, "dtype": "bfloat16"}),
    "text": ("text", {**LLAMA, **TEXT, "n_kv_head": 1}),
    "janus": ("janus", {**JANUS, "n_kv_head": 2}),
    "janus, counted padding": ("janus", {**JANUS, "padding": "counted"}),
}


def make_condition(kind, rng):
    """A batch of differing conditions, padded where the kind knows padding."""
    if kind == "class":
        return jnp.asarray(rng.integers(0, 5, BATCH), jnp.int32)
    lengths = 2 + np.arange(BATCH) % 3  # real prompt tokens of 4
    if kind == "text":  # left padding
        features = rng.normal(size=(BATCH, 4, 6)).astype(np.float32)
        return text_condition(features, np.arange(4) >= 4 - lengths[:, None])
    tokens = jnp.asarray(rng.integers(3, 13, (BATCH, 4)), jnp.int32)
    return {"tokens": tokens, "mask": jnp.asarray(np.arange(4) < lengths[:, None])}


def draw_weights(shapes, scale=None, seed=0):
    """Normal weights of the given shapes, the output layer's zeros included.

    Without a `scale` each is divided by the root of its last axis, so that activations and logits
    are of order one. NumPy draws them: compiling the initialisers takes far longer.
    """
    rng = np.random.default_rng(seed)

    def draw(leaf):
        spread = scale or leaf.shape[-1] ** -0.5
        return jnp.asarray(rng.normal(size=leaf.shape) * spread, jnp.float32)

    return jax.tree.map(draw, shapes)
