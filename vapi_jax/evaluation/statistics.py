"""Mean and covariance of features in float64, gathered as a stream; and files that keep them.

A file is an .npz with `mu` [D] and `sigma` [D, D], as pytorch-fid writes, and for sFID `mu_s` and
`sigma_s`, as the reference batches of the ADM evaluator have. Files written here also hold `features`
(float32 rows for precision, recall and the kernel distance) and `facts`, a JSON text of what they
were computed from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from vapi_jax.common.errors import ExpectedError
from vapi_jax.common.files import new_file
from vapi_jax.common.npz import array_names, open_npz, read_array

MAX_DIM = 16_384

_ROWS = 4096
_MAX_FEATURES = 2**31  # bytes: 260,000 rows of 2048 float32 values
_MAX_FACTS = 2**20
# Covariances are symmetric but for rounding, which float32 files carry along.
_ASYMMETRY = 1e-5


class StatisticsError(ExpectedError, ValueError):
    """Features or a file of statistics that are not fit for use."""


class Moments:
    """Count, mean and scatter (the sum of (x - mean)(x - mean)^T) of rows seen so far.

    Rows are gathered into blocks of 4096, so that small batches cost no more than large ones, and blocks
    are combined by the pairwise update of Chan, Golub and LeVeque (1983). However the rows come cut up,
    the result is the same to about 1e-13 of its largest entry, whatever the mean.

    Args:
      dim: length of a row.
    """

    def __init__(self, dim: int):
        if not 1 <= dim <= MAX_DIM:
            raise StatisticsError(f"features of {dim} values are not possible; 1 to {MAX_DIM} are")
        self._dim = dim
        self._count = 0
        self._mean: Float[np.ndarray, " D"] = np.zeros(dim)
        self._scatter: Float[np.ndarray, "D D"] = np.zeros((dim, dim))
        self._waiting: list[Float[np.ndarray, "N D"]] = []
        self._waiting_rows = 0

    def update(self, features: Float[np.ndarray, "N D"]) -> None:
        """Takes in rows of any floating type, N >= 0. They are copied.

        Raises:
          StatisticsError: rows of another length, or values that are not finite.
        """
        features = np.asarray(features)
        if features.ndim != 2 or features.shape[1] != self._dim:
            raise StatisticsError(f"features [N, {self._dim}] are needed, got {features.shape}")
        if not np.isfinite(features).all():
            raise StatisticsError("features contain NaN or infinity")
        while len(features):
            part = features[: _ROWS - self._waiting_rows]
            self._waiting.append(np.array(part))
            self._waiting_rows += len(part)
            features = features[len(part) :]
            if self._waiting_rows == _ROWS:
                self._fold()

    def _fold(self) -> None:
        if self._waiting:
            rows = np.concatenate(self._waiting, dtype=np.float64)
            self._waiting, self._waiting_rows = [], 0
            mean = rows.mean(axis=0)
            rows -= mean
            self._combine(len(rows), mean, rows.T @ rows)

    def _combine(
        self, count: int, mean: Float[np.ndarray, " D"], scatter: Float[np.ndarray, "D D"]
    ) -> None:
        total = self._count + count
        if not total:
            return
        shift = mean - self._mean
        self._scatter += scatter
        self._scatter += np.outer(shift, shift * (self._count * count / total))
        self._mean = self._mean + shift * (count / total)
        self._count = total

    @property
    def count(self) -> int:
        return self._count + self._waiting_rows

    @property
    def mean(self) -> Float[np.ndarray, " D"]:
        self._fold()
        return self._mean

    @property
    def scatter(self) -> Float[np.ndarray, "D D"]:
        self._fold()
        return self._scatter

    def covariance(self) -> Float[np.ndarray, "D D"]:
        """The sample covariance, divisor count - 1.

        Raises:
          StatisticsError: fewer than two rows.
        """
        if self.count < 2:
            raise StatisticsError(f"a covariance needs at least 2 samples, got {self.count}")
        return self.scatter / (self.count - 1)

    def gaussian(self) -> Gaussian:
        """Mean and covariance. Raises StatisticsError for fewer than two rows."""
        return Gaussian(self.mean, self.covariance())


def merge(a: Moments, b: Moments) -> Moments:
    """The moments of both sets of rows together; later updates of one do not reach the others.

    Raises:
      StatisticsError: rows of different lengths.
    """
    if len(a.mean) != len(b.mean):
        raise StatisticsError(
            f"moments of {len(a.mean)} and of {len(b.mean)} values cannot be merged"
        )
    both = Moments(len(a.mean))
    for part in (a, b):
        both._combine(part.count, part.mean, part.scatter)
    return both


@dataclass(frozen=True)
class Gaussian:
    """A mean [D] and a covariance [D, D], float64."""

    mean: Float[np.ndarray, " D"]
    covariance: Float[np.ndarray, "D D"]


@dataclass(frozen=True)
class Statistics:
    """What a file of statistics holds.

    Attributes:
      pool: of the feature vectors that the Fréchet distance compares.
      spatial: of the spatial features of sFID, where the file has them.
      features: feature vectors of some or all images, float32 [M, D], where the file has them.
      facts: what the file was computed from; None for a file written elsewhere.
    """

    pool: Gaussian
    spatial: Gaussian | None = None
    features: Float[np.ndarray, "M D"] | None = None
    facts: Mapping[str, Any] | None = None


def save_statistics(path: str | Path, statistics: Statistics) -> None:
    """Writes the .npz described in the module's docstring, atomically."""
    path = Path(path)
    arrays = {"mu": statistics.pool.mean, "sigma": statistics.pool.covariance}
    if statistics.spatial is not None:
        arrays |= {"mu_s": statistics.spatial.mean, "sigma_s": statistics.spatial.covariance}
    if statistics.features is not None:
        arrays["features"] = np.asarray(statistics.features, np.float32)
    if statistics.facts is not None:
        text = json.dumps(dict(statistics.facts), sort_keys=True)
        arrays["facts"] = np.frombuffer(text.encode(), np.uint8)
    with new_file(path) as partial, partial.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def holds_statistics(path: str | Path) -> bool:
    """Whether an .npz file has `mu` and `sigma`. Raises NpzError if it cannot be read."""
    with open_npz(path) as archive:
        return {"mu", "sigma"} <= array_names(archive)


def load_statistics(path: str | Path) -> Statistics:
    """Reads a file of `save_statistics`, of pytorch-fid or of the ADM evaluator.

    Raises:
      NpzError: the file cannot be read or its sizes are not what they claim to be.
      StatisticsError: arrays that are no mean and covariance.
    """
    with open_npz(path) as archive:
        names = array_names(archive)

        def gaussian(mu: str, sigma: str) -> Gaussian:
            mean = read_array(archive, mu, 8 * MAX_DIM)
            if mean.ndim != 1 or mean.dtype.kind != "f":
                raise StatisticsError(f"{path}: {mu!r} is {mean.dtype} {mean.shape}, not float [D]")
            covariance = read_array(archive, sigma, 8 * len(mean) ** 2)
            return _checked(path, sigma, mean.astype(np.float64), covariance)

        pool = gaussian("mu", "sigma")
        spatial = gaussian("mu_s", "sigma_s") if {"mu_s", "sigma_s"} <= names else None
        features = facts = None
        # Only this package's own files hold these two; elsewhere the names may mean anything.
        if "facts" in names:
            facts = _facts(path, read_array(archive, "facts", _MAX_FACTS))
            if "features" in names:
                features = read_array(archive, "features", _MAX_FEATURES)
                fits = features.ndim == 2 and features.shape[1] == len(pool.mean)
                if not (fits and features.dtype == np.float32 and np.isfinite(features).all()):
                    raise StatisticsError(
                        f"{path}: 'features' is {features.dtype} {features.shape}, needed is finite"
                        f" float32 [M, {len(pool.mean)}]"
                    )
    return Statistics(pool, spatial, features, facts)


def _checked(path: str | Path, name: str, mean: np.ndarray, covariance: np.ndarray) -> Gaussian:
    dim = len(mean)
    if covariance.shape != (dim, dim) or covariance.dtype.kind != "f":
        raise StatisticsError(
            f"{path}: {name!r} is {covariance.dtype} {covariance.shape}, not float [{dim}, {dim}]"
        )
    covariance = covariance.astype(np.float64)
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise StatisticsError(f"{path}: the statistics contain NaN or infinity")
    largest = np.abs(covariance).max(initial=0.0)
    if np.diag(covariance).min(initial=0.0) < 0 or (
        np.abs(covariance - covariance.T).max(initial=0.0) > _ASYMMETRY * largest
    ):
        raise StatisticsError(f"{path}: {name!r} is no covariance: not symmetric, or negative")
    return Gaussian(mean, covariance)


def _facts(path: str | Path, array: np.ndarray) -> dict[str, Any]:
    if array.dtype == np.uint8 and array.ndim == 1:
        try:
            facts = json.loads(array.tobytes())
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise StatisticsError(f"{path}: 'facts' is no JSON text: {error}") from error
        if isinstance(facts, dict):
            return facts
    raise StatisticsError(f"{path}: 'facts' is no JSON object as bytes")
