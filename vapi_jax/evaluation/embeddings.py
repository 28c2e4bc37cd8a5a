"""Pictures of embeddings after Fig. 1 of the paper: a density estimate, and t-SNE.

Sets of features (real crops, samples of the base, of the post-trained policy) become points in a
plane: by the two first principal components of the real ones, with a kernel density estimate of each
set, and by t-SNE of all sets together. What comes out is data; `vapi_jax.report.figures.plane` draws it.

sklearn, scipy.stats and skimage are imported where they are used: together they take two seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

SHARES = (0.9, 0.5)
"""Shares of a set that its drawn regions hold."""

TSNE_POINTS = 300
"""Points of each set that t-SNE is given: 900 take seconds, and more only blacken the paper."""

_DRAWN_POINTS = 250  # of each set, faintly over its regions
_TSNE_DIMS = 50  # of the principal components that t-SNE starts from, as its authors do
_GRID = 120
_MOST_SETS = 3  # that can be told apart in one picture


@dataclass(frozen=True)
class Cloud:
    """One set of points in a plane.

    Attributes:
      label: for the legend.
      points: the points to draw, float64.
      regions: for each of `SHARES` the closed outlines of the densest region that holds so much of
        the set; empty where no density was estimated. Those of holes run the other way round.
    """

    label: str
    points: Float[np.ndarray, "N 2"]
    regions: tuple[tuple[Float[np.ndarray, "M 2"], ...], ...]


@dataclass(frozen=True)
class Plane:
    """A drawing of sets of points.

    Attributes:
      name: of a file.
      title, x_label, y_label: text.
      note: what has to be said below the drawing.
      clouds: from what the others should look like to what the run has made.
      limits: x0, x1, y0, y1 that hold everything.
    """

    name: str
    title: str
    x_label: str
    y_label: str
    note: str
    clouds: tuple[Cloud, ...]
    limits: tuple[float, float, float, float]


def check(sets: Mapping[str, Float[np.ndarray, "N D"]]) -> None:
    """Raises ValueError unless these are 1 to 3 sets of finite features, 2 rows or more, of one width."""
    if not 1 <= len(sets) <= _MOST_SETS:
        raise ValueError(f"1 to {_MOST_SETS} sets of features can be drawn, got {len(sets)}")
    shapes = {name: np.shape(rows) for name, rows in sets.items()}
    widths = {shape[-1] if len(shape) == 2 else 0 for shape in shapes.values()}
    if len(widths) != 1 or min(widths) < 2 or min(shape[0] for shape in shapes.values()) < 2:
        raise ValueError(f"features [N >= 2, D >= 2] of one width are needed, got {shapes}")
    for name, rows in sets.items():
        if not np.isfinite(rows).all():
            raise ValueError(f"features of {name!r} contain NaN or infinity")


def principal_plane(
    sets: Mapping[str, Float[np.ndarray, "N D"]], fitted_on: str
) -> tuple[dict[str, Float[np.ndarray, "N 2"]], float]:
    """All sets in the plane of one set's two first principal components.

    Fitted on the real images, the axes do not change with the models that are compared.

    Args:
      sets: name -> features, as `check` wants them.
      fitted_on: the set whose components are taken.

    Returns:
      name -> float64 [N, 2], and the share of that set's variance which the plane shows (0 where it
      has none).
    """
    from sklearn.decomposition import PCA

    check(sets)
    own = np.asarray(sets[fitted_on], np.float64)
    variance = own.var(axis=0).sum()
    with np.errstate(invalid="ignore"):  # 0/0 of its own ratio, where all points are the same
        fitted = PCA(2, svd_solver="covariance_eigh").fit(own)
    points = {name: fitted.transform(np.asarray(rows, np.float64)) for name, rows in sets.items()}
    shown = fitted.explained_variance_.sum() * (len(own) - 1) / len(own)
    return points, float(shown / variance) if variance > 0 else 0.0


def regions(
    points: Float[np.ndarray, "N 2"],
    limits: tuple[float, float, float, float],
    shares: Sequence[float] = SHARES,
) -> tuple[tuple[Float[np.ndarray, "M 2"], ...], ...]:
    """Outlines of the densest regions, by scipy's Gaussian kernel estimate with Scott's bandwidth.

    A region holds the share of the points at which the estimate is highest.

    Args:
      points: one set.
      limits: x0, x1, y0, y1 of the grid that the estimate is taken on.
      shares: of the points, from the largest to the smallest region.

    Returns:
      For each share its closed outlines; an empty tuple for points on a line, or fewer than four:
      they have no density in the plane.
    """
    from scipy.stats import gaussian_kde
    from skimage.measure import find_contours

    spread = np.linalg.svd(points - points.mean(axis=0), compute_uv=False)
    if len(points) < 4 or spread[-1] <= 1e-6 * spread[0]:
        return ()
    estimate = gaussian_kde(points.T)
    x0, x1, y0, y1 = limits
    x, y = np.linspace(x0, x1, _GRID), np.linspace(y0, y1, _GRID)
    on_grid = estimate(np.stack(np.meshgrid(x, y, indexing="ij")).reshape(2, -1))
    # A rim of zeros closes outlines that the limits would cut open.
    padded = np.pad(on_grid.reshape(_GRID, _GRID), 1)
    at_points = estimate(points.T)
    step = np.array([(x1 - x0), (y1 - y0)]) / (_GRID - 1)
    found = []
    for share in shares:
        level = float(np.quantile(at_points, 1.0 - share))
        lines = find_contours(padded, level)
        found.append(tuple((line - 1.0) * step + [x0, y0] for line in lines))
    return tuple(found)


def _limits(
    points: Mapping[str, Float[np.ndarray, "N 2"]], margin: float
) -> tuple[float, float, float, float]:
    every = np.concatenate(list(points.values()))
    low, high = every.min(axis=0), every.max(axis=0)
    # A side without extent takes the other's, and both take 1 where all points are the same.
    size = float((high - low).max()) or 1.0
    more = np.where(high - low > 1e-9 * size, margin * (high - low), size / 2)
    (x0, y0), (x1, y1) = low - more, high + more
    return float(x0), float(x1), float(y0), float(y1)


def planes_of(
    sets: Mapping[str, Float[np.ndarray, "N D"]], name: str, feature: str
) -> tuple[Plane, Plane]:
    """Both pictures of some sets.

    Args:
      sets: label -> features; the first is what the others should look like.
      name: of the extractor, for the names of the files.
      feature: the extractor in words, for the titles.

    Raises:
      ValueError: as `check`.
    """
    return density_plane(sets, name, feature), tsne_plane(sets, name, feature)


def density_plane(sets: Mapping[str, Float[np.ndarray, "N D"]], name: str, feature: str) -> Plane:
    """The density estimate of each set, in the principal plane of the first; see `planes_of`."""
    check(sets)
    first = next(iter(sets))
    points, share = principal_plane(sets, first)
    limits = _limits(points, 0.15)
    clouds = tuple(
        Cloud(label, at[:_DRAWN_POINTS], regions(at, limits)) for label, at in points.items()
    )
    held = " and ".join(f"{share:.0%}" for share in SHARES)
    note = (
        f"Gaussian kernel density estimates: the outlines hold {held} of each set. The plane shows"
        f" {share:.0%} of the variance of “{first}”; sets that differ in other directions look alike here."
    )
    flat = [cloud.label for cloud in clouds if not cloud.regions]
    if flat:
        note += f" No density for {', '.join(flat)}: the points are too few or lie on a line."
    return Plane(
        name=f"density_{name}",
        title=f"Density of image embeddings, {feature}",
        x_label=f"1st principal component of “{first}”",
        y_label=f"2nd principal component of “{first}”",
        note=note,
        clouds=clouds,
        limits=limits,
    )


def tsne_plane(sets: Mapping[str, Float[np.ndarray, "N D"]], name: str, feature: str) -> Plane:
    """t-SNE of all sets together, from the first `TSNE_POINTS` of each.

    scikit-learn's, started from the principal components, on one thread: threads would add gradients
    up in another order at every call, and the same features would give another picture.
    Arguments are those of `planes_of`.
    """
    check(sets)
    parts = [np.asarray(rows[:TSNE_POINTS], np.float64) for rows in sets.values()]
    embedded = _tsne(np.concatenate(parts))
    cuts = np.cumsum([len(part) for part in parts])[:-1]
    points = dict(zip(sets, np.split(embedded, cuts), strict=True))
    clouds = tuple(Cloud(label, at, ()) for label, at in points.items())
    return Plane(
        name=f"tsne_{name}",
        title=f"t-SNE of image embeddings, {feature}",
        x_label="t-SNE 1",
        y_label="t-SNE 2",
        note="Neighbours in the features are neighbours here. The axes have no units, and neither"
        " distances between clusters nor their sizes mean much.",
        clouds=clouds,
        limits=_limits(points, 0.04),
    )


def _tsne(rows: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N 2"]:
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    spread = np.abs(rows - rows.mean(axis=0)).max()
    if spread <= 1e-9 * max(np.abs(rows).max(), 1e-30):
        return np.zeros((len(rows), 2))  # all the same point: nothing to lay out
    # Its neighbours are measured with an absolute precision.
    rows = (rows - rows.mean(axis=0)) / spread
    with threadpool_limits(1):
        rows = PCA(min(_TSNE_DIMS, *rows.shape), svd_solver="covariance_eigh").fit_transform(rows)
        perplexity = min(30.0, (len(rows) - 1) / 3)
        layout = TSNE(2, init="pca", perplexity=perplexity, random_state=0)
        return layout.fit_transform(rows).astype(np.float64)
