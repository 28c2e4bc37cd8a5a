"""Inner products of differences, pooled to cells: what spatial credit and the energy score are made of."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


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
