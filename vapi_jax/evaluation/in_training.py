"""What a generator draws on its own, judged every so often while it is trained.

Small and always the same: `eval.sampled` labels in turn, one seed, one set of real crops whose features
are computed once. The distance is the kernel distance, whose estimate a small number of samples does not
bias; the Fréchet distance joins it where there are more samples than features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from vapi_jax.common.images import image_grid, to_uint8
from vapi_jax.data import num_classes
from vapi_jax.evaluation.compare import SEEN, Sampler, even_batch, real_crops
from vapi_jax.evaluation.features import FEATURES
from vapi_jax.evaluation.frechet import frechet_distance, gaussian_statistics
from vapi_jax.evaluation.kernel_distance import kernel_distance
from vapi_jax.methods import Method
from vapi_jax.parallel.sharding import host_array, replicate, shard_whole

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
        count = config.eval.sampled
        self._every, self._mesh = config.eval.sampled_every, method.mesh
        self._labels = np.arange(count) % num_classes(config.data)
        self._sampler = Sampler(method, frozen, even_batch(count, method.mesh.size))
        extractor = FEATURES[SEEN]
        self._extract = jax.jit(extractor.apply)
        self._weights = replicate(extractor.load(), method.mesh)
        self._real = self._features(real_crops(config, count))
        # With no more samples than features the covariance would be singular.
        enough = count > extractor.dim
        self._real_statistics = gaussian_statistics(self._real) if enough else None

    def due(self, step: int) -> bool:
        """Whether it is the turn of this step; the first and the last are the caller's to add."""
        return step % self._every == 0

    def _features(self, images: np.ndarray) -> np.ndarray:
        """Features of images [N, H, W, 3] in [-1, 1], each device taking its share of a batch."""
        size, found = self._sampler.batch, []
        for start in range(0, len(images), size):
            part = images[start : start + size].astype(np.float32)
            padded = np.pad(part, ((0, size - len(part)), (0, 0), (0, 0), (0, 0)))
            features = self._extract(self._weights, shard_whole(padded, self._mesh))
            found.append(host_array(features)[: len(part)])
        return np.concatenate(found)

    def __call__(self, params: Any) -> tuple[dict[str, float], np.ndarray]:
        """Metrics of a policy's samples, and a picture of the first ones.

        Every process of a run has to call it.

        Returns:
          {"kernel_distance", "kernel_distance_error" (its standard error), "entropy" (nats per token
          of what is drawn from), and "frechet" where there are samples enough}; uint8 [h, w, 3].
        """
        images, entropies = self._sampler(params, self._labels, SEED)
        features = self._features(images)
        kernel = kernel_distance(features, self._real)
        found = {
            "kernel_distance": kernel.distance,
            "kernel_distance_error": kernel.standard_error,
            "entropy": float(entropies.mean()),
        }
        if self._real_statistics is not None:
            statistics = gaussian_statistics(features)
            found["frechet"] = frechet_distance(*statistics, *self._real_statistics)
        return found, image_grid(to_uint8(images[:GRID]), columns=8)


def sampled_of(method: Method, frozen: Mapping[str, Any]) -> Sampled | None:
    """What `eval.sampled_every` asks for; None where it is 0 or the method draws no samples."""
    if method.sampled() is None or not method.config.eval.sampled_every:
        return None
    return Sampled(method, frozen)
