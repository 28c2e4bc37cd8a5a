"""Image features for distances between sets of images, and the place to plug in others.

`inception` is the network that FID, sFID and the Inception Score are defined on; its weights are a
file that the user brings. `lpips_vgg` and `lpips_alex` are the two classifiers that LPIPS brings along,
`efficientnet_lite0` a third one that a package brings along: distances in them are not FID and never carry
its name. Values compare with each other only for the same feature, image size and number of samples.
`vgg_relu4_3` shares its network with the usual perceptual reward; that reward has seen neither `alex_conv5`
nor EfficientNet, which, as FID's network, was trained on ImageNet and has its classes.

A network of one's own is an `Extractor`: give it to `register` under a name, or name it on the command
line as MODULE:ATTRIBUTE:

    def load(file, any_weights):
        return Weights({"dense": np.load("dense.npy")})

    def apply(params, images):  # uint8 [N, H, W, 3]
        x = images.reshape(len(images), -1) / 255.0
        return {"pool": x @ params["dense"]}

    register("mine", Extractor("my dense layer", load, apply))
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8

from vapi_jax.common.errors import ExpectedError
from vapi_jax.models import efficientnet, inception
from vapi_jax.models.lpips import backbone_features, load_lpips_params
from vapi_jax.parallel import compiler
from vapi_jax.parallel.sharding import host_array, replicated, shard_whole

Params = Mapping[str, Any]

# Below this AlexNet's last maps shrink to 1x1 pixel.
ALEX_SIDE = 64
# Of images that EfficientNet judges in a run's own table.
JUDGE_SIDE = 112


@dataclass(frozen=True)
class FeatureExtractor:
    """One row of `FEATURES`: a feature of images in [-1, 1], as a run's own evaluation uses it.

    Attributes:
      load: () -> parameters.
      apply: pure (params, images [N, H, W, 3] in [-1, 1]) -> float32 [N, dim].
      dim: length of a feature vector.
      description: the name to print beside every number.
    """

    load: Callable[[], Params]
    apply: Callable[[Params, Array], Array]
    dim: int
    description: str


def vgg_relu4_3(params: Params, images: Float[Array, "N H W 3"]) -> Float[Array, "N 512"]:
    """Spatial mean of relu4_3 of the LPIPS VGG16 (4x4 pixels for images of 32x32)."""
    maps = backbone_features(params, images, "vgg", taps=4)[-1]
    return jnp.mean(maps, axis=(1, 2))


def alex_conv5(params: Params, images: Float[Array, "N H W 3"]) -> Float[Array, "N 256"]:
    """Spatial mean of the last convolution's ReLU of the LPIPS AlexNet.

    Images whose shorter side is below 64 pixels are first enlarged bilinearly to 64.
    """
    n, height, width, channels = images.shape
    side = min(height, width)
    if side < ALEX_SIDE:
        larger = (round(height * ALEX_SIDE / side), round(width * ALEX_SIDE / side))
        images = jax.image.resize(images, (n, *larger, channels), "bilinear")
    return jnp.mean(backbone_features(params, images, "alex")[-1], axis=(1, 2))


def efficientnet_112(params: Params, images: Float[Array, "N H W 3"]) -> Float[Array, "N 1280"]:
    """EfficientNet-Lite0's pooled features of images resized to 112 pixels: a quarter of 224's time."""
    pixels = jnp.clip(jnp.round((images + 1) * 127.5), 0, 255).astype(jnp.uint8)
    small = efficientnet.preprocess(pixels, JUDGE_SIDE)
    return efficientnet.efficientnet_features(params, small)["pool"]


FEATURES: dict[str, FeatureExtractor] = {
    "vgg_relu4_3": FeatureExtractor(
        load=functools.partial(load_lpips_params, "vgg"),
        apply=vgg_relu4_3,
        dim=512,
        description="LPIPS-VGG16 relu4_3 spatial mean",
    ),
    "alex_conv5": FeatureExtractor(
        load=functools.partial(load_lpips_params, "alex"),
        apply=alex_conv5,
        dim=256,
        description="LPIPS-AlexNet conv5 spatial mean, at 64 px or more",
    ),
    "efficientnet_lite0_112": FeatureExtractor(
        load=efficientnet.load_efficientnet,
        apply=efficientnet_112,
        dim=efficientnet.WIDTH,
        description="EfficientNet-Lite0 pool, at 112 px",
    ),
}


class FeaturesError(ExpectedError, ValueError):
    """A feature extractor that is unknown, cannot be loaded, or does not fit the images."""


@dataclass(frozen=True)
class Weights:
    """What `Extractor.load` returns.

    Attributes:
      params: nested dict of arrays.
      file: the file they were read from; "" where the extractor brings its own.
      file_sha256: its digest.
      published: the weights, bit for bit, that the published metrics are defined on. Only these give
        "FID"; every other network gives a "Fréchet distance" with its label.
    """

    params: Params
    file: str = ""
    file_sha256: str = ""
    published: bool = False


@dataclass(frozen=True)
class Extractor:
    """Turns uint8 images into named features.

    Attributes:
      label: says in print what the features are, for instance "LPIPS-VGG relu4_3".
      load: (file or None, whether weights other than the published ones are accepted) -> Weights.
      apply: pure (params, uint8 images [N, H, W, 3]) -> {name: floating point [N, dim]}. "pool" has to
        be there (Fréchet distance, precision, recall, kernel distance); "spatial" gives sFID and
        "logits" the Inception Score. Rows must not depend on each other.
      needs_file: whether `load` needs a file.
    """

    label: str
    load: Callable[[str | None, bool], Weights]
    apply: Callable[[Params, Array], Mapping[str, Array]]
    needs_file: bool = False


def _load_inception(file: str | None, any_weights: bool) -> Weights:
    if file is None:
        raise FeaturesError(
            f"the features 'inception' need the file {inception.FILE_NAME} (its SHA-256 begins with"
            f" {inception.SHA256[:8]}); name it with --inception"
        )
    try:
        found = inception.load_inception(file, any_weights=any_weights)
    except (OSError, ValueError) as error:
        raise FeaturesError(str(error)) from error
    published = found.sha256 == inception.SHA256
    return Weights(found.params, str(file), found.sha256, published)


def _apply_inception(params: Params, images: UInt8[Array, "N H W 3"]) -> Mapping[str, Array]:
    return inception.inception_features(params, inception.preprocess(images))


def _as_floats(images: UInt8[Array, "N H W 3"]) -> Float[Array, "N H W 3"]:
    """In [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1


def _from_lpips(name: str, label: str) -> Extractor:
    row = FEATURES[name]

    def load(file: str | None, any_weights: bool) -> Weights:
        return Weights(row.load())

    def apply(params: Params, images: UInt8[Array, "N H W 3"]) -> Mapping[str, Array]:
        return {"pool": row.apply(params, _as_floats(images))}

    return Extractor(label, load, apply)


def _load_efficientnet(file: str | None, any_weights: bool) -> Weights:
    return Weights(efficientnet.load_efficientnet())


def _apply_efficientnet(params: Params, images: UInt8[Array, "N H W 3"]) -> Mapping[str, Array]:
    return efficientnet.efficientnet_features(params, efficientnet.preprocess(images))


EXTRACTORS: dict[str, Extractor] = {
    "inception": Extractor("Inception", _load_inception, _apply_inception, needs_file=True),
    "lpips_vgg": _from_lpips("vgg_relu4_3", "LPIPS-VGG relu4_3"),
    "lpips_alex": _from_lpips("alex_conv5", "LPIPS-AlexNet conv5"),
    "efficientnet_lite0": Extractor("EfficientNet-Lite0", _load_efficientnet, _apply_efficientnet),
}
"""What `--features` chooses from; `register` adds to it."""


def register(name: str, extractor: Extractor) -> None:
    """Makes an extractor known under a name.

    Raises:
      FeaturesError: the name is taken, or is no plain identifier.
    """
    if not name.isidentifier():
        raise FeaturesError(f"a name of features must be an identifier, got {name!r}")
    if name in EXTRACTORS:
        raise FeaturesError(f"features {name!r} are registered already")
    EXTRACTORS[name] = extractor


def find_extractor(name: str) -> Extractor:
    """The extractor registered under a name, or the attribute that "package.module:ATTRIBUTE" names.

    The second form imports the module, so it must come from the user and never from a file.

    Raises:
      FeaturesError: neither is there, or the attribute is no `Extractor`.
    """
    if name in EXTRACTORS:
        return EXTRACTORS[name]
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise FeaturesError(
            f"features {name!r} are unknown; choose one of {', '.join(sorted(EXTRACTORS))}, or"
            " MODULE:ATTRIBUTE for an Extractor of your own"
        )
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise FeaturesError(f"features {name!r} cannot be imported: {error}") from error
    if not isinstance(found, Extractor):
        raise FeaturesError(f"{name!r} is a {type(found).__name__}, not an Extractor")
    return found


def feature_dims(extractor: Extractor, params: Params, height: int, width: int) -> dict[str, int]:
    """The features that an extractor gives for images of a size: name -> length.

    Raises:
      FeaturesError: it cannot take such images, or gives something else than rows with a "pool".
    """
    images = jax.ShapeDtypeStruct((1, height, width, 3), jnp.uint8)
    try:
        shapes = dict(jax.eval_shape(extractor.apply, params, images))
    except (TypeError, ValueError) as error:
        raise FeaturesError(
            f"{extractor.label} cannot take images of {width}x{height} pixels: {error}"
        ) from error
    for name, leaf in shapes.items():
        if leaf.ndim != 2 or len(leaf) != 1 or not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise FeaturesError(
                f"{extractor.label} gives {name!r} as {leaf.dtype} {leaf.shape} for one image; floating"
                " point [N, dim] is needed"
            )
    if "pool" not in shapes:
        raise FeaturesError(f"{extractor.label} gives {sorted(shapes)}, but no 'pool'")
    return {name: leaf.shape[1] for name, leaf in shapes.items()}


class FeatureStream:
    """Features of streams of images, batch by batch, on all devices of a mesh, by one program.

    The last batch is filled with black images whose features are dropped. The next batch is on its way
    while the caller works on the last one. The result does not depend on the number of devices beyond
    float32's rounding.

    Args:
      apply: see `Extractor.apply`.
      params: its parameters; brought to every device once.
      mesh: from `make_mesh`.
      batch_size: images per call, rounded up to a multiple of the number of devices.
      names: which of the features; others are not computed where that saves something.
    """

    def __init__(
        self,
        apply: Callable[[Params, Array], Mapping[str, Array]],
        params: Params,
        *,
        mesh: Mesh,
        batch_size: int,
        names: Sequence[str],
    ):
        self.names = tuple(names)
        self._size, self._mesh = -(-batch_size // mesh.size) * mesh.size, mesh
        self._params = jax.device_put(params, replicated(mesh))

        def named(params: Params, images: Array) -> dict[str, Array]:
            found = apply(params, images)
            return {name: found[name].astype(jnp.float32) for name in names}

        self._apply = jax.jit(named, compiler_options=compiler.options(mesh))

    def __call__(
        self, batches: Iterable[UInt8[np.ndarray, "N H W 3"]]
    ) -> Iterator[dict[str, Float[np.ndarray, "N D"]]]:
        """{name: float32 [N, dim]} with the N of each batch.

        Args:
          batches: uint8 images of one size, no batch larger than `batch_size`.
        """
        pending: tuple[dict[str, Array], int] | None = None
        for images in batches:
            missing = self._size - len(images)
            padded = np.pad(images, ((0, missing), (0, 0), (0, 0), (0, 0)))
            running = self._apply(self._params, shard_whole(padded, self._mesh)), len(images)
            if pending is not None:
                yield _fetch(*pending)
            pending = running
        if pending is not None:
            yield _fetch(*pending)

    def whole(
        self, batches: Iterable[UInt8[np.ndarray, "N H W 3"]]
    ) -> dict[str, Float[np.ndarray, "N D"]]:
        """The features of all batches."""
        parts = list(self(batches))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _fetch(features: dict[str, Array], count: int) -> dict[str, np.ndarray]:
    return {name: host_array(value)[:count] for name, value in features.items()}


def stream_of(names: Sequence[str], mesh: Mesh, batch_size: int) -> FeatureStream:
    """These rows of `FEATURES`, all of them in one pass over the images."""
    rows = {name: FEATURES[name] for name in names}

    def apply(params: Params, images: UInt8[Array, "N H W 3"]) -> dict[str, Array]:
        seen = _as_floats(images)
        return {name: row.apply(params[name], seen) for name, row in rows.items()}

    params = {name: row.load() for name, row in rows.items()}
    return FeatureStream(apply, params, mesh=mesh, batch_size=batch_size, names=names)
