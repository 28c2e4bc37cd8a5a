"""Janus-Pro's image generator (arXiv 2501.17811): a Llama language model with image tokens.

Prompt tokens go through the language model's own embedding; image tokens through `gen_embed` and
`gen_aligner`; the hidden states through `gen_head` to image logits. RoPE is one-dimensional and
half-split, as in Hugging Face's Llama. The language model's text head (`lm_head`) generates no
image and is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from vapi_jax.common.options import (
    Count,
    Dtype,
    Natural,
    NotNegative,
    Positive,
    Vocabulary,
)
from vapi_jax.models.attention import Kernel, causal_mask
from vapi_jax.models.lora import LoRA, settled
from vapi_jax.models.transformer import (
    BlockConfig,
    KVCache,
    Remat,
    RMSNorm,
    head_matmul,
    outside_layers,
    prefill_blocks,
    scan_blocks,
    step_blocks,
)
from vapi_jax.parallel.fsdp import is_split
from vapi_jax.weights.names import Rule

Params = dict[str, Any]
Condition = Any  # {"tokens": Int[B, P], "mask": Bool[B, P]}, mask False = padding, either side


@dataclass(frozen=True)
class JanusConfig:
    """Hyper-parameters; the defaults are Janus-Pro-1B at 384x384, but for pad_id, which is the 7B's.

    hidden_dim: SwiGLU width. text_vocab_size: prompt tokens. image_embed_dim: width of gen_embed.
    aligner_dim, gen_head_dim: width inside gen_aligner and gen_head; None for that of the model.
    pad_id: the prompt token that stands for "no prompt" in classifier-free guidance.
    """

    dim: Count = 2048
    n_layer: Count = 24
    n_head: Count = 16
    n_kv_head: Count | None = None
    hidden_dim: Count = 5632
    text_vocab_size: Count = 102400
    vocab_size: Vocabulary = 16384
    image_embed_dim: Count = 8
    aligner_dim: Count | None = None
    gen_head_dim: Count | None = None
    num_tokens: Count = 576
    pad_id: Natural = 100015
    rope_base: Positive = 10000.0
    norm_eps: Positive = 1e-6
    initializer_range: NotNegative = 0.02
    dtype: Dtype = "float32"
    remat: Remat = "none"
    attention: Kernel = "auto"
    lora: LoRA | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "lora", settled(self.lora, fused_qkv=False))
        if self.dim % self.n_head or self.n_head % (self.n_kv_head or self.n_head):
            raise ValueError("n_head must divide dim, and n_kv_head must divide n_head")
        if not 0 <= self.pad_id < self.text_vocab_size:
            raise ValueError(f"pad_id {self.pad_id} is no token of {self.text_vocab_size}")

    @property
    def block(self) -> BlockConfig:
        return BlockConfig(
            dim=self.dim,
            n_head=self.n_head,
            n_kv_head=self.n_kv_head or self.n_head,
            hidden_dim=self.hidden_dim,
            norm_eps=self.norm_eps,
            initializer_range=self.initializer_range,
            fused_qkv=False,
            interleaved_rope=False,
            dtype=self.dtype,
            attention=self.attention,
            lora=self.lora,
        )


class MLP(nn.Module):
    """Linear, exact GELU, linear, with biases."""

    hidden: int
    features: int
    std: float
    dtype: str
    float32_out: bool = False

    def setup(self) -> None:
        init = nn.initializers.normal(self.std)
        self.fc1 = nn.Dense(self.hidden, dtype=self.dtype, kernel_init=init)
        if self.float32_out:
            self.fc2 = OutputLinear(self.features, self.std)
        else:
            self.fc2 = nn.Dense(self.features, dtype=self.dtype, kernel_init=init)

    def inner(self, x: Float[Array, "*B I"]) -> Float[Array, "*B H"]:
        """What the second linear map sees."""
        return nn.gelu(self.fc1(x), approximate=False)

    def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        return self.fc2(self.inner(x))


class OutputLinear(nn.Module):
    """A linear map to float32 logits from operands in the compute dtype."""

    features: int
    std: float

    @nn.compact
    def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B V"]:
        init = nn.initializers.normal(self.std)
        kernel = self.param("kernel", init, (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return head_matmul(x, kernel) + bias


class Janus(nn.Module):
    """The generator; `logits = Janus(config).apply({"params": params}, condition, context)`."""

    config: JanusConfig

    def setup(self) -> None:
        c = self.config
        init = nn.initializers.normal(c.initializer_range)
        self.text_embeddings = nn.Embed(c.text_vocab_size, c.dim, embedding_init=init)
        self.gen_embed = nn.Embed(c.vocab_size, c.image_embed_dim, embedding_init=init)
        self.gen_aligner = MLP(c.aligner_dim or c.dim, c.dim, c.initializer_range, c.dtype)
        split = is_split(self.variables.get("params", {}))
        self.layers = scan_blocks(c.block, c.n_layer, c.remat, split)
        self.norm = RMSNorm(c.norm_eps, c.dtype)
        inside = c.gen_head_dim or c.dim
        self.gen_head = MLP(inside, c.vocab_size, c.initializer_range, c.dtype, float32_out=True)

    def embed(self, condition: Condition) -> Float[Array, "B P D"]:
        """The prompt's positions."""
        return self.text_embeddings(condition["tokens"]).astype(self.config.dtype)

    def embed_tokens(self, tokens: Int[Array, "B S"]) -> Float[Array, "B S D"]:
        """Image tokens as the language model takes them."""
        return self.gen_aligner(self.gen_embed(tokens))

    def read_in(self, x: Float[Array, "*B D"]) -> Float[Array, "*B H"]:
        """Final norm and the first layer of the image head."""
        x = self.norm(x)
        self.sow("intermediates", "hidden_norm", x)
        return self.gen_head.inner(x)

    def read_out(self, x: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Final norm and image head, float32 logits."""
        return self.gen_head.fc2(self.read_in(x))

    def hidden(
        self,
        condition: Condition,
        context: Int[Array, "B S"],
        same_position: bool = False,
        count_padding: bool = False,
    ) -> Float[Array, "B T H"]:
        """What the last linear map sees.

        After 0 .. S context tokens (S + 1 places); with `same_position`, where context tokens
        0 .. S-1 themselves were fed (S of them).
        """
        prompt = condition["mask"]
        x = jnp.concatenate([self.embed(condition), self.embed_tokens(context)], axis=1)
        rope = rope_table(self.config, positions(prompt, context.shape[1], count_padding))
        x, _ = self.layers(x, rope, causal_mask(prompt, x.shape[1]), True, None)
        image = x[:, prompt.shape[1] :]
        if same_position:
            return self.read_in(image)
        first = last_of_prompt(x, prompt, count_padding)
        return self.read_in(jnp.concatenate([first[:, None], image], axis=1))

    def __call__(
        self,
        condition: Condition,
        context: Int[Array, "B S"],
        same_position: bool = False,
        count_padding: bool = False,
    ) -> Float[Array, "B T V"]:
        """Teacher-forced logits at the places of `hidden`."""
        return self.gen_head.fc2(self.hidden(condition, context, same_position, count_padding))


def positions(prompt: Bool[Array, "B P"], tokens: int, count_padding: bool) -> Int[Array, "B S"]:
    """The rotary position of every prompt and image position.

    Counted over real tokens, so that padding shifts nothing; or simply 0, 1, 2, ..
    """
    batch = prompt.shape[0]
    if count_padding:
        prompt = jnp.ones_like(prompt)
    real = jnp.concatenate([prompt, jnp.ones((batch, tokens), dtype=bool)], axis=1)
    return jnp.maximum(jnp.cumsum(real.astype(jnp.int32), axis=1) - 1, 0)


def last_of_prompt(
    x: Float[Array, "B S D"], prompt: Bool[Array, "B P"], count_padding: bool
) -> Float[Array, "B D"]:
    """The hidden state that predicts image token 0: at the last real prompt token."""
    width = prompt.shape[1]
    if count_padding:
        return x[:, width - 1]
    last = width - 1 - jnp.argmax(prompt[:, ::-1], axis=1)
    return jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]


def rope_table(config: JanusConfig, at: Int[Array, "B S"]) -> Float[Array, "B S hd_half 2"]:
    """(cos, sin) at the given positions."""
    head_dim = config.dim // config.n_head
    freqs = config.rope_base ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = at[..., None].astype(jnp.float32) * freqs
    return jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def prefill(
    config: JanusConfig, params: Params, condition: Condition, count_padding: bool = False
) -> tuple[Float[Array, "B V"], KVCache]:
    """Logits of the first image token, and the cache of the prompt, with no room for more."""
    model, variables = Janus(config), outside_layers(params)
    prompt = condition["mask"]
    batch, width = prompt.shape
    at = positions(prompt, 1, count_padding)
    x = model.apply(variables, condition, method="embed")
    rope = rope_table(config, at[:, :width])
    mask = causal_mask(prompt, width)
    x, keys, values = prefill_blocks(config.block, params["layers"], x, rope, mask)
    visible = jnp.concatenate(
        [prompt, jnp.ones((batch, config.num_tokens - 1), dtype=bool)], axis=1
    )
    cache = KVCache(keys, values, visible, at[:, width])
    first = last_of_prompt(x, prompt, count_padding)
    return model.apply(variables, first, method="read_out"), cache


def decode(
    config: JanusConfig,
    params: Params,
    cache: KVCache,
    token: Int[Array, " B"],
    index: Int[Array, ""],
) -> tuple[Float[Array, "B V"], KVCache]:
    """Takes image token `index` (0 .. T-2) in; returns the logits of index + 1."""
    model, variables = Janus(config), outside_layers(params)
    prefix = cache.visible.shape[1] - (config.num_tokens - 1)
    rope = rope_table(config, (cache.offset + index)[:, None])
    x = model.apply(variables, token[:, None], method="embed_tokens")
    x, cache = step_blocks(config.block, params["layers"], x, rope, cache, prefix + index)
    return model.apply(variables, x[:, 0], method="read_out"), cache


_LM = r"language_model.model."
NAME_RULES: tuple[Rule, ...] = (
    Rule(r"text_embeddings/embedding", _LM + r"embed_tokens.weight"),
    Rule(
        r"layers/attention/w([qkvo])/kernel",
        _LM + r"layers.{layer}.self_attn.\1_proj.weight",
        "linear",
    ),
    Rule(r"layers/feed_forward/w1/kernel", _LM + r"layers.{layer}.mlp.gate_proj.weight", "linear"),
    Rule(r"layers/feed_forward/w3/kernel", _LM + r"layers.{layer}.mlp.up_proj.weight", "linear"),
    Rule(r"layers/feed_forward/w2/kernel", _LM + r"layers.{layer}.mlp.down_proj.weight", "linear"),
    Rule(r"layers/attention_norm/scale", _LM + r"layers.{layer}.input_layernorm.weight"),
    Rule(r"layers/ffn_norm/scale", _LM + r"layers.{layer}.post_attention_layernorm.weight"),
    Rule(r"norm/scale", _LM + r"norm.weight"),
    Rule(r"gen_embed/embedding", r"gen_embed.weight"),
    Rule(r"gen_aligner/fc1/kernel", r"gen_aligner.layers.0.weight", "linear"),
    Rule(r"gen_aligner/fc1/bias", r"gen_aligner.layers.0.bias"),
    Rule(r"gen_aligner/fc2/kernel", r"gen_aligner.layers.2.weight", "linear"),
    Rule(r"gen_aligner/fc2/bias", r"gen_aligner.layers.2.bias"),
    Rule(r"gen_head/fc1/kernel", r"gen_head.output_mlp_projector.weight", "linear"),
    Rule(r"gen_head/fc1/bias", r"gen_head.output_mlp_projector.bias"),
    Rule(r"gen_head/fc2/kernel", r"gen_head.vision_head.weight", "linear"),
    Rule(r"gen_head/fc2/bias", r"gen_head.vision_head.bias"),
)

# Parts of a Janus checkpoint that generate no image, and the tokenizer, which `vq.py` reads.
IGNORED_NAMES: tuple[str, ...] = (
    r"language_model\.lm_head\..*",
    r"language_model\.model\..*rotary_emb\.inv_freq",
    r"vision_model\..*",
    r"aligner\..*",
    r"gen_vision_model\..*",
)
