"""PSNR and SSIM of reconstructions, image by image, from uint8 pixels.

Both are as scikit-image defines them for uint8 images: PSNR with a data range of 255; SSIM (Wang et al.,
IEEE TIP 13(4), 2004) over 7x7 uniform windows that lie inside the image, with sample covariances,
K1 = 0.01, K2 = 0.03, and the mean over windows and channels.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, UInt8
from skimage.metrics import structural_similarity

WINDOW = 7
# A row of 3 channels whose every error is 255 still fits int32.
MAX_WIDTH = 11_000


Pixels = UInt8[Array, "N H W 3"] | UInt8[np.ndarray, "N H W 3"]


def _check(a: Pixels, b: Pixels, least: int) -> None:
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


def ssim(
    a: UInt8[np.ndarray, "N H W 3"], b: UInt8[np.ndarray, "N H W 3"], data_range: int = 255
) -> Float[np.ndarray, " N"]:
    """Structural similarity of each pair, float64; 1 for equal images.

    Args:
      a, b: at least 7x7 pixels.
      data_range: between the least and the largest value of a pixel. The script behind LlamaGen's published
        figures (0.675 of VQ-16) gives it 2 for pixels in [0, 1], which is 510 here and comes out higher.

    Raises:
      ValueError: another type, images too small, or shapes that differ.
    """
    _check(a, b, WINDOW)
    pairs = zip(np.asarray(a), np.asarray(b), strict=True)
    return np.array(
        [
            structural_similarity(*pair, win_size=WINDOW, channel_axis=-1, data_range=data_range)
            for pair in pairs
        ]
    )
