"""Kernel Inception Distance (Bińkowski et al., arXiv 1801.01401), for features of any network.

The unbiased estimate of the squared maximum mean discrepancy under k(x, y) = (x·y / D + 1)^3:

    MMD^2 = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j)

Unbiased means that it does not grow as the sets shrink, as the Fréchet distance does, and that it may
fall below zero where two distributions are alike. All arithmetic is float64 on the host: the three
means are close to each other and their difference is small.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

SUBSETS = 100
SUBSET_SIZE = 1000

_BLOCK_ROWS = 1024


@dataclass(frozen=True)
class KernelDistance:
    """An estimate of MMD^2.

    Attributes:
      distance: the estimate; can be slightly negative.
      standard_error: how far other images of the same distributions would move it: by "jackknife"
        leaving out one image at a time, by "subsets" all but a subset (`_subset_error`).
      method: "subsets" or "jackknife".
      subsets: number of subsets, 1 for the whole sets.
      subset_size: images in each, on both sides; 0 for the whole sets.
    """

    distance: float
    standard_error: float
    method: str
    subsets: int
    subset_size: int


def _kernel(x: Float[np.ndarray, "M D"], y: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "M N"]:
    return (x @ y.T / x.shape[1] + 1.0) ** 3


def _row_sums(
    x: Float[np.ndarray, "M D"], y: Float[np.ndarray, "N D"]
) -> tuple[Float[np.ndarray, " M"], Float[np.ndarray, " N"]]:
    """Sums of the kernel matrix over either axis, from blocks of rows."""
    rows, columns = np.empty(len(x)), np.zeros(len(y))
    for start in range(0, len(x), _BLOCK_ROWS):
        block = _kernel(x[start : start + _BLOCK_ROWS], y)
        rows[start : start + _BLOCK_ROWS] = block.sum(axis=1)
        columns += block.sum(axis=0)
    return rows, columns


def _diagonal(x: Float[np.ndarray, "M D"]) -> Float[np.ndarray, " M"]:
    return (np.einsum("ij,ij->i", x, x) / x.shape[1] + 1.0) ** 3


def unbiased_mmd2(x: Float[np.ndarray, "M D"], y: Float[np.ndarray, "N D"]) -> tuple[float, float]:
    """MMD^2 of two whole sets, and its standard error by leaving out one point at a time.

    The jackknife runs over the points of both sets, var = sum over the sets of (n-1)/n times the sum of
    squared deviations of the n leave-one-out estimates. They follow from the row sums of the three
    kernel matrices, so nothing is computed twice. The error is NaN for a set of two points.

    Args:
      x: at least 2 points, float64.
      y: likewise, of the same width.
    """
    own_x, own_y = _row_sums(x, x)[0] - _diagonal(x), _row_sums(y, y)[0] - _diagonal(y)
    cross_x, cross_y = _row_sums(x, y)
    total = cross_x.sum()
    m, n = len(x), len(y)

    def estimate(
        within_x: Float[np.ndarray, ...],
        within_y: Float[np.ndarray, ...],
        across: Float[np.ndarray, ...],
        m: int,
        n: int,
    ) -> Float[np.ndarray, ...]:
        return within_x / (m * (m - 1)) + within_y / (n * (n - 1)) - 2 * across / (m * n)

    whole = estimate(own_x.sum(), own_y.sum(), total, m, n)
    if min(m, n) < 3:
        return float(whole), float("nan")
    without_x = estimate(own_x.sum() - 2 * own_x, own_y.sum(), total - cross_x, m - 1, n)
    without_y = estimate(own_x.sum(), own_y.sum() - 2 * own_y, total - cross_y, m, n - 1)
    # Over a set's own mean: n - 1 times the mean square is (n-1)/n times the sum.
    variance = (m - 1) * without_x.var() + (n - 1) * without_y.var()
    return float(whole), float(np.sqrt(variance))


def _subset_error(found: Float[np.ndarray, " S"], size: int, smaller: int) -> float:
    """The standard error of the mean of subsets' estimates, by the delete-d jackknife.

    Subsets of a set overlap, so their spread over the root of their number (which is often printed)
    says how well the mean over all subsets is known for these very images, and goes to zero as the
    subsets become the set. Shao and Wu (1989): the variance is size / (N - size) times the mean
    squared deviation. The few subsets drawn add their own part.

    Args:
      found: estimates.
      size: images of a subset.
      smaller: N, images of the smaller side; for the other, which is better known, the same is taken.
    """
    variance = found.var(ddof=1)
    return float(np.sqrt(variance * (size / (smaller - size) + 1 / len(found))))


def kernel_distance(
    x: Float[np.ndarray, "M D"],
    y: Float[np.ndarray, "N D"],
    *,
    subsets: int = SUBSETS,
    subset_size: int = SUBSET_SIZE,
    seed: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> KernelDistance:
    """MMD^2 of two sets of features.

    Where both sets hold more than `subset_size` images it is the mean over random subsets of that size,
    drawn without replacement from each side. Where one is smaller its subsets would all be the same
    set and their spread would say nothing: the whole sets are taken, with a jackknife error.

    Args:
      x, y: one row per image, at least 2 rows each.
      subsets: how many are drawn.
      subset_size: images in each.
      seed: of NumPy's PCG64, which draws the subsets.
      progress: told the number of finished subsets.

    Raises:
      ValueError: shapes that do not fit, values that are not finite, or too few images or subsets.
    """
    x, y = np.asarray(x), np.asarray(y)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or not x.shape[1]:
        raise ValueError(f"two sets of features [N, D] are needed, got {x.shape} and {y.shape}")
    if min(len(x), len(y)) < 2 or subset_size < 2 or subsets < 2:
        raise ValueError(
            "at least 2 images on each side, in each subset, and 2 subsets are needed; got"
            f" {len(x)} and {len(y)} images, subset_size {subset_size}, subsets {subsets}"
        )
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("features contain NaN or infinity")
    if min(len(x), len(y)) <= subset_size:
        distance, error = unbiased_mmd2(x.astype(np.float64), y.astype(np.float64))
        return KernelDistance(distance, error, "jackknife", 1, 0)
    rng = np.random.default_rng(seed)
    found = np.empty(subsets)
    off_diagonal = subset_size * (subset_size - 1)
    for index in range(subsets):
        part_x, part_y = (
            side[rng.choice(len(side), subset_size, replace=False)].astype(np.float64)
            for side in (x, y)
        )
        within = sum(_kernel(p, p).sum() - _diagonal(p).sum() for p in (part_x, part_y))
        found[index] = within / off_diagonal - 2 * _kernel(part_x, part_y).mean()
        progress(index + 1)
    error = _subset_error(found, subset_size, min(len(x), len(y)))
    return KernelDistance(float(found.mean()), error, "subsets", subsets, subset_size)
