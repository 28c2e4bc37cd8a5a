"""Inner products of differences, pooled to cells: what spatial credit and the energy score are made of."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def pair_bytes(images: int, group: int, side: int) -> int:
    """Memory of the products of pairs of samples at full resolution, before they are pooled.

    Twice, as they are multiplied and as they are pooled (measured on a CPU).

    Args:
      images: samples of all groups that are judged at once.
      group: samples a group, each of which meets all of them.
      side: of an image in pixels.
    """
    return 2 * 4 * images * group * side**2


def pooling(side: int, cells: int) -> Float[np.ndarray, "cells side"]:
    """Each cell's share of every pixel of a line, rows adding up to 1: means over equal parts of the line.

    A map smaller than the grid gives several cells the same pixel. The mean over cells is the map's own.
    """
    edges = np.arange(cells + 1) * side / cells
    low, high = edges[:-1, None], edges[1:, None]
    pixel = np.arange(side)[None]
    overlap = np.clip(np.minimum(high, pixel + 1) - np.maximum(low, pixel), 0.0, None)
    return (overlap * cells / side).astype(np.float32)


def pooled_inner(
    differences: Float[Array, "B G h w C"], cells: int
) -> Float[Array, "B G G cells*cells"]:
    """Σ_C d_g d_j of every pair of samples, the mean over each cell of a square grid."""
    maps = jnp.einsum("bghwc,bjhwc->bgjhw", differences, differences)
    rows, columns = (pooling(side, cells) for side in maps.shape[-2:])
    found = jnp.einsum("bgjhw,yh,xw->bgjyx", maps, rows, columns)
    return found.reshape(*found.shape[:3], cells * cells)
