"""The Llama-style transformer layer that the generators share.

The block, the scan over blocks, and the same block against a cache. Parameters are float32; `dtype` is what
the matmuls run in. How it attends is in `vapi_jax.models.attention`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from vapi_jax.models.attention import attend, attend_cached, attention_implementation, rotate
from vapi_jax.models.lora import Adapted, LoRA
from vapi_jax.parallel import fsdp

Remat = Literal["none", "full", "dots"]
"""What is kept of a layer for the backward pass: everything, its input, outputs of matmuls."""


@dataclass(frozen=True)
class BlockConfig:
    """What one transformer layer needs to know, whichever family it belongs to."""

    dim: int
    n_head: int
    n_kv_head: int
    hidden_dim: int
    norm_eps: float
    initializer_range: float = 0.02
    fused_qkv: bool = True  # one wqkv kernel, or wq, wk, wv
    interleaved_rope: bool = True  # pairs (0,1),(2,3).. or (i, i + hd/2)
    attn_dropout_p: float = 0.0
    resid_dropout_p: float = 0.0
    ffn_dropout_p: float = 0.0
    dtype: str = "float32"
    attention: str = "auto"
    lora: LoRA | None = None

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_head


class RMSNorm(nn.Module):
    """x / rms(x) · scale, in float32 whatever the input."""

    eps: float
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return (x32 * scale).astype(self.dtype)


def dense(features: int, std: float, dtype: str, name: str | None = None) -> nn.Dense:
    """A linear map without bias, weights from N(0, std)."""
    init = nn.initializers.normal(std)
    return nn.Dense(features, use_bias=False, dtype=dtype, kernel_init=init, name=name)


def layer_dense(c: BlockConfig, which: str, features: int, name: str | None = None) -> nn.Module:
    """The linear map `which` of a layer, with an adapter where one is asked for."""
    if c.lora is None or not c.lora.adapts(which):
        return dense(features, c.initializer_range, c.dtype, name)
    return Adapted(features, c.lora, c.initializer_range, c.dtype, name=name)


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions."""

    config: BlockConfig

    def setup(self) -> None:
        c = self.config
        kv_dim = c.n_kv_head * c.head_dim
        if c.fused_qkv:
            self.wqkv = layer_dense(c, "wqkv", c.dim + 2 * kv_dim)
        else:
            self.wq = layer_dense(c, "wq", c.dim)
            self.wk = layer_dense(c, "wk", kv_dim)
            self.wv = layer_dense(c, "wv", kv_dim)
        self.wo = layer_dense(c, "wo", c.dim)
        self.resid_dropout = nn.Dropout(c.resid_dropout_p)

    def project(self, x: Array, rope: Array) -> tuple[Array, Array, Array]:
        """[B, S, D] -> rotated queries [B, S, H, hd] and keys, and values [B, S, KV, hd]."""
        c = self.config
        kv_dim = c.n_kv_head * c.head_dim
        if c.fused_qkv:
            q, k, v = jnp.split(self.wqkv(x), [c.dim, c.dim + kv_dim], axis=-1)
        else:
            q, k, v = self.wq(x), self.wk(x), self.wv(x)
        q, k, v = (y.reshape(*x.shape[:2], -1, c.head_dim) for y in (q, k, v))
        return rotate(q, rope, c.interleaved_rope), rotate(k, rope, c.interleaved_rope), v

    def __call__(
        self, x: Array, rope: Array, mask: Array | None, deterministic: bool
    ) -> tuple[Array, Array, Array]:
        """Whole sequence; returns the output and the keys and values it attended to."""
        c = self.config
        if c.attn_dropout_p > 0 and not deterministic:
            raise NotImplementedError(
                "attn_dropout_p > 0: the fused attention kernels have no dropout; set it to 0"
            )
        q, k, v = self.project(x, rope)
        out = attend(q, k, v, mask, attention_implementation(c.attention, c.dtype, c.head_dim))
        out = self.wo(out.reshape(*x.shape[:2], c.dim))
        return self.resid_dropout(out, deterministic=deterministic), k, v

    def step(
        self, x: Array, rope: Array, keys: Array, values: Array, position: Array, visible: Array
    ) -> tuple[Array, Array, Array]:
        """One position [B, 1, D] against the cache [B, KV, N, hd], which it is first written to."""
        q, k, v = self.project(x, rope)
        start = (0, 0, position, 0)
        keys = jax.lax.dynamic_update_slice(keys, k.swapaxes(1, 2).astype(keys.dtype), start)
        values = jax.lax.dynamic_update_slice(values, v.swapaxes(1, 2).astype(values.dtype), start)
        out = attend_cached(q[:, 0], keys, values, visible)
        return self.wo(out.reshape(x.shape)), keys, values


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) · w3 x)."""

    config: BlockConfig

    @nn.compact
    def __call__(self, x: Array, deterministic: bool) -> Array:
        c = self.config
        gate = layer_dense(c, "w1", c.hidden_dim, "w1")(x)
        up = layer_dense(c, "w3", c.hidden_dim, "w3")(x)
        out = layer_dense(c, "w2", c.dim, "w2")(nn.silu(gate) * up)
        return nn.Dropout(c.ffn_dropout_p)(out, deterministic=deterministic)


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each with a residual connection."""

    config: BlockConfig

    def setup(self) -> None:
        c = self.config
        self.attention_norm = RMSNorm(c.norm_eps, c.dtype)
        self.attention = Attention(c)
        self.ffn_norm = RMSNorm(c.norm_eps, c.dtype)
        self.feed_forward = FeedForward(c)

    def drop_path(self, branch: Array, rate: Array | None, deterministic: bool) -> Array:
        """Stochastic depth: a sample loses the whole branch, survivors are scaled up."""
        if deterministic or rate is None:
            return branch
        keep = 1.0 - rate
        kept = jax.random.bernoulli(self.make_rng("dropout"), keep, (branch.shape[0], 1, 1))
        return jnp.where(kept, branch / keep, 0.0).astype(branch.dtype)

    def __call__(
        self,
        x: Float[Array, "B S D"],
        rope: Float[Array, "... hd_half 2"],
        mask: Bool[Array, "B 1 S S"] | None,
        deterministic: bool,
        drop_path_rate: Float[Array, ""] | None,
    ) -> tuple[Float[Array, "B S D"], None]:
        """In the shape `nn.scan` wants: (carry, inputs) -> (carry, nothing)."""
        out, _, _ = self.attention(self.attention_norm(x), rope, mask, deterministic)
        x = x + self.drop_path(out, drop_path_rate, deterministic)
        out = self.feed_forward(self.ffn_norm(x), deterministic)
        x = x + self.drop_path(out, drop_path_rate, deterministic)
        self.sow("intermediates", "hidden", x)
        return x, None

    def prefill(self, x: Array, rope: Array, mask: Array | None) -> tuple[Array, Array, Array]:
        """As `__call__` without dropout, and also the keys and values [B, S, KV, hd]."""
        out, k, v = self.attention(self.attention_norm(x), rope, mask, True)
        x = x + out
        return x + self.feed_forward(self.ffn_norm(x), True), k, v

    def step(self, x: Array, *args: Array) -> tuple[Array, Array, Array]:
        """One position; see `Attention.step`."""
        out, keys, values = self.attention.step(self.attention_norm(x), *args)
        x = x + out
        return x + self.feed_forward(self.ffn_norm(x), True), keys, values


_REMAT_POLICIES = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def scan_blocks(config: BlockConfig, n_layer: int, remat: str, split: bool = False) -> nn.Module:
    """`n_layer` blocks under one set of stacked parameters [L, ...], compiled once.

    With `split`, parameters come as `fsdp.view` makes them, and each layer gathers its own.
    """
    if remat not in ("none", *_REMAT_POLICIES):
        raise ValueError(f"remat must be 'none', 'full' or 'dots', not {remat!r}")
    block: Any = Block
    policy = _REMAT_POLICIES.get(remat)
    if split:
        block = nn.map_variables(Block, "params", trans_in_fn=_assemble)
        if remat == "none":
            policy = fsdp.keep_all_but_gathered
    if split or remat != "none":
        block = nn.remat(block, prevent_cse=False, static_argnums=(4,), policy=policy)
    return nn.scan(
        block,
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(nn.broadcast, nn.broadcast, nn.broadcast, 0),
        length=n_layer,
    )(config)


def _assemble(variables: Any) -> dict[str, Any]:
    return {"params": fsdp.assemble(variables["params"])}


@jax.custom_vjp
def head_matmul(x: Float[Array, "*B D"], kernel: Float[Array, "D V"]) -> Float[Array, "*B V"]:
    """Logits accumulated in float32 from operands in the compute dtype.

    The cotangent is rounded to the compute dtype first: left in float32 it would drag both
    backward matmuls of the largest layer to float32 speed.
    """
    return jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)


def _head_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return head_matmul(x, kernel), (x, kernel)


def _head_backward(saved: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    x, kernel = saved
    g = cotangent.astype(x.dtype)
    dx = jnp.matmul(g, kernel.astype(x.dtype).T)
    flat_x, flat_g = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    dw = jnp.matmul(flat_x.T, flat_g, preferred_element_type=jnp.float32)
    return dx, dw.astype(kernel.dtype)


head_matmul.defvjp(_head_forward, _head_backward)


# Cached generation -------------------------------------------------------------------------------


@struct.dataclass
class KVCache:
    """Keys and values of every layer, one buffer a layer: XLA updates separate buffers in place,
    and a stacked one as scan input and output is copied at every step.

    `visible` has all slots that there will ever be; the buffers have those that are needed so far.
    """

    keys: tuple[Float[Array, "B KV N hd"], ...]
    values: tuple[Float[Array, "B KV N hd"], ...]
    visible: Bool[Array, "#B M"]  # False for padding of the condition
    offset: Int[Array, "#B"]  # what a kind counts its positions from

    def grown(self, slots: int) -> KVCache:
        """The same with buffers of `slots` positions, which are no fewer than they have."""

        def pad(x: Array) -> Array:
            return jnp.pad(x, ((0, 0), (0, 0), (0, slots - x.shape[2]), (0, 0)))

        keys, values = (tuple(map(pad, buffers)) for buffers in (self.keys, self.values))
        return dataclasses.replace(self, keys=keys, values=values)


def unstack(layers: Any) -> tuple[Any, ...]:
    """Parameters stacked by `scan_blocks`, a tree for every layer; what is unstacked stays."""
    if isinstance(layers, tuple):
        return layers
    count = jax.tree.leaves(layers)[0].shape[0]
    return tuple(jax.tree.map(itemgetter(n), layers) for n in range(count))


def outside_layers(params: Any) -> dict[str, Any]:
    """The variables of a generator's module but for its layers, which may be unstacked."""
    return {"params": {name: tree for name, tree in params.items() if name != "layers"}}


def prefill_blocks(
    config: BlockConfig,
    layers: Any,
    x: Float[Array, "B P D"],
    rope: Float[Array, "... hd_half 2"],
    mask: Bool[Array, "B 1 P P"] | None,
) -> tuple[Float[Array, "B P D"], tuple[Array, ...], tuple[Array, ...]]:
    """Runs the condition through all layers; returns the output and caches of its P positions."""
    keys, values = [], []
    for params in unstack(layers):
        x, k, v = Block(config).apply({"params": params}, x, rope, mask, method="prefill")
        keys.append(k.swapaxes(1, 2))
        values.append(v.swapaxes(1, 2))
    return x, tuple(keys), tuple(values)


def step_blocks(
    config: BlockConfig,
    layers: Any,
    x: Float[Array, "B 1 D"],
    rope: Float[Array, "... hd_half 2"],
    cache: KVCache,
    position: Int[Array, ""],
) -> tuple[Float[Array, "B 1 D"], KVCache]:
    """One new position through all layers, at cache slot `position`."""
    slots = cache.keys[0].shape[2]
    visible = cache.visible[:, :slots] & (jnp.arange(slots) <= position)
    keys, values = [], []
    for params, k, v in zip(unstack(layers), cache.keys, cache.values, strict=True):
        args = (x, rope, k, v, position, visible)
        x, k, v = Block(config).apply({"params": params}, *args, method="step")
        keys.append(k)
        values.append(v)
    return x, dataclasses.replace(cache, keys=tuple(keys), values=tuple(values))
