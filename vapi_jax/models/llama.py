"""LlamaGen's autoregressive image transformer (arXiv 2406.06525), class- and text-conditional.

A sequence is `P` conditioning positions followed by image tokens in raster order; the logits of
token t are read one position before it. Class condition: Int[B]. Text condition: a dict of
features Float[B, P, W], mask Bool[B, P] (False = padding, on the left) and dropped Bool[B]
(True = use the unconditional embedding instead of the features).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from vapi_jax.common.options import Count, Dtype, NotNegative, Positive, Rate, Share, Vocabulary
from vapi_jax.models.attention import Kernel, causal_mask, rope_table_2d
from vapi_jax.models.lora import LoRA, settled
from vapi_jax.models.transformer import (
    BlockConfig,
    KVCache,
    Remat,
    RMSNorm,
    dense,
    head_matmul,
    outside_layers,
    prefill_blocks,
    scan_blocks,
    step_blocks,
)
from vapi_jax.parallel.fsdp import is_split
from vapi_jax.weights.names import Rule

Params = dict[str, Any]
Condition = Any  # Int[B], or the dict described above


@dataclass(frozen=True)
class LlamaConfig:
    """Hyper-parameters under LlamaGen's names, plus how to compute.

    dtype: "float32" | "bfloat16", the compute dtype over float32 parameters.
    remat: "none" | "full" (keep layer inputs only) | "dots" (keep matmul outputs).
    attention: "auto" (the fused kernel of the devices, where it can be) | "xla" | "cudnn".
    Raises ValueError when the numbers do not fit together.
    """

    dim: Count = 768
    n_layer: Count = 12
    n_head: Count = 12
    n_kv_head: Count | None = None
    multiple_of: Count = 256
    ffn_dim_multiplier: Positive | None = None
    rope_base: Positive = 10000.0
    norm_eps: Positive = 1e-5
    initializer_range: NotNegative = 0.02
    token_dropout_p: Rate = 0.1
    attn_dropout_p: Rate = 0.0
    resid_dropout_p: Rate = 0.1
    ffn_dropout_p: Rate = 0.1
    drop_path_rate: Rate = 0.0
    num_classes: Count = 1000
    caption_dim: Count = 2048
    class_dropout_prob: Share = 0.1
    model_type: Literal["c2i", "t2i"] = "c2i"
    vocab_size: Vocabulary = 16384
    cls_token_num: Count = 1
    block_size: Count = 256
    dtype: Dtype = "float32"
    remat: Remat = "none"
    attention: Kernel = "auto"
    lora: LoRA | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "lora", settled(self.lora, fused_qkv=True))
        if self.model_type not in ("c2i", "t2i"):
            raise ValueError(f"model_type must be 'c2i' or 't2i', not {self.model_type!r}")
        if self.model_type == "c2i" and self.cls_token_num != 1:
            raise ValueError("a class condition is one position: cls_token_num must be 1")
        if math.isqrt(self.block_size) ** 2 != self.block_size:
            raise ValueError(f"block_size {self.block_size} is not a square grid of tokens")
        if self.dim % self.n_head or self.n_head % (self.n_kv_head or self.n_head):
            raise ValueError("n_head must divide dim, and n_kv_head must divide n_head")
        if (self.dim // self.n_head) % 4:
            raise ValueError("2D RoPE needs a head width divisible by 4")

    @property
    def hidden_dim(self) -> int:
        """SwiGLU width: two thirds of 4·dim, rounded up to `multiple_of`."""
        hidden = int(2 * (4 * self.dim) / 3)
        if self.ffn_dim_multiplier is not None:
            hidden = int(self.ffn_dim_multiplier * hidden)
        return -(-hidden // self.multiple_of) * self.multiple_of

    @property
    def block(self) -> BlockConfig:
        return BlockConfig(
            dim=self.dim,
            n_head=self.n_head,
            n_kv_head=self.n_kv_head or self.n_head,
            hidden_dim=self.hidden_dim,
            norm_eps=self.norm_eps,
            initializer_range=self.initializer_range,
            attn_dropout_p=self.attn_dropout_p,
            resid_dropout_p=self.resid_dropout_p,
            ffn_dropout_p=self.ffn_dropout_p,
            dtype=self.dtype,
            attention=self.attention,
            lora=self.lora,
        )


# LlamaGen's released sizes: LlamaConfig(**LLAMA_SIZES["GPT-XL"], block_size=576).
LLAMA_SIZES: dict[str, dict[str, int]] = {
    "GPT-B": {"n_layer": 12, "n_head": 12, "dim": 768},
    "GPT-L": {"n_layer": 24, "n_head": 16, "dim": 1024},
    "GPT-XL": {"n_layer": 36, "n_head": 20, "dim": 1280},
    "GPT-XXL": {"n_layer": 48, "n_head": 24, "dim": 1536},
    "GPT-XXXL": {"n_layer": 48, "n_head": 40, "dim": 2560},
    "GPT-1B": {"n_layer": 22, "n_head": 32, "dim": 2048},
    "GPT-3B": {"n_layer": 24, "n_head": 32, "dim": 3200},
    "GPT-7B": {"n_layer": 32, "n_head": 32, "dim": 4096},
}


class ClassEmbedding(nn.Module):
    """One learned row a class; the row after the last class means "no condition"."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, labels: Int[Array, " B"]) -> Float[Array, "B 1 D"]:
        c = self.config
        shape = (c.num_classes + (c.class_dropout_prob > 0), c.dim)
        table = self.param("embedding", nn.initializers.normal(c.initializer_range), shape)
        return jnp.take(table, labels, axis=0)[:, None].astype(c.dtype)


class CaptionEmbedding(nn.Module):
    """Two linear maps with GELU (tanh) between over text features, or over fixed ones for no caption.

    Those are drawn once and never trained: the released files hold them as a buffer.
    """

    config: LlamaConfig

    @nn.compact
    def __call__(self, condition: dict[str, Array]) -> Float[Array, "B P D"]:
        c = self.config
        shape = (c.cls_token_num, c.caption_dim)
        uncond = self.param("uncond_embedding", nn.initializers.normal(c.caption_dim**-0.5), shape)
        dropped = condition["dropped"][:, None, None]
        uncond = jax.lax.stop_gradient(uncond)
        x = jnp.where(dropped, uncond, condition["features"]).astype(c.dtype)
        x = nn.gelu(dense(c.dim, c.initializer_range, c.dtype, "fc1")(x), approximate=True)
        return dense(c.dim, c.initializer_range, c.dtype, "fc2")(x)


class Head(nn.Module):
    """The untied output layer; starts at zero, so an untrained model is exactly uniform."""

    vocab_size: int

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        kernel = self.param("kernel", nn.initializers.zeros, (x.shape[-1], self.vocab_size))
        return head_matmul(x, kernel)


class Llama(nn.Module):
    """The generator; `logits = Llama(config).apply({"params": params}, condition, context)`."""

    config: LlamaConfig

    def setup(self) -> None:
        c = self.config
        init = nn.initializers.normal(c.initializer_range)
        self.tok_embeddings = nn.Embed(c.vocab_size, c.dim, embedding_init=init)
        embedding = ClassEmbedding if c.model_type == "c2i" else CaptionEmbedding
        self.cls_embedding = embedding(c)
        self.tok_dropout = nn.Dropout(c.token_dropout_p)
        split = is_split(self.variables.get("params", {}))
        self.layers = scan_blocks(c.block, c.n_layer, c.remat, split)
        self.norm = RMSNorm(c.norm_eps, c.dtype)
        self.output = Head(c.vocab_size)

    def embed(self, condition: Condition) -> Float[Array, "B P D"]:
        """The conditioning positions."""
        return self.cls_embedding(condition)

    def embed_tokens(self, tokens: Int[Array, "B S"]) -> Float[Array, "B S D"]:
        """Looked up in float32: the gradient of a bfloat16 gather would be summed in bfloat16."""
        return self.tok_embeddings(tokens).astype(self.config.dtype)

    def hidden(
        self, condition: Condition, context: Int[Array, "B S"], deterministic: bool = True
    ) -> Float[Array, "B S+1 D"]:
        """What the output layer sees after 0, 1, .. S context tokens.

        deterministic=False applies dropout and stochastic depth and needs a "dropout" rng.
        """
        c = self.config
        x = jnp.concatenate([self.embed(condition), self.embed_tokens(context)], axis=1)
        x = self.tok_dropout(x, deterministic=deterministic)
        rope = rope_table(c)[: x.shape[1]]
        mask = None
        if c.model_type == "t2i":
            mask = causal_mask(condition["mask"], x.shape[1])
        rates = None
        if c.drop_path_rate > 0:
            rates = jnp.linspace(0.0, c.drop_path_rate, c.n_layer)
        x, _ = self.layers(x, rope, mask, deterministic, rates)
        return self.normalize(x[:, c.cls_token_num - 1 :])

    def normalize(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """The final norm."""
        x = self.norm(x)
        self.sow("intermediates", "hidden_norm", x)
        return x

    def read_out(self, x: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Final norm and head, float32 logits."""
        return self.output(self.normalize(x))

    def __call__(
        self, condition: Condition, context: Int[Array, "B S"], deterministic: bool = True
    ) -> Float[Array, "B S+1 V"]:
        """Teacher-forced logits of the tokens after 0, 1, .. S context tokens."""
        return self.output(self.hidden(condition, context, deterministic))


def rope_table(config: LlamaConfig) -> Float[Array, "S hd_half 2"]:
    """The rotations of all P + T positions."""
    grid = math.isqrt(config.block_size)
    head_dim = config.dim // config.n_head
    return rope_table_2d(grid, head_dim, config.rope_base, config.cls_token_num)


def prefill(
    config: LlamaConfig, params: Params, condition: Condition
) -> tuple[Float[Array, "B V"], KVCache]:
    """Logits of the first token, and the cache of the condition, with no room for more."""
    model, variables = Llama(config), outside_layers(params)
    prefix = config.cls_token_num
    slots = prefix + config.block_size - 1
    x = model.apply(variables, condition, method="embed")
    mask, visible = None, jnp.ones((1, slots), dtype=bool)
    if config.model_type == "t2i":
        mask = causal_mask(condition["mask"], prefix)
        batch = condition["mask"].shape[0]
        visible = jnp.concatenate(
            [condition["mask"], jnp.ones((batch, slots - prefix), dtype=bool)], axis=1
        )
    rope = rope_table(config)[:prefix]
    x, keys, values = prefill_blocks(config.block, params["layers"], x, rope, mask)
    cache = KVCache(keys, values, visible, jnp.full((1,), prefix, dtype=jnp.int32))
    return model.apply(variables, x[:, -1], method="read_out"), cache


def decode(
    config: LlamaConfig,
    params: Params,
    cache: KVCache,
    token: Int[Array, " B"],
    index: Int[Array, ""],
) -> tuple[Float[Array, "B V"], KVCache]:
    """Takes token `index` of the raster (0 .. T-2) in; returns the logits of token index + 1."""
    model, variables = Llama(config), outside_layers(params)
    position = config.cls_token_num + index
    rope = jax.lax.dynamic_slice_in_dim(rope_table(config), position, 1)
    x = model.apply(variables, token[:, None], method="embed_tokens")
    x, cache = step_blocks(config.block, params["layers"], x, rope, cache, position)
    return model.apply(variables, x[:, 0], method="read_out"), cache


NAME_RULES: tuple[Rule, ...] = (
    Rule(r"tok_embeddings/embedding", r"tok_embeddings.weight"),
    Rule(r"cls_embedding/embedding", r"cls_embedding.embedding_table.weight"),
    Rule(r"cls_embedding/(fc[12])/kernel", r"cls_embedding.cap_proj.\1.weight", "linear"),
    Rule(r"cls_embedding/uncond_embedding", r"cls_embedding.uncond_embedding"),
    Rule(r"layers/(attention|feed_forward)/(\w+)/kernel", r"layers.{layer}.\1.\2.weight", "linear"),
    Rule(r"layers/(attention_norm|ffn_norm)/scale", r"layers.{layer}.\1.weight"),
    Rule(r"norm/scale", r"norm.weight"),
    Rule(r"output/kernel", r"output.weight", "linear"),
)

# Reference names that are no parameters: tables and caches that some files carry.
IGNORED_NAMES: tuple[str, ...] = (
    r"freqs_cis",
    r"causal_mask",
    r"layers\.\d+\.attention\.kv_cache\.[kv]_cache",
)
