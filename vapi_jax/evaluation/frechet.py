"""Fréchet distance between two sets of features, each taken for a Gaussian, in float64.

    d = |mu1 - mu2|^2 + tr C1 + tr C2 - 2 tr (C1^(1/2) C2 C1^(1/2))^(1/2)

This is the squared 2-Wasserstein distance of the two Gaussians, the number that FID reports when the
features are Inception's (Heusel et al., arXiv 1706.08500). The symmetric product has the same
eigenvalues as C1 C2, all real and >= 0, so no complex matrix root is needed.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float


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


def frechet_distance(
    mu1: Float[np.ndarray, " D"],
    cov1: Float[np.ndarray, "D D"],
    mu2: Float[np.ndarray, " D"],
    cov2: Float[np.ndarray, "D D"],
) -> float:
    """Squared 2-Wasserstein distance of two Gaussians, >= 0.

    Raises:
      ValueError: shapes that do not fit each other.
    """
    mu1, cov1, mu2, cov2 = (np.asarray(x, np.float64) for x in (mu1, cov1, mu2, cov2))
    dim = mu1.size
    if not (mu1.shape == mu2.shape == (dim,) and cov1.shape == cov2.shape == (dim, dim)):
        raise ValueError(
            "two means [D] and two covariances [D, D] are needed, got "
            f"{mu1.shape}, {cov1.shape}, {mu2.shape}, {cov2.shape}"
        )
    values, vectors = np.linalg.eigh(cov1)
    # Rounding makes zero eigenvalues slightly negative.
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    product = root @ cov2 @ root
    eigenvalues = np.linalg.eigvalsh((product + product.T) / 2)
    cross = np.sqrt(np.maximum(eigenvalues, 0)).sum()
    difference = mu1 - mu2
    distance = difference @ difference + np.trace(cov1) + np.trace(cov2) - 2 * cross
    return max(float(distance), 0.0)
