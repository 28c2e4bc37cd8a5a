"""Convolution and group normalisation shared by every convolutional model.

Layout NHWC, kernels HWIO, parameters float32, compute dtype chosen by the caller.

Why `conv2d` has two formulations. On CPU, XLA runs a convolution through its fast kernel only while
the feature map has at least as many pixels as the kernel has taps; below that it falls back to a
plain loop. VGG16 on 32x32 images ends in three 3x3 convolutions on 2x2 pixels and would spend almost
all its time there. A concatenation of shifted slices and one matrix product does the same sum.

Time of the library convolution / time of the matrix product: 3x3, stride 1, float32, batch 128, two
CPU cores, best of three, jax 0.10.2. Above 1 the matrix product wins. dx and dk are the gradients of
input and kernel.

    pixels  channels   forward   dx    dk
     1x1    512-512       12     16   0.9
     2x2    512-512      119    118   0.8
     2x2    128-128       15     10   1.4
     2x4    512-512      101    170   0.6
     3x3    512-512      0.9    2.1   0.9
     4x4    512-512      0.6    1.1   0.9
     4x4    256-512      0.6    1.4   1.2
     8x8    256-256      0.4    0.5   0.6
     8x8    128-128      0.3    0.4   0.3
    16x16   128-128      0.2    0.3   1.0
    16x16    64-64       0.2    0.3   0.4
    32x32    64-64       0.3    0.5   0.7
    32x32    32-32       0.1    0.2   0.3

A sum of nine products in place of one product of concatenated patches was within a factor of two
of it, either way, on the small maps, and slower than the library on the large ones: not used.
Hence the rule in `uses_matmul`: CPU only, and only for maps smaller than the kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Padding = str | int | Sequence[tuple[int, int]]
Pads = tuple[tuple[int, int], tuple[int, int]]

# More slices than this make the traced program long for no gain (11x11 of AlexNet's first layer).
_MAX_TAPS = 25


def precision_of(dtype: Any) -> str:
    """For `jax.default_matmul_precision`: accelerators multiply float32 in fewer bits where not told so."""
    return "highest" if dtype == jnp.float32 else "default"


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    first, second = value
    return int(first), int(second)


def _explicit_pads(
    padding: Padding, size: tuple[int, int], window: tuple[int, int], strides: tuple[int, int]
) -> Pads:
    """Rows and columns added (before, after) along height and width."""
    if isinstance(padding, int):
        return (padding, padding), (padding, padding)
    if isinstance(padding, str):
        rows, columns = jax.lax.padtype_to_pads(size, window, strides, padding)
    else:
        rows, columns = padding
    return (int(rows[0]), int(rows[1])), (int(columns[0]), int(columns[1]))


def _output_size(
    size: tuple[int, int], window: tuple[int, int], strides: tuple[int, int], pads: Pads
) -> tuple[int, int]:
    height, width = (
        (n + before + after - k) // s + 1
        for n, k, s, (before, after) in zip(size, window, strides, pads, strict=True)
    )
    if height < 1 or width < 1:
        raise ValueError(
            f"conv2d: a map of {size[0]}x{size[1]} pixels padded by {pads} is smaller than the"
            f" {window[0]}x{window[1]} kernel"
        )
    return height, width


def uses_matmul(size: tuple[int, int], window: tuple[int, int], out: tuple[int, int]) -> bool:
    """Whether a CPU runs this convolution faster as a matrix product (the table above).

    Args:
      size, window, out: height and width of the input, of the kernel and of the output. The output
        counts because it is the input of the convolution that makes the input's gradient.
    """
    taps = window[0] * window[1]
    pixels = min(size[0] * size[1], out[0] * out[1])
    return 1 < taps <= _MAX_TAPS and pixels < taps


def _conv_lax(
    x: Float[Array, "B H W I"],
    kernel: Float[Array, "kh kw I O"],
    strides: tuple[int, int],
    pads: Pads,
) -> Float[Array, "B h w O"]:
    return jax.lax.conv_general_dilated(
        x, kernel, strides, pads, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _conv_matmul(
    x: Float[Array, "B H W I"],
    kernel: Float[Array, "kh kw I O"],
    strides: tuple[int, int],
    pads: Pads,
) -> Float[Array, "B h w O"]:
    batch, height, width, channels = x.shape
    kh, kw, _, features = kernel.shape
    h, w = _output_size((height, width), (kh, kw), strides, pads)
    padded = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    slices = [
        jax.lax.slice(
            padded,
            (0, i, j, 0),
            (batch, i + (h - 1) * strides[0] + 1, j + (w - 1) * strides[1] + 1, channels),
            (1, *strides, 1),
        )
        for i in range(kh)
        for j in range(kw)
    ]
    patches = jnp.concatenate(slices, axis=-1).reshape(batch * h * w, kh * kw * channels)
    out = patches @ kernel.reshape(kh * kw * channels, features)
    return out.reshape(batch, h, w, features)


def conv2d(
    x: Float[Array, "B H W I"],
    kernel: Float[Array, "kh kw I O"],
    *,
    strides: int | Sequence[int] = 1,
    padding: Padding = "SAME",
) -> Float[Array, "B h w O"]:
    """2-D cross-correlation without bias, in the dtype of its arguments.

    Args:
      x: feature maps.
      kernel: weights, same dtype as `x`.
      strides: one number or (vertical, horizontal).
      padding: "SAME", "VALID", one number for all four sides, or ((top, bottom), (left, right)).

    Returns:
      Feature maps [B, h, w, O].

    Raises:
      ValueError: the padded map is smaller than the kernel, or channels do not match.
    """
    if x.shape[-1] != kernel.shape[2]:
        raise ValueError(
            f"conv2d: input of shape {x.shape} has {x.shape[-1]} channels, the kernel of shape"
            f" {kernel.shape} expects {kernel.shape[2]}"
        )
    size, window, steps = _pair(x.shape[1:3]), _pair(kernel.shape[:2]), _pair(strides)
    pads = _explicit_pads(padding, size, window, steps)
    out = _output_size(size, window, steps, pads)
    if not uses_matmul(size, window, out):
        return _conv_lax(x, kernel, steps, pads)
    # By the platform that the program is compiled for, which need not be the one that traces it.
    return jax.lax.platform_dependent(
        x,
        kernel,
        cpu=partial(_conv_matmul, strides=steps, pads=pads),
        default=partial(_conv_lax, strides=steps, pads=pads),
    )


# --- a convolution of repeated pixels -------------------------------------------------------------


def _taps_of_pixels(kernel: Float[Array, "3 3 I O"]) -> Float[Array, "4 4 I O"]:
    """Adds up, along both axes, the taps that fall on copies of one pixel: k0, k0 + k1, k1 + k2, k2."""
    for axis in (0, 1):
        pads = [[(0, 0)] * axis + [pad] + [(0, 0)] * (3 - axis) for pad in ((0, 1), (1, 0))]
        kernel = jnp.pad(kernel, pads[0]) + jnp.pad(kernel, pads[1])
    return kernel


def _conv_halving(
    y: Float[Array, "B 2*H 2*W O"], taps: Float[Array, "4 4 O I"]
) -> Float[Array, "B H W I"]:
    return _conv_lax(y, taps, (2, 2), ((1, 1), (1, 1)))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv_transposed(
    x: Float[Array, "B H W I"], taps: Float[Array, "4 4 O I"], precision: str | None
) -> Float[Array, "B 2*H 2*W O"]:
    """The transpose of `_conv_halving`, which accelerators have kernels for.

    Its gradients are written down, for that of the taps is a gradient of `_conv_halving`. Derived, cuDNN
    would get it as a convolution by a kernel of H x W taps. They multiply in the precision that was asked
    for where the function was called, as derived ones do.
    """
    batch, height, width, _ = x.shape
    shape = jax.ShapeDtypeStruct((batch, 2 * height, 2 * width, taps.shape[2]), x.dtype)
    with jax.default_matmul_precision(precision):
        (y,) = jax.linear_transpose(partial(_conv_halving, taps=taps), shape)(x)
    return y


def _transposed_forward(
    x: Array, taps: Array, precision: str | None
) -> tuple[Array, tuple[Array, Array]]:
    return _conv_transposed(x, taps, precision), (x, taps)


def _transposed_backward(
    precision: str | None, kept: tuple[Array, Array], dy: Array
) -> tuple[Array, Array]:
    x, taps = kept
    with jax.default_matmul_precision(precision):
        dx, pull = jax.vjp(partial(_conv_halving, dy), taps)
        return dx, pull(x)[0]


_conv_transposed.defvjp(_transposed_forward, _transposed_backward)


def _upsampled_transposed(
    x: Float[Array, "B H W I"], kernel: Float[Array, "3 3 I O"]
) -> Float[Array, "B 2*H 2*W O"]:
    # Turned over before taps are added up: XLA tells cuDNN's kernel by the turn that transposing makes,
    # and two turns in a row would cancel.
    taps = _taps_of_pixels(jnp.flip(kernel, (0, 1))).swapaxes(2, 3).astype(x.dtype)
    return _conv_transposed(x, taps, jax.config.values["jax_default_matmul_precision"])


def _upsampled_quarters(
    x: Float[Array, "B H W I"], kernel: Float[Array, "3 3 I O"]
) -> Float[Array, "B 2*H 2*W O"]:
    """Rows and columns of either parity by a 2x2 convolution of their own, which then interlock."""
    taps, rows = _taps_of_pixels(kernel).astype(x.dtype), []
    for i in (0, 1):
        row = [conv2d(x, taps[i::2, j::2], padding=((1 - i, i), (1 - j, j))) for j in (0, 1)]
        rows.append(jnp.stack(row, axis=3))
    batch, height, width, _ = x.shape
    return jnp.stack(rows, axis=2).reshape(batch, 2 * height, 2 * width, kernel.shape[-1])


def conv2d_upsampled(
    x: Float[Array, "B H W I"], kernel: Float[Array, "3 3 I O"]
) -> Float[Array, "B 2*H 2*W O"]:
    """`conv2d` (3x3, "SAME") of the map with both sides doubled by repeating pixels, without that map.

    A place of the result sees 2x2 pixels of `x`, and so takes 4 products a channel where the repeated map
    takes 9: the taps that fall on copies of one pixel are added up first.

    Args:
      x: feature maps.
      kernel: weights; their sums are taken in its dtype and rounded to that of `x`.

    Returns:
      Feature maps in the dtype of `x`.

    Raises:
      ValueError: the kernel is not 3x3, or channels do not match.
    """
    if kernel.shape[:3] != (3, 3, x.shape[-1]):
        raise ValueError(
            f"conv2d_upsampled: an input of shape {x.shape} takes a kernel of [3, 3, {x.shape[-1]}, O],"
            f" not of {kernel.shape}"
        )
    return jax.lax.platform_dependent(
        x, kernel, cpu=_upsampled_quarters, default=_upsampled_transposed
    )


class Conv(nn.Module):
    """2-D convolution with parameters `kernel` [kh, kw, I, O] and `bias` [O], both float32.

    Attributes:
      features: output channels O.
      kernel_size: one number or (height, width).
      strides, padding: as for `conv2d`.
      use_bias: whether to add a bias.
      upsample: whether of the map with both sides doubled (`conv2d_upsampled`), which is 3x3 with stride
        1 and "SAME" alone.
      dtype: compute (and output) dtype.
    """

    features: int
    kernel_size: int | Sequence[int] = 3
    strides: int | Sequence[int] = 1
    padding: Padding = "SAME"
    use_bias: bool = True
    upsample: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W I"]) -> Float[Array, "B h w O"]:
        shape = (*_pair(self.kernel_size), x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, jnp.float32)
        x = x.astype(self.dtype)
        if self.upsample:
            out = conv2d_upsampled(x, kernel)
        else:
            kernel = kernel.astype(self.dtype)
            out = conv2d(x, kernel, strides=self.strides, padding=self.padding)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros_init(), (self.features,), jnp.float32)
            out = out + bias.astype(self.dtype)
        return out


class GroupNorm(nn.Module):
    """Group normalisation (Wu and He, arXiv 1803.08494) over height, width and a group's channels.

    Flax's takes means over (height, width, channels of a group) of a reshaped array, which XLA runs
    on CPUs without vector instructions: on [128, 32, 32, 64], with the activation after it, three
    times slower than sums of each channel, which are then added up within their groups. The variance is
    taken of differences from the mean: E[x^2] - E[x]^2 cancels where a mean is large against its spread.

    Attributes:
      num_groups: of neighbouring channels.
      epsilon: added to the variance.
      dtype: of the result; statistics are float32.
    """

    num_groups: int = 32
    epsilon: float = 1e-6
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        channels = x.shape[-1]
        if channels % self.num_groups:
            raise ValueError(f"{channels} channels do not make {self.num_groups} groups")
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        dtype, x = self.dtype or x.dtype, x.astype(jnp.float32)

        def group_mean(x: Float[Array, "B H W C"]) -> Float[Array, "B 1 1 C"]:
            groups = x.mean(axis=(1, 2)).reshape(len(x), self.num_groups, -1).mean(axis=-1)
            return jnp.repeat(groups, channels // self.num_groups, axis=1)[:, None, None]

        x = x - group_mean(x)
        x = x * (jax.lax.rsqrt(group_mean(x * x) + self.epsilon) * scale) + bias
        return x.astype(dtype)
