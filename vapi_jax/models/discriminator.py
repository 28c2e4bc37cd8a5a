"""The PatchGAN discriminator of pix2pix, against which LlamaGen trains its tokenizer.

It judges overlapping patches: each logit sees about 70 x 70 pixels with three layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vapi_jax.weights.names import Rule


def _scale_init(rng: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    return 1.0 + 0.02 * jax.random.normal(rng, shape, dtype)


class BatchNorm(nn.Module):
    """Batch normalisation as PyTorch defines it.

    The batch is normalised by its biased variance, while the running variance takes the unbiased
    one; flax's own layer keeps the biased one. Parameters `scale`, `bias` [C]; statistics `mean`,
    `var` [C] in 'batch_stats'. `momentum` is the share of the newest batch.
    """

    momentum: float = 0.1
    epsilon: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], train: bool) -> Float[Array, "B H W C"]:
        width = x.shape[-1]
        scale = self.param("scale", _scale_init, (width,))
        bias = self.param("bias", nn.initializers.zeros_init(), (width,), jnp.float32)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (width,), jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, (width,), jnp.float32)
        x = x.astype(jnp.float32)
        if train:
            mean = x.mean((0, 1, 2))
            var = jnp.square(x - mean).mean((0, 1, 2))
            if self.is_mutable_collection("batch_stats") and not self.is_initializing():
                count = x.size // width
                unbiased = var * (count / max(count - 1, 1))
                running_mean.value += self.momentum * (mean - running_mean.value)
                running_var.value += self.momentum * (unbiased - running_var.value)
        else:
            mean, var = running_mean.value, running_var.value
        normal = (x - mean) * jax.lax.rsqrt(var + self.epsilon)
        return (normal * scale + bias).astype(self.dtype)


class PatchGAN(nn.Module):
    """Images [B, H, W, 3] in [-1, 1] to patch logits [B, h, w, 1], float32.

    `n_layers` convolutions of stride 2, two of stride 1, all 4x4. Modules are numbered as in the
    reference's sequence, where activations count too.

    Attributes:
      ndf: width after the first layer; it doubles with each layer, up to 8 * ndf.
      n_layers: convolutions with stride 2.
      dtype: compute dtype of the convolutions.
    """

    ndf: int = 64
    n_layers: int = 3
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "B H W 3"], train: bool) -> Float[Array, "B h w 1"]:
        def conv(features: int, strides: int, use_bias: bool, number: int) -> nn.Conv:
            return nn.Conv(
                features,
                (4, 4),
                strides,
                padding=1,
                use_bias=use_bias,
                kernel_init=nn.initializers.normal(0.02),
                dtype=self.dtype,
                name=f"main_{number}",
            )

        h = nn.leaky_relu(conv(self.ndf, 2, True, 0)(images), 0.2)
        number = 2
        for layer in range(1, self.n_layers + 1):
            strides = 2 if layer < self.n_layers else 1
            # No bias: the normalisation that follows would subtract it again.
            h = conv(self.ndf * min(2**layer, 8), strides, False, number)(h)
            h = BatchNorm(dtype=self.dtype, name=f"main_{number + 1}")(h, train)
            h = nn.leaky_relu(h, 0.2)
            number += 3
        return conv(1, 1, True, number)(h).astype(jnp.float32)


def apply_train(
    model: PatchGAN,
    params: Mapping[str, Any],
    batch_stats: Mapping[str, Any],
    images: Float[Array, "B H W 3"],
) -> tuple[Float[Array, "B h w 1"], Mapping[str, Any]]:
    """Logits by the statistics of this batch, and the running statistics moved towards them."""
    logits, updated = model.apply(
        {"params": params, "batch_stats": batch_stats}, images, train=True, mutable=["batch_stats"]
    )
    return logits, updated["batch_stats"]


_PARAMETERS = r"main\.\d+\.(weight|bias)"
_STATISTICS = r"main\.\d+\.(running_mean|running_var)"
_COUNTERS = r"main\.\d+\.num_batches_tracked"

# 'params': from_reference(tensors, target, NAME_RULES, IGNORED_NAMES)
NAME_RULES: tuple[Rule, ...] = (
    Rule(r"main_(\d+)/kernel", r"main.\1.weight", "conv"),
    Rule(r"main_(\d+)/scale", r"main.\1.weight"),
    Rule(r"main_(\d+)/bias", r"main.\1.bias"),
)
IGNORED_NAMES: tuple[str, ...] = (_STATISTICS, _COUNTERS)

# 'batch_stats': from_reference(tensors, target, STATS_NAME_RULES, STATS_IGNORED_NAMES)
STATS_NAME_RULES: tuple[Rule, ...] = (Rule(r"main_(\d+)/(mean|var)", r"main.\1.running_\2"),)
STATS_IGNORED_NAMES: tuple[str, ...] = (_PARAMETERS, _COUNTERS)
