"""The Inception network of FID: the classifier of TensorFlow's graph of 2015-12-05, with 1008 classes.

It differs from the InceptionV3 of torchvision in weights and in three places: average pools divide by
the pixels that lie inside the map, the last block pools by maximum, and there are 1008 classes, not
1000. pytorch-fid's port of the weights is the well-known one; blocks and branches have its names here.

Batch normalisation (eps 1e-3, inference statistics) is folded into the convolutions when the weights
are loaded: a convolution is linear in its kernel, so only the rounding of float32 changes (1e-6 of the
features), and 94 multiplications and subtractions of whole maps are saved. The weights are frozen.

Everything runs in float32 with products at highest precision. The default of GPUs and TPUs multiplies
in fewer bits, which moves features, and with them a distance that is compared between papers.

Parameters: {"Conv2d_1a_3x3": {"kernel" HWIO, "bias"}, ..., "Mixed_5b": {"branch1x1": {...}, ...}, ...,
"fc": {"kernel" [2048, 1008], "bias"}}.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from vapi_jax.common.digests import sha256_file
from vapi_jax.common.trees import flatten, unflatten
from vapi_jax.models.layers import conv2d
from vapi_jax.models.resize import bilinear_tf1_legacy
from vapi_jax.weights.names import Rule, WeightsError, from_reference
from vapi_jax.weights.store import load_safetensors
from vapi_jax.weights.torch_file import open_torch_file

Params = Mapping[str, Any]

SIDE = 299
"""Height and width of the network's input."""
SPATIAL_CHANNELS = 7
"""How many channels of the 17x17 map make the spatial features of sFID."""

FILE_NAME = "pt_inception-2015-12-05-6726825d.pth"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
"""Of the released file; its first eight digits are part of the file's name."""

_BATCH_NORM_EPS = 1e-3

# --- the table of convolutions: block and branch -> (height, width, in, out) of the kernel ----------

_Kernel = tuple[int, int, int, int]


def _a(inputs: int, pooled: int) -> dict[str, _Kernel]:
    return {
        "branch1x1": (1, 1, inputs, 64),
        "branch5x5_1": (1, 1, inputs, 48),
        "branch5x5_2": (5, 5, 48, 64),
        "branch3x3dbl_1": (1, 1, inputs, 64),
        "branch3x3dbl_2": (3, 3, 64, 96),
        "branch3x3dbl_3": (3, 3, 96, 96),
        "branch_pool": (1, 1, inputs, pooled),
    }


def _b(inputs: int) -> dict[str, _Kernel]:
    return {
        "branch3x3": (3, 3, inputs, 384),
        "branch3x3dbl_1": (1, 1, inputs, 64),
        "branch3x3dbl_2": (3, 3, 64, 96),
        "branch3x3dbl_3": (3, 3, 96, 96),
    }


def _c(inputs: int, width: int) -> dict[str, _Kernel]:
    return {
        "branch1x1": (1, 1, inputs, 192),
        "branch7x7_1": (1, 1, inputs, width),
        "branch7x7_2": (1, 7, width, width),
        "branch7x7_3": (7, 1, width, 192),
        "branch7x7dbl_1": (1, 1, inputs, width),
        "branch7x7dbl_2": (7, 1, width, width),
        "branch7x7dbl_3": (1, 7, width, width),
        "branch7x7dbl_4": (7, 1, width, width),
        "branch7x7dbl_5": (1, 7, width, 192),
        "branch_pool": (1, 1, inputs, 192),
    }


def _d(inputs: int) -> dict[str, _Kernel]:
    return {
        "branch3x3_1": (1, 1, inputs, 192),
        "branch3x3_2": (3, 3, 192, 320),
        "branch7x7x3_1": (1, 1, inputs, 192),
        "branch7x7x3_2": (1, 7, 192, 192),
        "branch7x7x3_3": (7, 1, 192, 192),
        "branch7x7x3_4": (3, 3, 192, 192),
    }


def _e(inputs: int) -> dict[str, _Kernel]:
    return {
        "branch1x1": (1, 1, inputs, 320),
        "branch3x3_1": (1, 1, inputs, 384),
        "branch3x3_2a": (1, 3, 384, 384),
        "branch3x3_2b": (3, 1, 384, 384),
        "branch3x3dbl_1": (1, 1, inputs, 448),
        "branch3x3dbl_2": (3, 3, 448, 384),
        "branch3x3dbl_3a": (1, 3, 384, 384),
        "branch3x3dbl_3b": (3, 1, 384, 384),
        "branch_pool": (1, 1, inputs, 192),
    }


_CONVOLUTIONS: dict[str, _Kernel] = flatten(
    {
        "Conv2d_1a_3x3": (3, 3, 3, 32),
        "Conv2d_2a_3x3": (3, 3, 32, 32),
        "Conv2d_2b_3x3": (3, 3, 32, 64),
        "Conv2d_3b_1x1": (1, 1, 64, 80),
        "Conv2d_4a_3x3": (3, 3, 80, 192),
        "Mixed_5b": _a(192, 32),
        "Mixed_5c": _a(256, 64),
        "Mixed_5d": _a(288, 64),
        "Mixed_6a": _b(288),
        "Mixed_6b": _c(768, 128),
        "Mixed_6c": _c(768, 160),
        "Mixed_6d": _c(768, 160),
        "Mixed_6e": _c(768, 192),
        "Mixed_7a": _d(768),
        "Mixed_7b": _e(1280),
        "Mixed_7c": _e(2048),
    }
)

# --- the blocks -------------------------------------------------------------------------------------


def _conv(params: Params, x: Array, strides: int = 1, padding: str = "SAME") -> Array:
    out = conv2d(x, params["kernel"], strides=strides, padding=padding)
    return jax.nn.relu(out + params["bias"])


def _chain(params: Params, x: Array, *names: str) -> Array:
    for name in names:
        x = _conv(params[name], x)
    return x


def _concatenate(*branches: Array) -> Array:
    return jnp.concatenate(branches, axis=-1)


def _average_pool(x: Array) -> Array:
    """3x3, stride 1; at the border the mean of the pixels that there are."""
    return nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)


def _max_pool(x: Array, stride: int = 2, padding: str = "VALID") -> Array:
    return nn.max_pool(x, (3, 3), (stride, stride), padding)


def _stem(params: Params, x: Float[Array, "N 299 299 3"]) -> Float[Array, "N 35 35 192"]:
    x = _conv(params["Conv2d_1a_3x3"], x, 2, "VALID")
    x = _conv(params["Conv2d_2a_3x3"], x, 1, "VALID")
    x = _max_pool(_conv(params["Conv2d_2b_3x3"], x))
    x = _conv(params["Conv2d_3b_1x1"], x)
    return _max_pool(_conv(params["Conv2d_4a_3x3"], x, 1, "VALID"))


def _mixed_a(params: Params, x: Float[Array, "N H W I"]) -> Float[Array, "N H W O"]:
    return _concatenate(
        _chain(params, x, "branch1x1"),
        _chain(params, x, "branch5x5_1", "branch5x5_2"),
        _chain(params, x, "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"),
        _chain(params, _average_pool(x), "branch_pool"),
    )


def _mixed_b(params: Params, x: Float[Array, "N H W I"]) -> Float[Array, "N h w O"]:
    double = _chain(params, x, "branch3x3dbl_1", "branch3x3dbl_2")
    return _concatenate(
        _conv(params["branch3x3"], x, 2, "VALID"),
        _conv(params["branch3x3dbl_3"], double, 2, "VALID"),
        _max_pool(x),
    )


def _mixed_c(params: Params, x: Float[Array, "N H W I"]) -> Float[Array, "N H W 768"]:
    double = (f"branch7x7dbl_{i}" for i in range(1, 6))
    return _concatenate(
        _chain(params, x, "branch1x1"),
        _chain(params, x, "branch7x7_1", "branch7x7_2", "branch7x7_3"),
        _chain(params, x, *double),
        _chain(params, _average_pool(x), "branch_pool"),
    )


def _mixed_d(params: Params, x: Float[Array, "N H W I"]) -> Float[Array, "N h w O"]:
    wide = _chain(params, x, "branch7x7x3_1", "branch7x7x3_2", "branch7x7x3_3")
    return _concatenate(
        _conv(params["branch3x3_2"], _chain(params, x, "branch3x3_1"), 2, "VALID"),
        _conv(params["branch7x7x3_4"], wide, 2, "VALID"),
        _max_pool(x),
    )


def _mixed_e(
    params: Params, x: Float[Array, "N H W I"], pooled: Float[Array, "N H W I"]
) -> Float[Array, "N H W 2048"]:
    """`pooled` is `x` after the pool of the last branch, which differs between the two blocks."""
    single = _chain(params, x, "branch3x3_1")
    double = _chain(params, x, "branch3x3dbl_1", "branch3x3dbl_2")
    return _concatenate(
        _chain(params, x, "branch1x1"),
        _chain(params, single, "branch3x3_2a"),
        _chain(params, single, "branch3x3_2b"),
        _chain(params, double, "branch3x3dbl_3a"),
        _chain(params, double, "branch3x3dbl_3b"),
        _chain(params, pooled, "branch_pool"),
    )


# --- the network ------------------------------------------------------------------------------------


def preprocess(images: UInt8[Array, "N H W 3"]) -> Float[Array, "N 299 299 3"]:
    """Images as the evaluators feed them: resized by `bilinear_tf1_legacy`, then (x - 128) / 128.

    Args:
      images: uint8 [N, H, W, 3] of any size.

    Returns:
      float32 [N, 299, 299, 3] in [-1, 1).

    Raises:
      ValueError: another shape or type. Images in [-1, 1] or [0, 1] would pass through the network
        unnoticed, hence no floating point here.
    """
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
        raise ValueError(
            "Inception wants uint8 images [N, H, W, 3] in 0..255, got "
            f"{images.dtype} {images.shape}; convert images in [-1, 1] with common.images.to_uint8"
        )
    return (bilinear_tf1_legacy(images, SIDE, SIDE) - 128) / 128


def inception_features(
    params: Params, images: Float[Array, "N 299 299 3"]
) -> dict[str, Float[Array, "N D"]]:
    """What FID, sFID and the Inception Score are computed from, as in OpenAI's (ADM's) evaluator.

    Args:
      params: as in `InceptionWeights.params`.
      images: from `preprocess`.

    Returns:
      float32 arrays:
        "pool" [N, 2048]: mean over the last map's 8x8 pixels (`pool_3:0`), for FID.
        "spatial" [N, 2023]: the first 7 channels of `mixed_6/conv:0`, after its ReLU, 17x17 pixels
          in the order height, width, channel, for sFID.
        "logits" [N, 1008]: pool times the classifier's matrix WITHOUT its bias; the Inception Score
          takes their softmax.

    Raises:
      ValueError: images of another shape.
    """
    if images.ndim != 4 or images.shape[1:] != (SIDE, SIDE, 3):
        raise ValueError(f"images must be [N, {SIDE}, {SIDE}, 3], got {images.shape}: preprocess")
    with jax.default_matmul_precision("highest"), jax.named_scope("inception"):
        x = _stem(params, images.astype(jnp.float32))
        for name in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
            x = _mixed_a(params[name], x)
        x = _mixed_b(params["Mixed_6a"], x)
        for name in ("Mixed_6b", "Mixed_6c", "Mixed_6d"):
            x = _mixed_c(params[name], x)
        # The graph's `mixed_6/conv` is Mixed_6d's 1x1 branch: the first channels of the block.
        spatial = x[..., :SPATIAL_CHANNELS].reshape(x.shape[0], -1)
        x = _mixed_c(params["Mixed_6e"], x)
        x = _mixed_d(params["Mixed_7a"], x)
        x = _mixed_e(params["Mixed_7b"], x, _average_pool(x))
        x = _mixed_e(params["Mixed_7c"], x, _max_pool(x, 1, "SAME"))
        pool = jnp.mean(x, axis=(1, 2))
        return {"pool": pool, "spatial": spatial, "logits": pool @ params["fc"]["kernel"]}


# --- the weights ------------------------------------------------------------------------------------

# A convolution of the stem has one level of names, one inside a block two.
NAME_RULES: tuple[Rule, ...] = (
    Rule(r"fc/kernel", r"fc.weight", "linear"),
    Rule(r"fc/bias", r"fc.bias"),
    *(
        Rule(f"{ours}/{leaf}", f"{theirs}.{their_leaf}", kind)
        for ours, theirs in ((r"(\w+)", r"\1"), (r"(\w+)/(\w+)", r"\1.\2"))
        for leaf, their_leaf, kind in (
            ("conv/kernel", "conv.weight", "conv"),
            ("bn/scale", "bn.weight", "same"),
            ("bn/bias", "bn.bias", "same"),
            ("bn/mean", "bn.running_mean", "same"),
            ("bn/var", "bn.running_var", "same"),
        )
    ),
)
# A counter of training steps, and a second classifier that only training uses.
IGNORED_NAMES: tuple[str, ...] = (r".*\.num_batches_tracked", r"AuxLogits\..*")


@dataclass(frozen=True)
class InceptionWeights:
    """Weights ready for `inception_features`.

    Attributes:
      params: nested dict of float32 numpy arrays, batch normalisation folded in.
      sha256: digest of the file they came from, to be reported beside every number.
    """

    params: Params
    sha256: str


def inception_shapes() -> dict[str, Any]:
    """The released weights as a tree of `jax.ShapeDtypeStruct`: batch normalisation not folded."""
    shapes: dict[str, tuple[int, ...]] = {"fc/kernel": (2048, 1008), "fc/bias": (1008,)}
    for name, kernel in _CONVOLUTIONS.items():
        shapes[f"{name}/conv/kernel"] = kernel
        for leaf in ("scale", "bias", "mean", "var"):
            shapes[f"{name}/bn/{leaf}"] = kernel[-1:]
    return unflatten(
        {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}
    )


def fold_batch_norm(tree: Params) -> dict[str, Any]:
    """Every {"conv", "bn"} of a tree as one {"kernel", "bias"}; other leaves stay.

    (k * x - mean) * scale / sqrt(var + eps) + shift = (k * s) * x + (shift - mean * s), computed in
    float64 and rounded once.
    """
    if "bn" in tree:
        norm = {name: np.asarray(value, np.float64) for name, value in tree["bn"].items()}
        factor = norm["scale"] / np.sqrt(norm["var"] + _BATCH_NORM_EPS)
        return {
            "kernel": (tree["conv"]["kernel"] * factor).astype(np.float32),
            "bias": (norm["bias"] - norm["mean"] * factor).astype(np.float32),
        }
    return {k: fold_batch_norm(v) if isinstance(v, Mapping) else v for k, v in tree.items()}


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
    if path.suffix == ".safetensors":
        return load_safetensors(path)
    # The released file is in the format before PyTorch 1.6; its digest does for the lack of checksums.
    with open_torch_file(path, legacy=True) as file:
        value = file.value
        if not isinstance(value, Mapping) or not all(hasattr(v, "read") for v in value.values()):
            raise WeightsError(f"{path} is no table from names to tensors, as {FILE_NAME} is")
        return {name: tensor.read() for name, tensor in value.items()}


def load_inception(path: str | Path, any_weights: bool = False) -> InceptionWeights:
    """Reads FID's Inception weights.

    Args:
      path: the released file, or one of the same tensor names (.safetensors, else PyTorch's zip
        format or the one before PyTorch 1.6, which the released file has).
      any_weights: accept a file with another digest: weights of one's own, or the released ones in
        another container. Numbers computed with it are FID only in the second case.

    Raises:
      WeightsError: the file is missing, is not the released one (unless `any_weights`), or its
        tensors do not fit or are not finite.
      TorchFileError, PickleRefused: the file is damaged or asks for more than plain data.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(
            f"{path}: no such file. FID is defined on the weights {FILE_NAME} (its SHA-256 begins "
            f"with {SHA256[:8]}), a release file of the pytorch-fid project: download it and name it "
            "here. No other network stands in for it; without it the evaluation measures distances "
            "of LPIPS features and names them so"
        )
    digest = sha256_file(path)
    if digest != SHA256 and not any_weights:
        raise WeightsError(
            f"{path} is not {FILE_NAME}: its SHA-256 is {digest}, the released file has {SHA256}. "
            "Download it again; or, for weights of your own, ask for any_weights, and do not call the "
            "result FID"
        )
    tree = from_reference(_read_tensors(path), inception_shapes(), NAME_RULES, IGNORED_NAMES)
    with np.errstate(invalid="ignore"):
        params = fold_batch_norm(tree)
    broken = [name for name, leaf in flatten(params).items() if not np.isfinite(leaf).all()]
    if broken:
        raise WeightsError(
            f"{path}: not finite after folding the batch normalisation (a NaN, or a variance below "
            f"zero): {', '.join(broken)}"
        )
    return InceptionWeights(params, digest)
