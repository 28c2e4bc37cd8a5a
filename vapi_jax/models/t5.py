"""The encoder of T5 v1.1 (arXiv 1910.10683, 2002.05202), Flan-T5-XL for instance.

Pre-norm blocks without biases; scores are not scaled; one table of distances, held by the first block,
is added to the scores of all; the feed-forward gate is a tanh-approximated GELU. Weights lie stacked
along a leading layer axis and each layer's are gathered where it runs, so that a mesh holds one copy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from vapi_jax.common.options import Count, Natural, Positive
from vapi_jax.common.trees import flatten, unflatten
from vapi_jax.models.layers import precision_of
from vapi_jax.parallel.sharding import replicated
from vapi_jax.weights.names import Rule

Params = Any


@dataclass(frozen=True)
class T5Config:
    """Hyper-parameters under the names of Hugging Face's config.json; the defaults are Flan-T5-XL."""

    d_model: Count = 2048
    num_layers: Count = 24
    num_heads: Count = 32
    d_kv: Count = 64
    d_ff: Count = 5120
    vocab_size: Count = 32128
    relative_attention_num_buckets: Count = 32
    relative_attention_max_distance: Count = 128
    layer_norm_epsilon: Positive = 1e-6
    pad_token_id: Natural = 0
    eos_token_id: Natural = 1

    def __post_init__(self) -> None:
        exact = self.relative_attention_num_buckets // 4
        if not 0 < exact < self.relative_attention_max_distance:
            raise ValueError(
                f"relative_attention_num_buckets={self.relative_attention_num_buckets}: a quarter of "
                "it must be at least 1 and less than relative_attention_max_distance"
            )


_BLOCK = r"encoder.block.{layer}.layer."
NAME_RULES = (
    Rule(r"embed_tokens/embedding", "shared.weight"),
    Rule(
        r"embed_distance/embedding",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    ),
    Rule(r"layers/attention_norm/scale", f"{_BLOCK}0.layer_norm.weight"),
    Rule(r"layers/attention/w([qkvo])/kernel", rf"{_BLOCK}0.SelfAttention.\1.weight", "linear"),
    Rule(r"layers/ffn_norm/scale", f"{_BLOCK}1.layer_norm.weight"),
    Rule(r"layers/feed_forward/w1/kernel", f"{_BLOCK}1.DenseReluDense.wi_0.weight", "linear"),
    Rule(r"layers/feed_forward/w3/kernel", f"{_BLOCK}1.DenseReluDense.wi_1.weight", "linear"),
    Rule(r"layers/feed_forward/w2/kernel", f"{_BLOCK}1.DenseReluDense.wo.weight", "linear"),
    Rule(r"final_norm/scale", "encoder.final_layer_norm.weight"),
)
DECODER = r"(decoder\.|lm_head\.).*"
"""Names of tensors that an encoder has no use for."""


def shapes(config: T5Config, dtype: Any = jnp.float32) -> Params:
    """The parameters as ShapeDtypeStructs."""
    c, inner = config, config.num_heads * config.d_kv
    layers = {
        "attention_norm/scale": (c.d_model,),
        "attention/wq/kernel": (c.d_model, inner),
        "attention/wk/kernel": (c.d_model, inner),
        "attention/wv/kernel": (c.d_model, inner),
        "attention/wo/kernel": (inner, c.d_model),
        "ffn_norm/scale": (c.d_model,),
        "feed_forward/w1/kernel": (c.d_model, c.d_ff),
        "feed_forward/w3/kernel": (c.d_model, c.d_ff),
        "feed_forward/w2/kernel": (c.d_ff, c.d_model),
    }
    flat = {
        "embed_tokens/embedding": (c.vocab_size, c.d_model),
        "embed_distance/embedding": (c.relative_attention_num_buckets, c.num_heads),
        **{f"layers/{name}": (c.num_layers, *shape) for name, shape in layers.items()},
        "final_norm/scale": (c.d_model,),
    }
    return unflatten({name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in flat.items()})


def init(rng: PRNGKeyArray, config: T5Config) -> Params:
    """Fresh float32 parameters, drawn as Hugging Face draws those of T5, but for the table of distances.

    That is wide, so that heads look at neighbours from the start: a small encoder that begins by looking
    everywhere alike learns which words a caption has long before it learns their order.
    """
    c, target = config, flatten(shapes(config))
    inner = c.num_heads * c.d_kv
    deviations = {
        "embed_tokens/embedding": 1.0,
        "embed_distance/embedding": 3.0,
        "wq/kernel": (c.d_model * c.d_kv) ** -0.5,  # scores are not scaled
        "attention/wo/kernel": inner**-0.5,
        "w2/kernel": c.d_ff**-0.5,
    }
    found = {}
    for key, (name, leaf) in zip(jax.random.split(rng, len(target)), target.items(), strict=True):
        known = (sd for ending, sd in deviations.items() if name.endswith(ending))
        drawn = next(known, c.d_model**-0.5) * jax.random.normal(key, leaf.shape)
        found[name] = jnp.ones(leaf.shape) if name.endswith("scale") else drawn
    return unflatten(found)


def buckets(length: int, count: int, max_distance: int) -> Int[np.ndarray, "P P"]:
    """The row of the table of distances for (query, key): a half of them for keys further on.

    In each half the first half are single distances; the others grow geometrically to `max_distance`.
    """
    distance = np.arange(length)[None] - np.arange(length)[:, None]
    half, exact = count // 2, count // 4
    far = np.log(np.maximum(np.abs(distance), 1) / exact) / math.log(max_distance / exact)
    # A distance that is a power of the ratio, 32 or 64, must not fall short of its bucket.
    grown = exact + np.floor(far * (half - exact) + 1e-9).astype(np.int64)
    near = np.abs(distance)
    return np.where(near < exact, near, np.minimum(grown, half - 1)) + half * (distance > 0)


def _norm(x: Float[Array, "B P D"], scale: Float[Array, " D"], epsilon: float) -> Array:
    """RMS norm; its statistics are float32, and what is normalised is narrowed before it is scaled."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
    return wide.astype(scale.dtype) * scale


def encode(
    params: Params,
    ids: Int[Array, "B P"],
    mask: Bool[Array, "B P"],
    config: T5Config,
    mesh: Mesh | None = None,
) -> Float[Array, "B P D"]:
    """Features of tokens, 0 where the mask is False; computed in the dtype of the parameters.

    Args:
      params: as `shapes`.
      ids: tokens, padded on either side.
      mask: True where there is a token.
      config: the encoder's.
      mesh: over which the parameters are split, if they are.
    """
    c, (batch, length) = config, ids.shape
    table = params["embed_distance"]["embedding"]
    rows = buckets(length, c.relative_attention_num_buckets, c.relative_attention_max_distance)
    bias = jnp.moveaxis(table[rows], -1, 0)[None]  # [1, H, P, P]
    hidden = jnp.where(mask[:, None, None], 0, jnp.finfo(table.dtype).min).astype(table.dtype)
    bias = bias + hidden

    def heads(x: Array, kernel: Array) -> Float[Array, "B P H K"]:
        return (x @ kernel).reshape(batch, length, c.num_heads, c.d_kv)

    def block(x: Array, layer: Params) -> tuple[Array, None]:
        if mesh is not None:
            layer = jax.lax.with_sharding_constraint(layer, replicated(mesh))
        y, w = _norm(x, layer["attention_norm"]["scale"], c.layer_norm_epsilon), layer["attention"]
        q, k, v = (heads(y, w[name]["kernel"]) for name in ("wq", "wk", "wv"))
        scores = jnp.einsum("bqhk,bphk->bhqp", q, k) + bias
        weights = jax.nn.softmax(scores.astype(jnp.float32), axis=-1).astype(x.dtype)
        out = jnp.einsum("bhqp,bphk->bqhk", weights, v).reshape(batch, length, -1)
        x = x + out @ w["wo"]["kernel"]
        y, w = _norm(x, layer["ffn_norm"]["scale"], c.layer_norm_epsilon), layer["feed_forward"]
        gate = jax.nn.gelu(y @ w["w1"]["kernel"], approximate=True)
        return x + (gate * (y @ w["w3"]["kernel"])) @ w["w2"]["kernel"], None

    with jax.default_matmul_precision(precision_of(table.dtype)):
        x, _ = jax.lax.scan(block, params["embed_tokens"]["embedding"][ids], params["layers"])
    x = _norm(x, params["final_norm"]["scale"], c.layer_norm_epsilon)
    return jnp.where(mask[..., None], x, 0)


def left_padded(
    features: Float[Array, "B P D"], mask: Bool[Array, "B P"]
) -> tuple[Float[Array, "B P D"], Bool[Array, "B P"]]:
    """Features that are padded on the right, and their mask, with the padding on the left."""
    length = mask.shape[1]
    lengths = mask.sum(axis=1, keepdims=True)
    rows = (jnp.arange(length)[None] + lengths) % length
    moved = jnp.take_along_axis(features, rows[..., None], axis=1)
    return moved, jnp.take_along_axis(mask, rows, axis=1)
