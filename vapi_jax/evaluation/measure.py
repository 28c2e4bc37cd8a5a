"""From two sets of images and settings to a receipt: which metrics can be computed, and their values."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from vapi_jax.common.errors import ExpectedError
from vapi_jax.common.progress import ProgressBar
from vapi_jax.evaluation.collect import Collected, Engine, collect, load_engine, subset
from vapi_jax.evaluation.frechet import frechet
from vapi_jax.evaluation.images import ImageSet, check_pairs, open_images
from vapi_jax.evaluation.inception_score import SPLIT_SIZE, inception_score, shuffled_order
from vapi_jax.evaluation.kernel_distance import SUBSET_SIZE, SUBSETS, kernel_distance
from vapi_jax.evaluation.pairs import PAIR_METRICS, pair_metrics
from vapi_jax.evaluation.precision_recall import NEIGHBOUR, precision_recall
from vapi_jax.evaluation.receipt import environment, find_recipe, precision_differs
from vapi_jax.evaluation.reference import Network, Reference, open_reference
from vapi_jax.evaluation.statistics import Gaussian, Statistics, save_statistics
from vapi_jax.generation import protocols
from vapi_jax.parallel.sharding import make_mesh

FEATURE_METRICS = {
    "fid": "Fréchet distance",
    "sfid": "spatial Fréchet distance",
    "is": "classifier score",
    "precision": "precision",
    "recall": "recall",
    "kid": "kernel distance",
}
"""Metrics of two sets in some network's features, whose label is printed with them."""
PUBLISHED = {"fid": "FID", "sfid": "sFID", "is": "Inception Score", "kid": "KID"}
"""Names that belong to one network alone."""
_FRECHET = {"fid": "pool", "sfid": "spatial"}
DEFAULT_METRICS = tuple(FEATURE_METRICS)
DEFAULT_PAIRED = ("fid", "psnr", "ssim", "lpips_vgg")


class MeasureError(ExpectedError, ValueError):
    """Settings that cannot be measured."""


@dataclass(frozen=True)
class Settings:
    """What is asked for.

    Attributes:
      samples, reference: paths.
      features: a name that `find_extractor` knows.
      inception: file of weights for features that need one.
      any_weights: whether weights other than the published ones are accepted.
      metrics: of `FEATURE_METRICS` and, with `paired`, `PAIR_METRICS`.
      batch: images at once, on all devices together.
      seed: of the order for the Inception Score and of all random subsets.
      pr_images: reference images at most that precision, recall and the kernel distance see.
      paired: sample i is a reconstruction of reference image i.
    """

    samples: str
    reference: str
    features: str = "lpips_vgg"
    inception: str | None = None
    any_weights: bool = False
    metrics: tuple[str, ...] = DEFAULT_METRICS
    batch: int = 64
    seed: int = 0
    pr_images: int = 10_000
    paired: bool = False

    def __post_init__(self) -> None:
        known = {**FEATURE_METRICS, **(PAIR_METRICS if self.paired else {})}
        if unknown := [name for name in self.metrics if name not in known]:
            pairs = (
                " (pairs are compared with --paired)" if set(unknown) & set(PAIR_METRICS) else ""
            )
            raise MeasureError(
                f"metrics {', '.join(unknown)} are unknown here{pairs}; choose from {', '.join(known)}"
            )
        if not self.metrics or min(self.batch, self.pr_images) < 1 or self.seed < 0:
            raise MeasureError(
                "at least one metric, batch >= 1, pr_images >= 1 and seed >= 0 are needed; got"
                f" {len(self.metrics)} metrics, {self.batch}, {self.pr_images}, {self.seed}"
            )

    def asks_for(self, *metrics: str) -> bool:
        return any(name in self.metrics for name in metrics)


# --- metrics --------------------------------------------------------------------------------------


def _title(metric: str, network: Network | None, paired: bool) -> str:
    if network is None or metric in PAIR_METRICS:
        return PAIR_METRICS[metric]
    if network.published:
        name = PUBLISHED.get(metric, FEATURE_METRICS[metric])
        return "r" + name if paired and metric in ("fid", "sfid") else name
    return f"{FEATURE_METRICS[metric]} ({network.label})"


def _entry(value: float, **details: Any) -> dict[str, Any]:
    """A metric of a receipt; JSON has no NaN and no infinity, so those are null with a note."""
    clean = {
        name: None if isinstance(item, float) and not math.isfinite(item) else item
        for name, item in {"value": value, **details}.items()
    }
    if clean["value"] is None:
        clean.setdefault("note", f"not finite: {value}")
    return clean


def _missing(
    settings: Settings, network: Network, samples: ImageSet, reference: Reference
) -> dict[str, str]:
    """Metrics asked for that these features and this reference cannot give, with the reason."""
    why: dict[str, str] = {}
    for metric, feature in (("sfid", "spatial"), ("is", "logits")):
        if feature not in network.dims:
            why[metric] = f"{network.label} has no {feature} features"
    if reference.gaussians and "spatial" not in reference.gaussians:
        why.setdefault("sfid", "the reference statistics have no mu_s and sigma_s")
    sets = (reference.images, reference.features)
    vectors = next((len(part) for part in sets if part is not None), None)
    for metric, least in (("precision", NEIGHBOUR + 1), ("recall", NEIGHBOUR + 1), ("kid", 2)):
        if vectors is None:
            why[metric] = "the reference holds statistics only, neither images nor feature vectors"
        elif min(samples.count, vectors) < least:
            why[metric] = f"at least {least} images on each side are needed"
        elif settings.pr_images < least:
            why[metric] = f"pr_images={settings.pr_images}: at least {least} are needed"
    if samples.count < 2 or (reference.images is not None and reference.images.count < 2):
        for metric in ("fid", "sfid"):
            why.setdefault(metric, "at least 2 images on each side are needed")
    return {metric: reason for metric, reason in why.items() if metric in settings.metrics}


def _frechet_entry(samples: Gaussian, reference: Gaussian) -> dict[str, Any]:
    found = frechet(samples.mean, samples.covariance, reference.mean, reference.covariance)
    entry = _entry(found.distance, singular=found.singular, clipped=found.clipped)
    if found.singular:
        entry["note"] = (
            "a covariance is singular: the value depends strongly on the number of images"
        )
    return entry


def _feature_metrics(
    settings: Settings,
    samples: Collected,
    gaussians: Mapping[str, Gaussian],
    vectors: Float[np.ndarray, "M D"] | None,
) -> dict[str, dict[str, Any]]:
    """Values of the metrics that `settings` asks for, all of which are possible."""
    found: dict[str, dict[str, Any]] = {}
    for metric, feature in _FRECHET.items():
        if settings.asks_for(metric):
            found[metric] = _frechet_entry(samples.gaussians[feature], gaussians[feature])
    if settings.asks_for("is"):
        logits = samples.rows["logits"]
        score = inception_score(logits[shuffled_order(len(logits), settings.seed)])
        spread = score.standard_deviation
        found["is"] = _entry(score.score, standard_deviation=spread, splits=score.splits)
    if settings.asks_for("precision", "recall", "kid"):
        assert vectors is not None
        pool = samples.rows["pool"]
        counts = {"samples": len(pool), "reference_images": len(vectors)}
        if settings.asks_for("precision", "recall"):
            shares = dataclasses.asdict(precision_recall(vectors, pool))
            found |= {m: _entry(shares[m], **counts) for m in shares if settings.asks_for(m)}
        if settings.asks_for("kid"):
            with ProgressBar(SUBSETS, "kernel distance") as progress:
                kernel = kernel_distance(
                    pool, vectors, seed=settings.seed, progress=progress.update
                )
            details = dataclasses.asdict(kernel)
            found["kid"] = _entry(details.pop("distance"), **details, **counts)
    return found


def _pair_entry(values: Float[np.ndarray, " N"]) -> dict[str, Any]:
    equal = int(np.isinf(values).sum())
    if equal:
        return _entry(math.inf, note=f"{equal} of {len(values)} pairs are equal: infinite")
    error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
    return _entry(float(values.mean()), standard_error=error, pairs=len(values))


# --- the whole ------------------------------------------------------------------------------------


def locate(given: str) -> Path:
    """The images of a sampler's directory, where one is given; other paths as they are, absolute."""
    path = Path(given).expanduser().absolute()
    if (path / "recipe.json").is_file():
        for inside in (path / "images", path / "samples.npz"):
            if inside.exists():
                return inside
    return path


def _engine(settings: Settings, images: ImageSet) -> Engine:
    return load_engine(
        settings.features,
        images,
        make_mesh(),
        settings.batch,
        settings.inception,
        settings.any_weights,
    )


def _too_few(
    metrics: Sequence[str], network: Network, samples: ImageSet, reference: Reference
) -> str | None:
    """A warning where a covariance that one of the metrics needs cannot have full rank."""
    dims = [network.dims[feature] for metric, feature in _FRECHET.items() if metric in metrics]
    few = [
        count for count in (samples.count, reference.count) if dims and count and count <= max(dims)
    ]
    if not few:
        return None
    return (
        f"{min(few)} images are no more than the {max(dims)} features: a covariance is singular and the"
        " Fréchet distance means little; the kernel distance does not suffer from that"
    )


def _differences(
    samples: ImageSet, reference: Reference, recipe: Mapping[str, Any] | None
) -> list[str]:
    found, size = [], reference.size
    if size not in (None, (samples.width, samples.height)):
        found.append(
            f"sizes differ: samples {samples.width}x{samples.height}, reference {size[0]}x{size[1]}"
        )
    if recipe is not None and recipe.get("count") not in (None, samples.count):
        found.append(
            f"the sampler's recipe is for {recipe['count']} images, there are {samples.count}"
        )
    return found


def measure(settings: Settings) -> dict[str, Any]:
    """Computes the metrics and returns the receipt that belongs to them.

    Raises:
      ImagesError, NpzError, StatisticsError, FeaturesError, ReceiptError, PerceptualWeightsError: what
        cannot be read, by name.
      MeasureError: nothing that was asked for can be computed.
    """
    samples = open_images(locate(settings.samples))
    recipe = find_recipe(samples.path)
    engine = _engine(settings, samples) if settings.asks_for(*FEATURE_METRICS) else None
    network = None if engine is None else engine.network
    path = locate(settings.reference)
    reference = open_reference(path, None if settings.paired else network)
    if settings.paired:
        assert reference.images is not None
        check_pairs(samples, reference.images)
    warnings = [*reference.warnings, *_differences(samples, reference, recipe)]
    compared = recipe, find_recipe(path)
    warnings += filter(None, (precision_differs(*compared), protocols.differences(*compared)))
    missing: dict[str, str] = {}
    if network is not None:
        missing = _missing(settings, network, samples, reference)
        there = [name for name in settings.metrics if name not in missing]
        published = network.published and not settings.paired and set(there) & set(PUBLISHED)
        if published and (other := protocols.departures(recipe, samples.count, samples.width)):
            warnings.append(other)
        few = _too_few(there, network, samples, reference)
        if few is not None:
            warnings.append(few)
            settings = dataclasses.replace(
                settings, metrics=tuple(dict.fromkeys([*settings.metrics, "kid"]))
            )
            missing = _missing(settings, network, samples, reference)
    possible = tuple(name for name in settings.metrics if name not in missing)
    if not possible:
        reasons = "; ".join(f"{name}: {why}" for name, why in missing.items())
        raise MeasureError(f"none of the metrics can be computed: {reasons}")
    wanted = dataclasses.replace(settings, metrics=possible)

    values: dict[str, dict[str, Any]] = {}
    digests: list[tuple[str, str]] = []
    if engine is not None and wanted.asks_for(*FEATURE_METRICS):
        found, pair = _compare_sets(wanted, engine, samples, reference)
        values |= found
        digests.append(pair)
    if wanted.asks_for(*PAIR_METRICS):
        assert reference.images is not None
        names = [name for name in PAIR_METRICS if name in possible]
        found_pairs, pair = pair_metrics(
            names, samples, reference.images, mesh=make_mesh(), batch=settings.batch
        )
        values |= {name: _pair_entry(each) for name, each in found_pairs.items()}
        digests.append(pair)
    if len(set(digests)) > 1:
        raise MeasureError("the images have changed while they were read")
    order = [name for name in settings.metrics if name in values]
    return {
        "samples": {
            "path": str(samples.path),
            "kind": "images",
            "count": samples.count,
            "height": samples.height,
            "width": samples.width,
            "digest": digests[0][0],
        },
        "reference": reference.facts(digests[0][1]),
        "features": None if engine is None else engine.facts,
        "settings": {
            "metrics": list(settings.metrics),
            "paired": settings.paired,
            "batch": settings.batch,
            "seed": settings.seed,
            "pr_images": settings.pr_images,
            "neighbour": NEIGHBOUR,
            "inception_score_split": SPLIT_SIZE,
            "kernel_subsets": [SUBSETS, SUBSET_SIZE],
        },
        "metrics": {
            name: {"name": _title(name, network, settings.paired), **values[name]} for name in order
        },
        "not_computed": missing,
        "warnings": warnings,
        "sampling": recipe,
        "environment": environment(),
    }


def _compare_sets(
    settings: Settings, engine: Engine, samples: ImageSet, reference: Reference
) -> tuple[dict[str, dict[str, Any]], tuple[str, str]]:
    """The metrics of features, and the digests of both sets."""
    gaussians = [feature for metric, feature in _FRECHET.items() if settings.asks_for(metric)]
    vectors = settings.asks_for("precision", "recall", "kid")
    everything = np.arange(samples.count)
    rows = {"pool": everything} if vectors else {}
    if settings.asks_for("is"):
        rows["logits"] = everything
    ours = collect(engine, samples, "samples", gaussians, rows)
    known, stored, digest = dict(reference.gaussians), reference.features, reference.digest
    lacking = [feature for feature in gaussians if feature not in known]
    if stored is not None:
        stored = stored[subset(len(stored), settings.pr_images, settings.seed)]
    sees_images = vectors and stored is None
    if digest is None or lacking or sees_images:
        assert reference.images is not None
        chosen = subset(reference.images.count, settings.pr_images, settings.seed)
        theirs = collect(
            engine, reference.images, "reference", lacking, {"pool": chosen} if sees_images else {}
        )
        known |= theirs.gaussians
        stored = theirs.rows.get("pool", stored)
        digest = digest or theirs.digest
    return _feature_metrics(settings, ours, known, stored), (ours.digest, digest)


def precompute(settings: Settings, out: Path) -> dict[str, Any]:
    """Writes statistics of the reference images for later evaluations; returns the facts in the file.

    Raises:
      ImagesError, FeaturesError, PerceptualWeightsError: as `measure`.
      MeasureError: fewer than two images, or a file that cannot be written.
    """
    images = open_images(locate(settings.reference))
    if images.count < 2:
        raise MeasureError(f"{images.path} holds one image: statistics need at least 2")
    engine = _engine(settings, images)
    kinds = [name for name in ("pool", "spatial") if name in engine.network.dims]
    chosen = subset(images.count, settings.pr_images, settings.seed)
    found = collect(engine, images, "reference", kinds, {"pool": chosen})
    facts = {
        **engine.facts,
        "images": {
            "path": str(images.path),
            "count": images.count,
            "height": images.height,
            "width": images.width,
            "digest": found.digest,
        },
        "vectors": {"count": len(chosen), "seed": settings.seed},
        **environment(),
    }
    pool, spatial = found.gaussians["pool"], found.gaussians.get("spatial")
    try:
        if jax.process_index() == 0:
            out.parent.mkdir(parents=True, exist_ok=True)
            save_statistics(out, Statistics(pool, spatial, found.rows["pool"], facts))
    except OSError as error:
        raise MeasureError(f"{out} cannot be written: {error}") from error
    return facts
