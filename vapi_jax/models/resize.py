"""The resizes that published numbers depend on, each with its grid, coefficients and antialias.

A resize is not determined by the word "bilinear" or "bicubic", and Fréchet distances of the same images
differ with the choice (Parmar et al., arXiv 2104.11222):

    function               used for                    grid                    taps  antialias
    bilinear_tf1_legacy    input of FID's Inception    corners: i * in / out   2     no
    bicubic_torch          384 to 256 of LlamaGen      pixel centres           4     no
    bicubic_pillow         CLIP, EfficientNet          pixel centres           4     yes

All are separable, and positions and coefficients are constants. The first two replicate the border and
compute in float32 on values of any range; taps are summed in the order of the original: width first, then
height. Gathering them takes a third of the time of products with dense matrices on a CPU, and no value acts
beyond its own taps. Pillow's drops what lies outside, and computes with whole numbers.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num, UInt8

from vapi_jax.common.images import to_uint8

# The coefficient "a" of Keys' cubic kernel; torch and OpenCV use -0.75, Pillow and TensorFlow -0.5.
_TORCH_A = np.float32(-0.75)
_HEIGHT, _WIDTH = 1, 2  # axes of NHWC


def _check(name: str, shape: tuple[int, ...], height: int, width: int) -> None:
    if len(shape) != 4 or min(*shape[1:3], height, width) < 1:
        raise ValueError(
            f"{name}: images must be [N, H, W, C] with at least one pixel and the new size positive, "
            f"got {shape} to {height}x{width}"
        )


def _take(images: Array, pixels: Int[np.ndarray, " n"], axis: int) -> Array:
    # The indices are in range by construction; "clip" spares the check that the default compiles in.
    return jnp.take(images, pixels, axis=axis, mode="clip")


def _along(values: Num[np.ndarray, " n"], axis: int) -> Num[np.ndarray, ...]:
    shape = [1, 1, 1, 1]
    shape[axis] = -1
    return values.reshape(shape)


@functools.partial(jax.jit, static_argnames=("height", "width"))
def bilinear_tf1_legacy(
    images: Num[Array, "N H W C"], height: int, width: int
) -> Float[Array, "N height width C"]:
    """Bilinear resize of TensorFlow 1, `ResizeBilinear(align_corners=False)`, as in FID's graph.

    Grid: output i looks at input i * in / out (no half-pixel shift, so an enlarged picture moves
    towards the upper left). Coefficients: 1 - t and t. Antialias: none.

    Args:
      images: [N, H, W, C], any range, integers included.
      height, width: the new size.

    Returns:
      float32 [N, height, width, C]; equal to `images` at equal size.

    Raises:
      ValueError: not four axes, or a size below one.
    """
    _check("bilinear_tf1_legacy", images.shape, height, width)
    out = images.astype(jnp.float32)
    for axis, size in ((_WIDTH, width), (_HEIGHT, height)):
        old = out.shape[axis]
        position = np.arange(size, dtype=np.float32) * (np.float32(old) / np.float32(size))
        lower = position.astype(np.int32)
        first = _take(out, lower, axis)
        second = _take(out, np.minimum(lower + 1, old - 1), axis)
        out = first + (second - first) * _along(position - lower.astype(np.float32), axis)
    return out


def _cubic_taps(old: int, new: int) -> tuple[Int[np.ndarray, "new 4"], Float[np.ndarray, "new 4"]]:
    """Pixels and coefficients of torch's bicubic along one axis.

    Keys' kernel with a = -0.75 at the distances 1 + t, t, 1 - t and 2 - t; all in float32, as torch
    computes: a scale rounded later moves the last positions of a long axis by a visible 1e-4.
    """
    scale, half = np.float32(old) / np.float32(new), np.float32(0.5)
    position = scale * (np.arange(new, dtype=np.float32) + half) - half
    floor = np.floor(position)
    t = position - floor

    def near(x: np.ndarray) -> np.ndarray:  # |x| <= 1
        return ((_TORCH_A + 2) * x - (_TORCH_A + 3)) * x * x + 1

    def far(x: np.ndarray) -> np.ndarray:  # 1 <= |x| <= 2
        return ((_TORCH_A * x - 5 * _TORCH_A) * x + 8 * _TORCH_A) * x - 4 * _TORCH_A

    pixels = floor.astype(np.int32)[:, None] + np.arange(-1, 3, dtype=np.int32)
    coefficients = np.stack([far(t + 1), near(t), near(1 - t), far(2 - t)], axis=1)
    return np.clip(pixels, 0, old - 1), coefficients


@functools.partial(jax.jit, static_argnames=("height", "width"))
def bicubic_torch(
    images: Float[Array, "N H W C"], height: int, width: int
) -> Float[Array, "N height width C"]:
    """`torch.nn.functional.interpolate(mode="bicubic", align_corners=False, antialias=False)`.

    Grid: output i looks at input (i + 0.5) * in / out - 0.5 (pixel centres). Coefficients: Keys'
    cubic with a = -0.75. Antialias: none, also when the image shrinks. At sharp edges it
    overshoots the range of the input.

    Args:
      images: floating point [N, H, W, C], any range.
      height, width: the new size.

    Returns:
      float32 [N, height, width, C]; equal to `images` at equal size.

    Raises:
      ValueError: not floating point (torch rounds the result for integers), not four axes, or a size
        below one.
    """
    _check("bicubic_torch", images.shape, height, width)
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"bicubic_torch: images must be floating point, got {images.dtype}")
    out = images.astype(jnp.float32)
    for axis, size in ((_WIDTH, width), (_HEIGHT, height)):
        pixels, coefficients = _cubic_taps(out.shape[axis], size)
        taps = [_take(out, pixels[:, k], axis) * _along(coefficients[:, k], axis) for k in range(4)]
        out = taps[0] + taps[1] + taps[2] + taps[3]
    return out


_PILLOW_BITS = 22  # of the coefficients that Pillow computes with


@functools.cache
def _pillow_taps(old: int, new: int) -> tuple[Int[np.ndarray, "new k"], Int[np.ndarray, "new k"]]:
    """Pixels and whole coefficients of Pillow's bicubic along one axis; taps outside have none.

    Keys' kernel with a = -0.5 at the distances from the centre, widened where the axis shrinks.
    """
    scale = old / new
    stretch = max(scale, 1.0)
    centres = (np.arange(new) + 0.5) * scale
    first = np.maximum(np.floor(centres - 2.0 * stretch + 0.5), 0).astype(np.int32)
    last = np.minimum(np.floor(centres + 2.0 * stretch + 0.5), old).astype(np.int32)
    pixels = first[:, None] + np.arange((last - first).max(), dtype=np.int32)
    x = np.abs((pixels - centres[:, None] + 0.5) / stretch)
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    weights = np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0)) * (pixels < last[:, None])
    weights = weights / weights.sum(axis=1, keepdims=True) * 2.0**_PILLOW_BITS
    whole = np.trunc(weights + np.copysign(0.5, weights)).astype(np.int32)
    return np.minimum(pixels, old - 1), whole


def bicubic_pillow(
    images: Num[Array, "N H W C"], height: int, width: int
) -> Float[Array, "N height width C"]:
    """`PIL.Image.resize((width, height), BICUBIC)` of 8-bit images, bit for bit.

    Grid: pixel centres. Coefficients: Keys' cubic with a = -0.5, in 22 bits. Antialias: yes, the kernel
    widens as the image shrinks. Whole values in 0..255 after each axis, width first.

    Args:
      images: whole values 0..255 of any type [N, H, W, C].
      height, width: the new size.

    Returns:
      float32 [N, height, width, C], whole values 0..255; equal to `images` at equal size.

    Raises:
      ValueError: not four axes, or a size below one.
    """
    _check("bicubic_pillow", images.shape, height, width)
    out = images.astype(jnp.int32)
    for axis, size in ((_WIDTH, width), (_HEIGHT, height)):
        if out.shape[axis] == size:
            continue
        pixels, weights = _pillow_taps(out.shape[axis], size)
        found = jnp.int32(1 << (_PILLOW_BITS - 1))  # for rounding
        for k in range(pixels.shape[1]):
            found += _take(out, pixels[:, k], axis) * _along(weights[:, k], axis)
        out = jnp.clip(found >> _PILLOW_BITS, 0, 255)
    return out.astype(jnp.float32)


def published_384_to_256(images: Float[Array, "N 384 384 3"]) -> UInt8[np.ndarray, "N 256 256 3"]:
    """Decoded images to what the published evaluations of LlamaGen and VA-π measure.

    `bicubic_torch` to 256, then `to_uint8`: truncate(clamp(127.5 x + 128, 0, 255)). The last
    part runs in NumPy, because a compiler may round 127.5 x + 128 once instead of twice, which turns
    about two values in a million into their neighbours.

    Args:
      images: floating point, about [-1, 1]; what lies outside is clamped after the resize.

    Returns:
      A NumPy array, ready for an npz file or a PNG.

    Raises:
      ValueError: images of another size or type, or a value that is not finite.
    """
    if images.ndim != 4 or images.shape[1:] != (384, 384, 3):
        raise ValueError(
            f"published_384_to_256: images must be [N, 384, 384, 3], got {images.shape}; for other "
            "sizes combine bicubic_torch and to_uint8, and say so beside the numbers"
        )
    return to_uint8(bicubic_torch(images, 256, 256))
