"""What a generator draws on its own, judged every so often while it is trained.

Small and always the same: `eval.sampled` labels in turn, one seed, one set of real crops whose features
are computed once. The distance is the kernel distance, whose estimate a small number of samples does not
bias; the Fréchet distance joins it where there are more samples than features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from vapi_jax.common.images import image_grid
from vapi_jax.evaluation.features import FEATURES
from vapi_jax.evaluation.frechet import frechet_distance, gaussian_statistics
from vapi_jax.evaluation.kernel_distance import kernel_distance
from vapi_jax.evaluation.samples import SEEN, judge_of
from vapi_jax.methods import Method

SAMPLED = "sampled/"
"""Begins the names of numbers and pictures of free-running samples in training."""

SEED = 11
"""Of the samples; the final table draws from others."""

GRID = 32
"""Samples in the picture, the first of them."""


class Sampled:
    """Judges samples of a policy, with programs that are compiled at the first call.

    Args:
      method: the run's.
      frozen: its frozen weights on the mesh.

    Raises:
      DataError: the training split has fewer than `eval.sampled` images.
    """

    def __init__(self, method: Method, frozen: Mapping[str, Any]):
        config = method.config
        self._every, self._count = config.eval.sampled_every, config.eval.sampled
        self.judge = judge_of(method, frozen)
        self._real = self.judge.features(self.judge.real(self._count, 0))[SEEN]
        # With no more samples than features the covariance would be singular.
        enough = self._count > FEATURES[SEEN].dim
        self._real_statistics = gaussian_statistics(self._real) if enough else None

    def due(self, step: int) -> bool:
        """Whether it is the turn of this step; the first and the last are the caller's to add."""
        return step % self._every == 0

    def __call__(self, params: Any) -> tuple[dict[str, float], np.ndarray]:
        """Metrics of a policy's samples, and a picture of the first ones.

        Every process of a run has to call it.

        Returns:
          {"kernel_distance", "kernel_distance_error" (its standard error), "entropy" (nats per token
          of what is drawn from), and "frechet" where there are samples enough}; uint8 [h, w, 3].
        """
        judged = self.judge.samples(params, self._count, SEED, 1.0, shown=GRID)
        features = judged.features[SEEN]
        kernel = kernel_distance(features, self._real)
        found = {
            "kernel_distance": kernel.distance,
            "kernel_distance_error": kernel.standard_error,
            "entropy": judged.entropy,
        }
        if self._real_statistics is not None:
            statistics = gaussian_statistics(features)
            found["frechet"] = frechet_distance(*statistics, *self._real_statistics)
        return found, image_grid(judged.images, columns=8)


def sampled_of(method: Method, frozen: Mapping[str, Any]) -> Sampled | None:
    """What `eval.sampled_every` asks for; None where it is 0 or the method draws no samples."""
    if method.sampled() is None or not method.config.eval.sampled_every:
        return None
    return Sampled(method, frozen)
