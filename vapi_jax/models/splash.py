"""Causal attention on TPUs that never writes [B, H, S, S]: JAX's splash kernel, and what it asks for."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxtyping import Array, Bool, Float

LANES = 128
"""The kernel's blocks are multiples of it."""

BLOCK = 640
"""Longest block: LlamaGen's 576 positions at 384 px in one, with room for the backward pass in VMEM."""


def attend_splash(
    q: Float[Array, "B S H hd"],
    k: Float[Array, "B S KV hd"],
    v: Float[Array, "B S KV hd"],
    visible: Bool[Array, "B S"] | None = None,
    interpret: bool = False,
) -> Float[Array, "B S H hd"]:
    """Causal attention over a whole sequence, on one device's own rows.

    Args:
      q, k, v: queries, keys and values. A compiler cannot divide this kernel over devices.
      visible: positions that may be attended to; None for all. A row that sees none of them is
        finite, and means nothing.
      interpret: run the kernel as ordinary operations, on any device.
    """
    length, heads = q.shape[1], q.shape[2]
    blocks = -(-length // BLOCK)
    block = -(-length // (blocks * LANES)) * LANES
    padded = blocks * block

    def laid_out(x: Array) -> Array:  # [B, S, H, hd] -> [B, H, padded, hd]
        return jnp.pad(x, ((0, 0), (0, padded - length), (0, 0), (0, 0))).swapaxes(1, 2)

    kernel = splash.make_splash_mha_single_device(
        masks.MultiHeadMask([masks.CausalMask((padded, padded))] * heads),
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        interpret=interpret,
    )
    segments = None
    if visible is not None:
        ids = jnp.pad(visible.astype(jnp.int32), ((0, 0), (0, padded - length)))
        segments = splash.SegmentIds(q=jnp.ones_like(ids), kv=ids)
    scaled = q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
    out = jax.vmap(kernel)(laid_out(scaled), laid_out(k), laid_out(v), segments)
    return out.swapaxes(1, 2)[:, :length]
