"""Attention over a whole sequence and against a cache, the kernel that does it, and rotary positions."""

from __future__ import annotations

import re
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vapi_jax.models.splash import LANES, attend_splash

Kernel = Literal["auto", "xla", "cudnn"]
"""As in a configuration."""
Implementation = Literal["xla", "cudnn", "splash"]
"""As settled for devices."""


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
