"""One pass over a set of images: digest, statistics of features, and the vectors that are wanted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from vapi_jax.common.digests import params_digest
from vapi_jax.common.progress import ProgressBar
from vapi_jax.evaluation import features as F
from vapi_jax.evaluation.images import Batch, ImageSet, PixelDigest
from vapi_jax.evaluation.reference import Network
from vapi_jax.evaluation.statistics import Gaussian, Moments


@dataclass(frozen=True)
class Engine:
    """A loaded extractor, and how it is run."""

    extractor: F.Extractor
    weights: F.Weights
    network: Network
    mesh: Mesh
    batch: int

    @property
    def facts(self) -> dict[str, Any]:
        """What a receipt says of it."""
        network, weights = self.network, self.weights
        facts = {
            "name": network.name,
            "label": network.label,
            "parameters_sha256": network.parameters,
            "published": network.published,
        }
        return facts | (
            {"file": weights.file, "file_sha256": weights.file_sha256} if weights.file else {}
        )


def load_engine(
    name: str, images: ImageSet, mesh: Mesh, batch: int, file: str | None, any_weights: bool
) -> Engine:
    """Finds an extractor and loads it for images of one size.

    Args:
      name: as for `find_extractor`.
      images: what it will see.
      mesh: the devices.
      batch: images at once.
      file: weights, for an extractor that needs some.
      any_weights: accept weights other than the published ones.

    Raises:
      FeaturesError, PerceptualWeightsError: no such extractor, weights, or fit.
    """
    extractor = F.find_extractor(name)
    weights = extractor.load(file, any_weights)
    digest, label = params_digest(weights.params), extractor.label
    if extractor.needs_file and not weights.published:
        label = f"{label}, weights {weights.file_sha256[:8]}"
    dims = F.feature_dims(extractor, weights.params, images.height, images.width)
    network = Network(name, label, digest, weights.published, dims)
    return Engine(extractor, weights, network, mesh, batch)


@dataclass(frozen=True)
class Collected:
    """One pass over a set: its digest, statistics and feature vectors, by name of the feature."""

    digest: str
    gaussians: dict[str, Gaussian]
    rows: dict[str, Float[np.ndarray, "N D"]]


def subset(count: int, limit: int, seed: int) -> Int[np.ndarray, " M"]:
    """At most `limit` of `count` images, drawn at random: folders come class after class."""
    if count <= limit:
        return np.arange(count)
    rng = np.random.default_rng([seed, 1])
    return np.sort(rng.choice(count, limit, replace=False))


def digested(images: ImageSet, batch: int, digest: PixelDigest) -> Iterator[Batch]:
    """The batches of a set, each taken into its digest on the way."""
    for part in images.batches(batch):
        digest.update(part)
        yield part


def collect(
    engine: Engine,
    images: ImageSet,
    title: str,
    gaussians: Sequence[str],
    rows: Mapping[str, Int[np.ndarray, " M"]],
) -> Collected:
    """One pass over a set of images.

    Args:
      engine: what computes features.
      images: all of them are read.
      title: shown with the progress.
      gaussians: features of which mean and covariance are wanted.
      rows: feature -> the images, in rising order, whose vectors are wanted.

    Raises:
      ImagesError: an unreadable image.
      FeaturesError: features that are not finite.
    """
    if not gaussians and not rows:
        digest = PixelDigest(images)
        for _ in digested(images, engine.batch, digest):
            continue
        return Collected(digest.hexdigest(), {}, {})
    dims, digest = engine.network.dims, PixelDigest(images)
    moments = {name: Moments(dims[name]) for name in gaussians}
    kept = {name: np.empty((len(which), dims[name]), np.float32) for name, which in rows.items()}
    stream = F.FeatureStream(
        engine.extractor.apply,
        engine.weights.params,
        mesh=engine.mesh,
        batch_size=engine.batch,
        names=sorted({*gaussians, *rows}),
    )
    found_in = stream(digested(images, engine.batch, digest))
    seen = 0
    with ProgressBar(-(-images.count // engine.batch), title) as progress:
        for done, found in enumerate(found_in, 1):
            count = len(next(iter(found.values())))
            if broken := [name for name, part in found.items() if not np.isfinite(part).all()]:
                raise F.FeaturesError(
                    f"{engine.network.label}: features {', '.join(broken)} of images {seen} to"
                    f" {seen + count - 1} of {images.path} contain NaN or infinity"
                )
            for name, moment in moments.items():
                moment.update(found[name])
            for name, which in rows.items():
                low, high = np.searchsorted(which, (seen, seen + count))
                kept[name][low:high] = found[name][which[low:high] - seen]
            seen += count
            progress.update(done, count)
    whole = {name: moment.gaussian() for name, moment in moments.items()}
    return Collected(digest.hexdigest(), whole, kept)
