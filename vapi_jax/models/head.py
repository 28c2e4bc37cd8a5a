"""The output layer over a large vocabulary, without ever holding all of its logits.

VA-π needs few numbers of the [B, T, V] logits: G draws per position, the log-probabilities of those
and of the true token, and the entropy. They are taken from blocks of positions, each block's logits
being computed, used and dropped; the backward pass computes a block again. At LlamaGen-XXL's sizes
the whole array would take 4.8 GB for 128 images, a block takes 256 MB at most, and the second
computation costs 0.3 % of a step.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vapi_jax.models import categorical
from vapi_jax.models.transformer import head_matmul

BLOCK_LOGITS = 2**26
"""Most float32 logits of a block: 256 MB."""


class Head(NamedTuple):
    """A linear map to logits."""

    kernel: Float[Array, "D V"]
    bias: Float[Array, " V"] | None = None


def project(hidden: Float[Array, "*B D"], head: Head) -> Float[Array, "*B V"]:
    """All logits, float32, accumulated in float32 from operands in the dtype of `hidden`."""
    logits = head_matmul(hidden, head.kernel)
    return logits if head.bias is None else logits + head.bias


def block_length(batch: int, length: int, vocab: int, limit: int = BLOCK_LOGITS) -> int:
    """Positions of a block: the largest divisor of `length` that keeps it within `limit` logits."""
    most = max(limit // (batch * vocab), 1)
    return max(n for n in range(1, length + 1) if length % n == 0 and (n <= most or n == 1))


def _over_blocks(function: Callable[..., Any], size: int, carry: Any, *arrays: Array) -> Any:
    """`function(carry, *blocks) -> (carry, outputs)` over blocks of `size` along axis 1.

    Outputs keep their leading [B, T, ...]. One block makes no loop.
    """
    batch, length = arrays[0].shape[:2]
    if size == length:
        return function(carry, *arrays)

    def split(x: Array) -> Array:  # [B, T, ...] -> [T/size, B, size, ...]
        return jnp.moveaxis(x.reshape(batch, length // size, size, *x.shape[2:]), 1, 0)

    def join(x: Array) -> Array:
        return jnp.moveaxis(x, 0, 1).reshape(batch, length, *x.shape[3:])

    blocks = tuple(split(x) for x in arrays)
    carry, outputs = jax.lax.scan(lambda c, xs: function(c, *xs), carry, blocks)
    return carry, jax.tree.map(join, outputs)


def blockwise(
    function: Callable[..., Any], vocab: int, *arrays: Array, limit: int = BLOCK_LOGITS
) -> Any:
    """`function(*blocks)` of arrays [B, T, ...], a block of positions at a time, and differentiable.

    For functions that make logits of `vocab` tokens and return a tree of [B, T, ...]. The backward pass
    computes a block again.
    """
    size = block_length(arrays[0].shape[0], arrays[0].shape[1], vocab, limit)
    again = jax.checkpoint(function)
    return _over_blocks(lambda carry, *blocks: (carry, again(*blocks)), size, None, *arrays)[1]


def token_entropy(
    hidden: Float[Array, "B T D"], head: Head, temperature: float | Float[Array, ""] = 1.0
) -> Float[Array, "B T"]:
    """The entropy of softmax(logits / temperature) at every position, in nats; differentiable."""

    def block(hidden: Array) -> Array:
        return categorical.entropy(project(hidden, head), temperature)

    return blockwise(block, head.kernel.shape[1], hidden)


def exact_kl(
    hidden: Float[Array, "B T D"],
    head: Head,
    base_hidden: Float[Array, "B T D"],
    base_head: Head,
    direction: str = "reverse",
    temperature: float | Float[Array, ""] = 1.0,
    limit: int = BLOCK_LOGITS,
) -> Float[Array, "B T"]:
    """KL(π || base), "reverse", or KL(base || π), "forward", at every position; differentiable in π."""

    def block(hidden: Array, base_hidden: Array) -> Array:
        own, base = (
            jax.nn.log_softmax(project(x, h) / temperature, axis=-1)
            for x, h in ((hidden, head), (base_hidden, base_head))
        )
        p, q = (own, base) if direction == "reverse" else (base, own)
        return jnp.sum(jnp.exp(p) * (p - q), axis=-1)

    return blockwise(block, head.kernel.shape[1], hidden, base_hidden, limit=limit)


def draw(
    hidden: Float[Array, "B T D"],
    head: Head,
    uniforms: Float[Array, "B T G C"],
    temperature: float | Float[Array, ""] = 1.0,
    limit: int = BLOCK_LOGITS,
) -> tuple[Int[Array, "B G T"], Float[Array, "B T"]]:
    """G draws of every position from softmax(logits / temperature), and its entropy in nats.

    As `categorical.draw` draws from all logits; no gradient flows.
    """
    hidden = jax.lax.stop_gradient(hidden)
    head = jax.tree.map(jax.lax.stop_gradient, head)

    def block(carry: None, hidden: Array, uniforms: Array) -> tuple[None, tuple[Array, Array]]:
        logits = project(hidden, head)
        samples = categorical.draw(uniforms, logits / temperature)
        return carry, (samples, categorical.entropy(logits, temperature))

    size = block_length(hidden.shape[0], hidden.shape[1], head.kernel.shape[1], limit)
    with jax.named_scope("draw"):
        _, (samples, entropy) = _over_blocks(block, size, None, hidden, uniforms)
    return jnp.swapaxes(samples, 1, 2), entropy


def token_log_probs(
    hidden: Float[Array, "B T D"],
    head: Head,
    tokens: Int[Array, "B K T"],
    temperature: float | Float[Array, ""] = 1.0,
    limit: int = BLOCK_LOGITS,
) -> Float[Array, "B K T"]:
    """log softmax(logits / temperature) of K tokens at every position, float32.

    What `categorical.token_log_probs` gives of all logits, to rounding, in value and gradient (of `hidden`
    and `head`, none of the temperature).
    """
    chosen = jnp.swapaxes(tokens, 1, 2)
    temperature = jax.lax.stop_gradient(jnp.float32(temperature))
    with jax.named_scope("head"):
        logps, _ = _log_probs(hidden, head.kernel, head.bias, chosen, temperature, None, limit)
    return jnp.swapaxes(logps, 1, 2)


def cross_entropy_and_entropy(
    hidden: Float[Array, "B T D"],
    head: Head,
    tokens: Int[Array, "B T"],
    temperature: float | Float[Array, ""] = 1.0,
    limit: int = BLOCK_LOGITS,
) -> tuple[Float[Array, " B"], Float[Array, "B T"]]:
    """The cross-entropy of every image, and the entropy of sampling from it, in one pass over blocks.

    What `categorical.cross_entropy` (of the model itself, whatever the temperature) and
    `categorical.entropy` (of softmax(logits / temperature)) give of all logits. A gradient flows
    through the cross-entropy alone.
    """
    one, temperature = jnp.float32(1.0), jax.lax.stop_gradient(jnp.float32(temperature))
    with jax.named_scope("head"):
        logps, entropy = _log_probs(
            hidden, head.kernel, head.bias, tokens[..., None], one, temperature, limit
        )
    return -logps[..., 0].mean(axis=-1), jax.lax.stop_gradient(entropy)


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def _log_probs(
    hidden: Array,
    kernel: Array,
    bias: Array | None,
    tokens: Array,
    temperature: Array,
    entropy_temperature: Array | None,
    limit: int,
) -> tuple[Array, Any]:
    """Log-probabilities [B, T, K] and, where a temperature for it is given, the entropy [B, T]."""
    args = (hidden, kernel, bias, tokens, temperature, entropy_temperature, limit)
    return _forward(*args)[0]


def _forward(
    hidden: Array,
    kernel: Array,
    bias: Array | None,
    tokens: Array,
    temperature: Array,
    entropy_temperature: Array | None,
    limit: int,
) -> tuple[tuple[Array, Any], tuple[Any, ...]]:
    def block(carry: None, hidden: Array, tokens: Array) -> tuple[None, tuple[Any, ...]]:
        raw = project(hidden, Head(kernel, bias))
        logits = raw / temperature
        total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        entropy = None
        if entropy_temperature is not None:
            entropy = categorical.entropy(raw, entropy_temperature)
        return carry, (jnp.take_along_axis(logits, tokens, axis=-1) - total, entropy, total)

    size = block_length(hidden.shape[0], hidden.shape[1], kernel.shape[1], limit)
    _, (logps, entropy, totals) = _over_blocks(block, size, None, hidden, tokens)
    return (logps, entropy), (hidden, kernel, bias, tokens, temperature, totals)


def _backward(limit: int, saved: tuple[Any, ...], cotangents: tuple[Array, Any]) -> tuple[Any, ...]:
    """Of Σ c_k (l[x_k] - logsumexp l): c_k at x_k, minus (Σ c_k) softmax(l); none of the entropy.

    The policy gradient alone is sparse in the vocabulary, for the advantages of a group sum to
    zero; the dense part is that of the cross-entropy. Rounded to the compute dtype, or float32 would
    drag both matmuls of the largest layer to its speed.
    """
    hidden, kernel, bias, tokens, temperature, totals = saved
    cotangent, _ = cotangents
    narrow = kernel.astype(hidden.dtype)

    def block(
        carry: tuple[Array, Array], hidden: Array, tokens: Array, totals: Array, given: Array
    ) -> tuple[tuple[Array, Array], Array]:
        logits = project(hidden, Head(kernel, bias)) / temperature
        slope = -given.sum(axis=-1, keepdims=True) * jnp.exp(logits - totals)
        batch, length, vocab = slope.shape
        rows = jnp.arange(batch * length)[:, None]
        flat = slope.reshape(-1, vocab)
        flat = flat.at[rows, tokens.reshape(batch * length, -1)].add(
            given.reshape(batch * length, -1)
        )
        flat = flat / temperature
        d_kernel, d_bias = carry
        d_bias = d_bias + flat.sum(axis=0)
        flat = flat.astype(hidden.dtype)
        rows_of_hidden = hidden.reshape(batch * length, -1)
        d_kernel = d_kernel + jnp.matmul(rows_of_hidden.T, flat, preferred_element_type=jnp.float32)
        d_hidden = jnp.matmul(flat, narrow.T).reshape(hidden.shape)
        return (d_kernel, d_bias), d_hidden

    zeros = (jnp.zeros(kernel.shape, jnp.float32), jnp.zeros(kernel.shape[1:], jnp.float32))
    size = block_length(hidden.shape[0], hidden.shape[1], kernel.shape[1], limit)
    (d_kernel, d_bias), d_hidden = _over_blocks(
        block, size, zeros, hidden, tokens, totals, cotangent
    )
    return (
        d_hidden,
        d_kernel.astype(kernel.dtype),
        None if bias is None else d_bias.astype(bias.dtype),
        None,
        None,
        None,
    )


_log_probs.defvjp(_forward, _backward)
