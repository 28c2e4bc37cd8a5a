"""What samples are compared with: images, statistics of images, or both in one file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from vapi_jax.common.digests import sha256_file
from vapi_jax.evaluation.images import ImageSet, holds_images, open_images
from vapi_jax.evaluation.statistics import (
    Gaussian,
    Statistics,
    StatisticsError,
    holds_statistics,
    load_statistics,
)


@dataclass(frozen=True)
class Network:
    """The feature extractor of an evaluation, as far as a reference has to agree with it.

    Attributes:
      name: as the user gave it.
      label: as numbers are printed.
      parameters: digest of its parameters.
      published: whether they are those that FID is defined on.
      dims: length of each of its features.
    """

    name: str
    label: str
    parameters: str
    published: bool
    dims: dict[str, int]


@dataclass(frozen=True)
class Reference:
    """The other side of every metric; at least one of `images` and `statistics` is there.

    Attributes:
      path: where it lies.
      images: its images, where it has any.
      statistics: its statistics in the features of this evaluation, where it has any.
      count: images behind it, where that is known.
      digest: SHA-256 of a file of statistics; None for images, whose digest needs their pixels.
      warnings: what a reader of the numbers has to know.
    """

    path: Path
    images: ImageSet | None
    statistics: Statistics | None
    count: int | None
    digest: str | None
    warnings: tuple[str, ...] = ()

    @property
    def gaussians(self) -> dict[str, Gaussian]:
        """Its statistics by the name of the feature."""
        if self.statistics is None:
            return {}
        found = {"pool": self.statistics.pool, "spatial": self.statistics.spatial}
        return {name: gaussian for name, gaussian in found.items() if gaussian is not None}

    @property
    def features(self) -> Float[np.ndarray, "M D"] | None:
        """Stored feature vectors, where the file has them."""
        return None if self.statistics is None else self.statistics.features

    @property
    def size(self) -> tuple[int, int] | None:
        """Width and height of its images, where they are known."""
        if self.images is not None:
            return self.images.width, self.images.height
        told = ((self.statistics and self.statistics.facts) or {}).get("images")
        width, height = (
            map(told.get, ("width", "height")) if isinstance(told, dict) else (None, None)
        )
        return (width, height) if isinstance(width, int) and isinstance(height, int) else None

    def facts(self, digest: str) -> dict[str, Any]:
        """What a receipt says of it."""
        kinds = [("statistics", self.statistics), ("images", self.images)]
        facts: dict[str, Any] = {
            "path": str(self.path),
            "kind": " and ".join(name for name, part in kinds if part is not None),
            "count": self.count,
            "digest": digest,
        }
        if self.images is not None:
            facts |= {"height": self.images.height, "width": self.images.width}
        if self.statistics is not None and self.statistics.facts is not None:
            facts["made_from"] = dict(self.statistics.facts)
        return facts


def _of_images(path: Path, *warnings: str) -> Reference:
    images = open_images(path)
    return Reference(path, images, None, images.count, None, warnings)


def open_reference(path: Path, network: Network | None) -> Reference:
    """Opens a folder or an .npz of images, a file of statistics, or an ADM reference batch (both).

    Statistics written elsewhere are taken for those of FID's Inception network, as is the convention;
    ours say what they were made with.

    Args:
      path: the folder or file.
      network: the features of the evaluation; None where pairs are compared by pixels alone.

    Raises:
      ImagesError, NpzError, StatisticsError: nothing usable there, with the reason.
    """
    if network is None or path.suffix.lower() != ".npz" or not path.is_file():
        return _of_images(path)
    if not holds_statistics(path):
        return _of_images(path)
    with_images = holds_images(path)
    statistics = load_statistics(path)
    facts, warnings = statistics.facts, []
    if facts is None and network.name != "inception":
        if not with_images:
            raise StatisticsError(
                f"{path} holds statistics of FID's Inception network and no images, so nothing can be"
                f" compared with it in {network.label}: evaluate with --inception FILE, or give"
                " reference images"
            )
        return _of_images(
            path,
            f"the statistics in {path} are of FID's Inception network and are not used; its images are",
        )
    if facts is None and not network.published:
        warnings.append(
            f"the statistics in {path} are taken to be of FID's Inception network; the weights here"
            " are in another file than the published one"
        )
    if facts is not None and facts.get("parameters_sha256") != network.parameters:
        raise StatisticsError(
            f"{path} holds statistics in {facts.get('label')} (parameters"
            f" {str(facts.get('parameters_sha256'))[:16]}), this evaluation is in {network.label}"
            f" (parameters {network.parameters[:16]}): choose the same --features, or make the"
            " statistics again with --precompute"
        )
    reference = Reference(
        path,
        open_images(path) if with_images else None,
        statistics,
        _count(facts),
        sha256_file(path),
        tuple(warnings),
    )
    for name, gaussian in reference.gaussians.items():
        if len(gaussian.mean) != network.dims.get(name, len(gaussian.mean)):
            raise StatisticsError(
                f"{path} has {name} statistics of {len(gaussian.mean)} values, {network.label} gives"
                f" {network.dims[name]}"
            )
    return reference


def _count(facts: Any) -> int | None:
    images = (facts or {}).get("images")
    count = images.get("count") if isinstance(images, dict) else None
    return count if isinstance(count, int) and count > 0 else None
