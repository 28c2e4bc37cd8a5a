"""Fréchet distance between two sets of features, each taken for a Gaussian, in float64.

    d = |mu1 - mu2|^2 + tr C1 + tr C2 - 2 tr (C1^(1/2) C2 C1^(1/2))^(1/2)

This is the squared 2-Wasserstein distance of the two Gaussians, the number that FID reports when the
features are Inception's (Heusel et al., arXiv 1706.08500). The symmetric product has the same
eigenvalues as C1 C2, all real and >= 0, so no complex matrix root is needed, and singular covariances
need nothing added to their diagonals.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float


@dataclass(frozen=True)
class FrechetResult:
    """A Fréchet distance, and what has to be said beside it.

    Attributes:
      distance: the squared 2-Wasserstein distance, >= 0.
      singular: whether a covariance has no full rank in float64, as with no more samples than
        features. The distance is then exact for the covariances given, which say little about the
        distributions behind them.
      clipped: sum of the negative eigenvalues that rounding gave to matrices without any and that
        were taken for zero; <= 0, and of the order of 1e-16 of the largest one.
    """

    distance: float
    singular: bool
    clipped: float


def gaussian_statistics(
    features: Float[np.ndarray, "N D"], *, allow_singular: bool = False
) -> tuple[Float[np.ndarray, " D"], Float[np.ndarray, "D D"]]:
    """Mean and covariance (divisor N - 1) in float64.

    Args:
      features: one row per image.
      allow_singular: accept N <= D. The covariance is then singular and distances are biased so
        strongly that they mean little; for trial runs only.

    Raises:
      ValueError: wrong shape, non-finite values, fewer than 2 samples, or N <= D if not allowed.
    """
    features = np.asarray(features, np.float64)
    if features.ndim != 2:
        raise ValueError(f"features must have shape [N, D], got {features.shape}")
    count, dim = features.shape
    least = 2 if allow_singular else max(2, dim + 1)
    if count < least:
        raise ValueError(
            f"{count} samples are too few for the covariance of {dim} features: at least {least}"
            " are needed"
        )
    if not np.isfinite(features).all():
        raise ValueError("features contain NaN or infinity")
    mean = features.mean(axis=0)
    centred = features - mean
    return mean, centred.T @ centred / (count - 1)


def _full_rank(eigenvalues: Float[np.ndarray, " D"]) -> bool:
    # Rounding leaves a zero eigenvalue within a few units of the largest one's last place.
    tolerance = eigenvalues.max() * len(eigenvalues) * np.finfo(np.float64).eps
    return bool(eigenvalues.min() > tolerance)


def frechet(
    mu1: Float[np.ndarray, " D"],
    cov1: Float[np.ndarray, "D D"],
    mu2: Float[np.ndarray, " D"],
    cov2: Float[np.ndarray, "D D"],
) -> FrechetResult:
    """Squared 2-Wasserstein distance of two Gaussians, with a note of singular covariances.

    Raises:
      ValueError: shapes that do not fit each other, or values that are not finite.
    """
    distance, values, eigenvalues = _distance(mu1, cov1, mu2, cov2)
    return FrechetResult(
        distance=distance,
        singular=not (_full_rank(values) and _full_rank(np.linalg.eigvalsh(cov2))),
        clipped=float(np.minimum(values, 0).sum() + np.minimum(eigenvalues, 0).sum()),
    )


def _distance(
    mu1: np.ndarray, cov1: np.ndarray, mu2: np.ndarray, cov2: np.ndarray
) -> tuple[float, np.ndarray, np.ndarray]:
    """The distance, and the eigenvalues of the first covariance and of the product."""
    mu1, cov1, mu2, cov2 = (np.asarray(x, np.float64) for x in (mu1, cov1, mu2, cov2))
    dim = mu1.size
    if not (dim and mu1.shape == mu2.shape == (dim,) and cov1.shape == cov2.shape == (dim, dim)):
        raise ValueError(
            "two means [D] and two covariances [D, D] are needed, got "
            f"{mu1.shape}, {cov1.shape}, {mu2.shape}, {cov2.shape}"
        )
    if not all(np.isfinite(x).all() for x in (mu1, cov1, mu2, cov2)):
        raise ValueError("a mean or a covariance contains NaN or infinity")
    values, vectors = np.linalg.eigh(cov1)
    # Rounding makes zero eigenvalues slightly negative.
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    product = root @ cov2 @ root
    eigenvalues = np.linalg.eigvalsh((product + product.T) / 2)
    cross = np.sqrt(np.maximum(eigenvalues, 0)).sum()
    difference = mu1 - mu2
    distance = difference @ difference + np.trace(cov1) + np.trace(cov2) - 2 * cross
    return max(float(distance), 0.0), values, eigenvalues


def frechet_distance(
    mu1: Float[np.ndarray, " D"],
    cov1: Float[np.ndarray, "D D"],
    mu2: Float[np.ndarray, " D"],
    cov2: Float[np.ndarray, "D D"],
) -> float:
    """The distance of `frechet` alone, >= 0, in less time. Raises ValueError as `frechet` does."""
    return _distance(mu1, cov1, mu2, cov2)[0]
