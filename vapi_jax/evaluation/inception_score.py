"""Inception Score (Salimans et al., arXiv 1606.03498), as the ADM evaluator computes it.

    IS = mean over splits of exp( mean_x KL( p(y|x) || p(y) ) ),    p(y) the split's mean of p(y|x)

Samples are cut, in order, into splits of 5000. Samplers often write class after class, and a split of
few classes scores far too low, so the caller brings the samples into `shuffled_order` first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

SPLIT_SIZE = 5000


@dataclass(frozen=True)
class InceptionScore:
    """A score and its spread.

    Attributes:
      score: mean of the splits' scores, between 1 and the number of classes.
      standard_deviation: of the splits' scores (divisor: their number); 0 for one split.
      splits: how many, the last of which may be smaller than the others.
    """

    score: float
    standard_deviation: float
    splits: int


def shuffled_order(count: int, seed: int) -> Int[np.ndarray, " N"]:
    """The fixed permutation of `count` samples that belongs to a seed (NumPy's PCG64)."""
    return np.random.default_rng(seed).permutation(count)


def _split_score(logits: Float[np.ndarray, "N C"]) -> float:
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    p = np.exp(log_p)
    marginal = p.mean(axis=0)
    # A class that underflows in every sample adds nothing: p log p tends to 0.
    log_marginal = np.log(np.where(marginal > 0, marginal, 1.0))
    # From log-probabilities, so that no p = 0 turns into 0 * -inf.
    return float(np.exp((p * (log_p - log_marginal)).sum(axis=1).mean()))


def inception_score(
    logits: Float[np.ndarray, "N C"], split_size: int = SPLIT_SIZE
) -> InceptionScore:
    """The score of samples in the order given.

    Args:
      logits: unnormalised log-probabilities of the classes, one row per sample.
      split_size: samples in a split; the last split takes what is left.

    Raises:
      ValueError: no samples, another shape, values that are not finite, or split_size < 1.
    """
    logits = np.asarray(logits)
    if logits.ndim != 2 or 0 in logits.shape:
        raise ValueError(f"logits must have shape [N, C] with N, C > 0, got {logits.shape}")
    if split_size < 1:
        raise ValueError(f"split_size must be at least 1, got {split_size}")
    if not np.isfinite(logits).all():
        raise ValueError("logits contain NaN or infinity")
    scores = [
        _split_score(logits[start : start + split_size].astype(np.float64))
        for start in range(0, len(logits), split_size)
    ]
    return InceptionScore(float(np.mean(scores)), float(np.std(scores)), len(scores))
