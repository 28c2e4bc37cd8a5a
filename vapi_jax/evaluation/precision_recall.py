"""Improved precision and recall (Kynkäänniemi et al., arXiv 1904.06991).

The manifold of a set is the union of balls round its points, each reaching to the point's k-th nearest
neighbour in the set (itself not counted). Precision is the share of generated points inside the real
manifold, recall the share of real points inside the generated one.

The ADM evaluator computes the distances as |a|^2 - 2ab + |b|^2 as well, in float16 where nothing
overflows and in float32 otherwise; here it is float32 throughout. Three things keep that form
honest: features are centred first, so that a common offset does not eat the digits; products are taken
at the highest precision the device has; and a square below what float32 can tell from zero counts as
zero, so that copies of a point lie inside its ball even where its radius is zero.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

NEIGHBOUR = 3

# Elements of one block of distances: 128 MB of float32.
_BLOCK_ELEMENTS = 2**25
# Of |a|^2 + |b|^2: a few units in the last place of the two norms.
_ZERO = 1e-6


@dataclass(frozen=True)
class PrecisionRecall:
    """Both shares, between 0 and 1."""

    precision: float
    recall: float


def _squared_distances(a: Float[Array, "R D"], b: Float[Array, "N D"]) -> Float[Array, "R N"]:
    # Behind a barrier: compilers would otherwise sum a row's squares again for every column.
    norm_a, norm_b = jax.lax.optimization_barrier((jnp.sum(a * a, axis=1), jnp.sum(b * b, axis=1)))
    norms = norm_a[:, None] + norm_b
    squared = norms - 2 * jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.where(squared <= _ZERO * norms, 0.0, squared)


@functools.partial(jax.jit, static_argnames="k")
def _block_radii(
    rows: Float[Array, "R D"], points: Float[Array, "N D"], start: Array, k: int
) -> Float[Array, " R"]:
    squared = _squared_distances(rows, points)
    own = (start + jnp.arange(len(rows)))[:, None] == jnp.arange(len(points))
    nearest = -jax.lax.top_k(-jnp.where(own, jnp.inf, squared), k)[0]
    # Not the last column: XLA would turn a slice of top_k into a sort of whole rows.
    return jnp.max(nearest, axis=1)


@jax.jit
def _block_covered(
    rows: Float[Array, "R D"], points: Float[Array, "N D"], radii: Float[Array, " N"]
) -> Bool[Array, " R"]:
    return jnp.any(_squared_distances(rows, points) <= radii, axis=1)


def _by_rows(
    apply: Callable[[Array, int], Array], rows: Float[np.ndarray, "M D"], columns: int
) -> np.ndarray:
    """Applies (block of rows, index of its first row) -> [R], in blocks of one size."""
    size = max(1, min(len(rows), _BLOCK_ELEMENTS // columns))
    out = []
    for start in range(0, len(rows), size):
        block = rows[start : start + size]
        padded = np.pad(block, ((0, size - len(block)), (0, 0)))
        out.append(np.asarray(apply(jnp.asarray(padded), start))[: len(block)])
    return np.concatenate(out)


def _radii(points: Float[np.ndarray, "N D"], k: int) -> Float[np.ndarray, " N"]:
    """Squared distance of every point to its k-th nearest neighbour."""
    whole = jnp.asarray(points)
    return _by_rows(lambda rows, start: _block_radii(rows, whole, start, k), points, len(points))


def _covered(
    rows: Float[np.ndarray, "M D"], points: Float[np.ndarray, "N D"], k: int
) -> Bool[np.ndarray, " M"]:
    """Whether each row lies inside the manifold of the points."""
    radii, whole = jnp.asarray(_radii(points, k)), jnp.asarray(points)
    return _by_rows(lambda block, _: _block_covered(block, whole, radii), rows, len(points))


def precision_recall(
    real: Float[np.ndarray, "N D"], generated: Float[np.ndarray, "M D"], k: int = NEIGHBOUR
) -> PrecisionRecall:
    """Precision and recall of generated features against real ones.

    Memory beyond the two sets is bounded by one block of distances (128 MB). A point on the edge of a
    ball is inside. Neither result depends on the order of either set, but for ties within float32's
    rounding.

    Args:
      real: one row per image, converted to float32.
      generated: likewise; the number of rows may differ.
      k: which neighbour gives the radius.

    Raises:
      ValueError: shapes that do not fit, values that are not finite, or a set of k points or fewer.
    """
    real, generated = np.asarray(real, np.float32), np.asarray(generated, np.float32)
    if real.ndim != 2 or generated.ndim != 2 or real.shape[1] != generated.shape[1]:
        raise ValueError(
            f"two sets of features [N, D] are needed, got {real.shape} and {generated.shape}"
        )
    if not 1 <= k < min(len(real), len(generated)):
        raise ValueError(
            f"the neighbour k={k} wants sets of more than k points, and k >= 1; got {len(real)} real"
            f" and {len(generated)} generated ones"
        )
    if not (np.isfinite(real).all() and np.isfinite(generated).all()):
        raise ValueError("features contain NaN or infinity")
    centre = real.mean(axis=0, dtype=np.float64).astype(np.float32)
    real, generated = real - centre, generated - centre
    return PrecisionRecall(
        precision=float(np.mean(_covered(generated, real, k))),
        recall=float(np.mean(_covered(real, generated, k))),
    )
