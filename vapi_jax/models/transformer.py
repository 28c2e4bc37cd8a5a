"""The Llama-style transformer layer that the generators share.

Rotary positions, attention over a whole sequence and against a cache, the block, and the scan
over blocks. Parameters are float32; `dtype` is what the matmuls run in.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from vapi_jax.models.lora import Adapted, LoRA
from vapi_jax.models.splash import LANES, attend_splash
from vapi_jax.parallel import fsdp

Remat = Literal["none", "full", "dots"]
"""What is kept of a layer for the backward pass: everything, its input, outputs of matmuls."""

Kernel = Literal["auto", "xla", "cudnn"]


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


# Rotary position embedding -----------------------------------------------------------------------


def rope_table_2d(
    grid: int, head_dim: int, base: float, prefix: int
) -> Float[Array, "S hd_half 2"]:
    """(cos, sin) per position: first half of the pairs turns with the row, second with the column.

    The `prefix` conditioning positions get zeros for BOTH cos and sin, so their queries and keys
    vanish and image tokens give them a score of exactly 0.
    """
    half = head_dim // 2
    freqs = 1.0 / base ** (jnp.arange(0, half, 2, dtype=jnp.float32) / half)
    angles = jnp.arange(grid, dtype=jnp.float32)[:, None] * freqs  # [grid, hd/4]
    rows = jnp.repeat(angles, grid, axis=0)
    columns = jnp.tile(angles, (grid, 1))
    angles = jnp.concatenate([rows, columns], axis=-1)
    table = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=-1)
    return jnp.concatenate([jnp.zeros((prefix, half, 2), jnp.float32), table])


def rotate(
    x: Float[Array, "B S H hd"], rope: Float[Array, "... hd_half 2"], interleaved: bool
) -> Float[Array, "B S H hd"]:
    """Turns query or key pairs, in float32; `rope` has a leading B where samples differ."""
    cos, sin = rope[..., None, :, 0], rope[..., None, :, 1]
    x32 = x.astype(jnp.float32)
    if interleaved:
        pairs = x32.reshape(*x.shape[:-1], -1, 2)
        a, b = pairs[..., 0], pairs[..., 1]
        out = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape)
    else:
        a, b = jnp.split(x32, 2, axis=-1)
        out = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return out.astype(x.dtype)


# Attention ---------------------------------------------------------------------------------------


Implementation = Literal["xla", "cudnn", "splash"]


def has_cudnn_attention(device: Any) -> bool:
    """Whether cuDNN's fused kernel runs on a device: an NVIDIA GPU from Ampere (8.0) on.

    Other vendors' GPUs are of platform "gpu" as well, and call their capability "gfx942" or the like.
    """
    capability = re.fullmatch(r"(\d+)\.\d+", str(getattr(device, "compute_capability", "")))
    return device.platform == "gpu" and capability is not None and int(capability[1]) >= 8


def attention_implementation(
    requested: str, dtype: str, head_dim: int, device: Any = None, alone: bool = False
) -> Implementation:
    """Resolves "auto" | "xla" | "cudnn".

    cuDNN's fused kernel, and the TPU's, are taken for 16-bit floats and heads of 8, 16, .. 128.

    Args:
      requested: as in a configuration, or what was resolved before.
      dtype: of queries, keys and values.
      head_dim: width of a head.
      device: one of those that the program is for, which need not be there. None takes the default
        one for "auto", and "cudnn" as settled.
      alone: the program is one device's own, which the TPU's kernel needs: no compiler can divide it.

    Raises:
      ValueError: for another request, or cuDNN where it cannot be.
    """
    fits = jnp.dtype(dtype).itemsize == 2 and head_dim % 8 == 0 and head_dim <= 128
    if requested == "xla":
        return "xla"
    if requested == "splash":
        return "splash"
    if requested == "auto":
        device = device or jax.devices()[0]
        if fits and device.platform == "tpu" and alone:
            return "splash"
        return "cudnn" if fits and has_cudnn_attention(device) else "xla"
    if requested != "cudnn":
        raise ValueError(f"attention must be 'auto', 'xla' or 'cudnn', not {requested!r}")
    if not fits or not (device is None or has_cudnn_attention(device)):
        kind = "" if device is None else f"{device.device_kind}, "
        raise ValueError(
            "cudnn attention needs an NVIDIA GPU of compute capability 8.0 or more, a 16-bit dtype and "
            f"a head width that is a multiple of 8 up to 128; got {kind}{dtype}, {head_dim}"
        )
    return "cudnn"


def attend(
    q: Float[Array, "B S H hd"],
    k: Float[Array, "B S KV hd"],
    v: Float[Array, "B S KV hd"],
    mask: Bool[Array, "B 1 S S"] | None,
    implementation: Implementation,
) -> Float[Array, "B S H hd"]:
    """Causal attention over a whole sequence. `mask` None: plainly causal, no mask array exists."""
    length = q.shape[1]
    if implementation == "splash":
        if length >= LANES:
            # The last position sees all that may be seen at all.
            return attend_splash(q, k, v, None if mask is None else mask[:, 0, -1])
        implementation = "xla"
    if implementation == "cudnn" and mask is not None:
        q, k, v, mask = pad_to_even(q, k, v, mask)
    out = jax.nn.dot_product_attention(
        q, k, v, mask=mask, is_causal=mask is None, implementation=implementation
    )
    return out[:, :length]


def pad_to_even(
    q: Array, k: Array, v: Array, mask: Bool[Array, "B 1 S S"]
) -> tuple[Array, Array, Array, Bool[Array, "B 1 S_even S_even"]]:
    """Adds, at odd lengths, a position that only sees itself: cuDNN's masks are of even length."""
    length = mask.shape[-1]
    pad = length % 2
    q, k, v = (jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))) for x in (q, k, v))
    mask = jnp.pad(mask, ((0, 0), (0, 0), (0, pad), (0, pad)))
    alone = (jnp.arange(length + pad) >= length) & jnp.eye(length + pad, dtype=bool)
    return q, k, v, mask | alone


def attend_cached(
    q: Float[Array, "B H hd"],
    k: Float[Array, "B KV N hd"],
    v: Float[Array, "B KV N hd"],
    visible: Bool[Array, "#B N"],
) -> Float[Array, "B H hd"]:
    """One query per sample against a cache of `N` slots, of which `visible` ones take part.

    In this layout the batched dot is the fast form on CPU too (1.5 ms a layer at B=256, H=6, N=64,
    hd=32; multiply-and-sum, into which XLA fuses the softmax and then recomputes it, took 45 ms).
    """
    batch, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    grouped = q.reshape(batch, kv_heads, heads // kv_heads, head_dim)
    scores = jnp.einsum("bkrd,bknd->bkrn", grouped, k, preferred_element_type=jnp.float32)
    scores = jnp.where(visible[:, None, None], scores * head_dim**-0.5, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("bkrn,bknd->bkrd", weights, v)
    return out.reshape(batch, heads, head_dim)


def causal_mask(prefix_mask: Bool[Array, "B P"], length: int) -> Bool[Array, "B 1 S S"]:
    """Causal over `length` positions, with padding among the first `P` hidden as keys.

    A row that would see nothing (left padding) sees itself, for a softmax over nothing is NaN.
    """
    batch, prefix = prefix_mask.shape
    keys = jnp.concatenate([prefix_mask, jnp.ones((batch, length - prefix), dtype=bool)], axis=1)
    seen = jnp.tril(jnp.ones((length, length), dtype=bool)) & keys[:, None, :]
    blind = ~jnp.any(seen, axis=-1, keepdims=True)
    return (seen | (blind & jnp.eye(length, dtype=bool)))[:, None]


# Layers ------------------------------------------------------------------------------------------


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
