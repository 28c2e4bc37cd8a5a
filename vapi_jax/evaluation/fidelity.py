"""PSNR and SSIM of reconstructions, image by image, from uint8 pixels.

Both follow scikit-image's definitions with their defaults for uint8 images: PSNR with a data range of
255; SSIM (Wang et al., IEEE TIP 13(4), 2004) over 7x7 uniform windows that lie inside the image, with
sample covariances (divisor 48), K1 = 0.01, K2 = 0.03, and the mean over windows and channels.

Sums over pixels are exact: a window's sums and the products of its moments fit 32-bit integers, so float32
enters only in the last quotient and variances lose no digits to cancellation.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, UInt8

WINDOW = 7
# A row of 3 channels whose every error is 255 still fits int32.
MAX_WIDTH = 11_000

_PIXELS = WINDOW * WINDOW
_C1 = (0.01 * 255) ** 2
_C2 = (0.03 * 255) ** 2


def _check(a: UInt8[Array, "N H W 3"], b: UInt8[Array, "N H W 3"], least: int) -> None:
    fits = a.shape == b.shape and a.ndim == 4 and a.shape[-1] == 3 and min(a.shape[1:3]) >= least
    if not (fits and a.dtype == b.dtype == np.uint8 and a.shape[2] <= MAX_WIDTH):
        raise ValueError(
            f"two batches uint8 [N, H, W, 3] of one shape, at least {least}x{least} pixels and at most"
            f" {MAX_WIDTH} pixels wide, are needed; got {a.dtype} {a.shape} and {b.dtype} {b.shape}"
        )


@jax.jit
def _row_errors(a: UInt8[Array, "N H W 3"], b: UInt8[Array, "N H W 3"]) -> Int32[Array, "N H"]:
    difference = a.astype(jnp.int32) - b.astype(jnp.int32)
    return jnp.sum(difference * difference, axis=(2, 3))


def psnr(a: UInt8[Array, "N H W 3"], b: UInt8[Array, "N H W 3"]) -> Float[np.ndarray, " N"]:
    """10 log10(255^2 / mean squared error) of each pair in dB, float64; infinite for equal images.

    Args:
      a, b: NumPy or JAX arrays.

    Raises:
      ValueError: another type, images too wide, or shapes that differ.
    """
    _check(a, b, 1)
    # Rows are summed in int32 on the device; a whole image would overflow it.
    total = np.asarray(_row_errors(a, b)).astype(np.float64).sum(axis=1)
    with np.errstate(divide="ignore"):
        return 10 * np.log10(255.0**2 * np.prod(a.shape[1:]) / total)


def _window_sums(x: Int32[Array, "N H W 3"]) -> Int32[Array, "N h w 3"]:
    for axis in (1, 2):
        size = x.shape[axis] - WINDOW + 1
        slices = (jax.lax.slice_in_dim(x, i, i + size, axis=axis) for i in range(WINDOW))
        x = functools.reduce(jnp.add, slices)
    return x


@jax.jit
def _row_similarities(
    a: UInt8[Array, "N H W 3"], b: UInt8[Array, "N H W 3"]
) -> Float[Array, "N h"]:
    a, b = a.astype(jnp.int32), b.astype(jnp.int32)
    sum_a, sum_b = _window_sums(a), _window_sums(b)

    def covariance(
        products: Int32[Array, "N H W 3"], of_sums: Int32[Array, "N h w 3"]
    ) -> Float[Array, "N h w 3"]:
        # 49 * 49 * 255^2 < 2^28: both terms, and their difference, are exact.
        return (_PIXELS * _window_sums(products) - of_sums) / (_PIXELS * (_PIXELS - 1))

    var_a, var_b = covariance(a * a, sum_a * sum_a), covariance(b * b, sum_b * sum_b)
    mean_ab = (sum_a * sum_b) / _PIXELS**2
    mean_squares = (sum_a * sum_a + sum_b * sum_b) / _PIXELS**2
    luminance = (2 * mean_ab + _C1) / (mean_squares + _C1)
    structure = (2 * covariance(a * b, sum_a * sum_b) + _C2) / (var_a + var_b + _C2)
    return jnp.mean(luminance * structure, axis=(2, 3))


def ssim(a: UInt8[Array, "N H W 3"], b: UInt8[Array, "N H W 3"]) -> Float[np.ndarray, " N"]:
    """Structural similarity of each pair, exact to about 1e-7; 1 for equal images.

    Args:
      a, b: NumPy or JAX arrays, at least 7x7 pixels.

    Raises:
      ValueError: another type, images too small, or shapes that differ.
    """
    _check(a, b, WINDOW)
    # Means of rows come back, and only they are averaged in float64: float32 would lose two digits.
    return np.asarray(_row_similarities(a, b), np.float64).mean(axis=1)
