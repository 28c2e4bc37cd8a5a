"""CLIP (arXiv 2103.00020): one network for images and one for texts, into one space.

Serves CLIP B/32, L/14, H/14 and what is made of them: HPSv2, PickScore, the aesthetic predictor. They differ
in sizes, which are read off the tensors, in the number of heads and in the activation, x sigmoid(1.702 x)
(OpenAI: "quick_gelu") or exact GELU (LAION, HPSv2, PickScore), which no tensor tells.

Pre-norm blocks with biases. An image's embedding is that of the class token, a text's, which is causal, that
of its first end token, the largest id. Weights lie stacked along a leading layer axis.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from vapi_jax.common.trees import unflatten
from vapi_jax.models.layers import conv2d, precision_of
from vapi_jax.models.resize import bicubic_pillow, bicubic_torch
from vapi_jax.weights.names import Rule

Params = Mapping[str, Any]
Activation = Literal["quick_gelu", "gelu"]
Names = Literal["transformers", "open_clip"]

EPSILON = 1e-5
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


@dataclass(frozen=True)
class Tower:
    """Sizes of a stack of blocks."""

    width: int
    layers: int
    heads: int
    hidden: int


@dataclass(frozen=True)
class CLIPConfig:
    """Sizes of both networks.

    Attributes:
      vision, text: the stacks of blocks.
      image: side of the input in pixels.
      patch: side of a patch.
      context: tokens of a text, first and end token included.
      vocab: ids.
      embed: length of an embedding.
      activation: of the blocks.
    """

    vision: Tower
    text: Tower
    image: int
    patch: int
    context: int
    vocab: int
    embed: int
    activation: Activation


# --- parameters and their names ---------------------------------------------------------------------


def shapes(config: CLIPConfig, dtype: Any = jnp.float32) -> dict[str, Any]:
    """The parameters as ShapeDtypeStructs; "logit_scale" is float32 whatever the others are."""
    c = config

    def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}/scale": (width,), f"{name}/bias": (width,)}

    def tower(name: str, t: Tower) -> dict[str, tuple[int, ...]]:
        leaves: dict[str, tuple[int, ...]] = {**norm("norm_1", t.width), **norm("norm_2", t.width)}
        for place, (inputs, outputs) in {
            **dict.fromkeys(("wq", "wk", "wv", "wo"), (t.width, t.width)),
            "w1": (t.width, t.hidden),
            "w2": (t.hidden, t.width),
        }.items():
            leaves |= {f"{place}/kernel": (inputs, outputs), f"{place}/bias": (outputs,)}
        return {f"{name}/layers/{leaf}": (t.layers, *shape) for leaf, shape in leaves.items()}

    v, t = c.vision, c.text
    flat: dict[str, tuple[int, ...]] = {
        "vision/patches/kernel": (c.patch, c.patch, 3, v.width),
        "vision/class": (v.width,),
        "vision/positions": ((c.image // c.patch) ** 2 + 1, v.width),
        **norm("vision/norm_in", v.width),
        **tower("vision", v),
        **norm("vision/norm_out", v.width),
        "vision/projection/kernel": (v.width, c.embed),
        "text/tokens": (c.vocab, t.width),
        "text/positions": (c.context, t.width),
        **tower("text", t),
        **norm("text/norm_out", t.width),
        "text/projection/kernel": (t.width, c.embed),
        "logit_scale": (),
    }
    return unflatten({
        name: jax.ShapeDtypeStruct(shape, jnp.float32 if name == "logit_scale" else dtype)
        for name, shape in flat.items()
    })  # fmt: skip


def _norm_rules(ours: str, theirs: str) -> list[Rule]:
    return [Rule(f"{ours}/scale", f"{theirs}.weight"), Rule(f"{ours}/bias", f"{theirs}.bias")]


def _linear_rules(ours: str, theirs: str) -> list[Rule]:
    kernel = Rule(f"{ours}/kernel", f"{theirs}.weight", "linear")
    return [kernel, Rule(f"{ours}/bias", f"{theirs}.bias")]


def _transformers_rules() -> tuple[Rule, ...]:
    rules = [
        Rule(r"vision/patches/kernel", "vision_model.embeddings.patch_embedding.weight", "conv"),
        Rule(r"vision/class", "vision_model.embeddings.class_embedding"),
        Rule(r"vision/positions", "vision_model.embeddings.position_embedding.weight"),
        *_norm_rules(r"vision/norm_in", "vision_model.pre_layrnorm"),
        *_norm_rules(r"vision/norm_out", "vision_model.post_layernorm"),
        Rule(r"vision/projection/kernel", "visual_projection.weight", "linear"),
        Rule(r"text/tokens", "text_model.embeddings.token_embedding.weight"),
        Rule(r"text/positions", "text_model.embeddings.position_embedding.weight"),
        *_norm_rules(r"text/norm_out", "text_model.final_layer_norm"),
        Rule(r"text/projection/kernel", "text_projection.weight", "linear"),
        Rule(r"logit_scale", "logit_scale"),
    ]
    block, ours = r"\1_model.encoder.layers.{layer}", r"(vision|text)/layers"
    rules += _norm_rules(rf"{ours}/norm_([12])", rf"{block}.layer_norm\2")
    rules += _linear_rules(rf"{ours}/w([qkv])", rf"{block}.self_attn.\2_proj")
    rules += _linear_rules(rf"{ours}/wo", f"{block}.self_attn.out_proj")
    rules += _linear_rules(rf"{ours}/w([12])", rf"{block}.mlp.fc\2")
    return tuple(rules)


def _open_clip_rules() -> tuple[Rule, ...]:
    rules = [
        Rule(r"vision/patches/kernel", "visual.conv1.weight", "conv"),
        Rule(r"vision/class", "visual.class_embedding"),
        Rule(r"vision/positions", "visual.positional_embedding"),
        *_norm_rules(r"vision/norm_in", "visual.ln_pre"),
        *_norm_rules(r"vision/norm_out", "visual.ln_post"),
        Rule(r"vision/projection/kernel", "visual.proj"),
        Rule(r"text/tokens", "token_embedding.weight"),
        Rule(r"text/positions", "positional_embedding"),
        *_norm_rules(r"text/norm_out", "ln_final"),
        Rule(r"text/projection/kernel", "text_projection"),
        Rule(r"logit_scale", "logit_scale"),
    ]
    for ours, theirs in (("vision", "visual.transformer"), ("text", "transformer")):
        block, layers = f"{theirs}.resblocks.{{layer}}", f"{ours}/layers"
        rules += _norm_rules(rf"{layers}/norm_([12])", rf"{block}.ln_\1")
        # The three lie in one tensor, which `vapi_jax.models.clip_files` shows as three.
        rules += _linear_rules(rf"{layers}/w([qkv])", rf"{block}.attn.in_proj_\1")
        rules += _linear_rules(rf"{layers}/wo", f"{block}.attn.out_proj")
        rules += _linear_rules(rf"{layers}/w1", f"{block}.mlp.c_fc")
        rules += _linear_rules(rf"{layers}/w2", f"{block}.mlp.c_proj")
    return tuple(rules)


NAME_RULES: dict[Names, tuple[Rule, ...]] = {
    "transformers": _transformers_rules(),
    "open_clip": _open_clip_rules(),
}
# Buffers, and numbers that OpenAI's files have among their tensors.
IGNORED_NAMES = (
    r".*position_ids",
    r"(.*\.)?attn_mask",
    r"input_resolution|context_length|vocab_size",
)


# --- the networks -----------------------------------------------------------------------------------


def _norm(x: Array, params: Params) -> Array:
    """LayerNorm, its statistics in float32."""
    wide = x.astype(jnp.float32)
    wide -= wide.mean(axis=-1, keepdims=True)
    wide *= jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + EPSILON)
    return (wide * params["scale"] + params["bias"]).astype(x.dtype)


def _linear(x: Array, params: Params) -> Array:
    return x @ params["kernel"] + params["bias"]


def _blocks(
    params: Params, x: Float[Array, "N T W"], heads: int, activation: Activation, causal: bool
) -> Float[Array, "N T W"]:
    count, length, width = x.shape
    mask = np.tril(np.ones((length, length), bool)) if causal else None

    def block(x: Array, layer: Params) -> tuple[Array, None]:
        y = _norm(x, layer["norm_1"])
        q, k, v = (
            _linear(y, layer[name]).reshape(count, length, heads, -1) for name in ("wq", "wk", "wv")
        )
        scores = jnp.einsum("nqhd,nkhd->nhqk", q, k).astype(jnp.float32) * q.shape[-1] ** -0.5
        if mask is not None:
            scores = jnp.where(mask, scores, -jnp.inf)
        shares = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
        seen = jnp.einsum("nhqk,nkhd->nqhd", shares, v).reshape(count, length, width)
        x = x + _linear(seen, layer["wo"])
        y = _linear(_norm(x, layer["norm_2"]), layer["w1"])
        y = y * jax.nn.sigmoid(1.702 * y) if activation == "quick_gelu" else _gelu(y)
        return x + _linear(y, layer["w2"]), None

    return jax.lax.scan(block, x, params["layers"])[0]


def _gelu(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=False)


def embed_images(
    params: Params, pixels: Float[Array, "N S S 3"], config: CLIPConfig
) -> Float[Array, "N E"]:
    """Embeddings of images, float32, not normalised.

    Args:
      params: of `shapes`; the dtype of "vision" is that of the arithmetic.
      pixels: from `preprocess`.
      config: sizes.
    """
    weights, kernel = params["vision"], params["vision"]["patches"]["kernel"]
    dtype, count = kernel.dtype, len(pixels)
    with jax.default_matmul_precision(precision_of(dtype)), jax.named_scope("clip_vision"):
        x = conv2d(pixels.astype(dtype), kernel, strides=config.patch, padding="VALID")
        x = x.reshape(count, -1, config.vision.width)
        first = jnp.broadcast_to(weights["class"], (count, 1, config.vision.width))
        x = jnp.concatenate([first, x], axis=1) + weights["positions"]
        x = _norm(x, weights["norm_in"])
        x = _blocks(weights, x, config.vision.heads, config.activation, causal=False)
        x = _norm(x[:, 0], weights["norm_out"])
        return (x @ weights["projection"]["kernel"]).astype(jnp.float32)


def embed_texts(params: Params, ids: Int[Array, "N L"], config: CLIPConfig) -> Float[Array, "N E"]:
    """Embeddings of texts, float32, not normalised.

    Args:
      params: of `shapes`; the dtype of "text" is that of the arithmetic.
      ids: tokens; what is behind the first end token, the largest id, does not count.
      config: sizes.
    """
    weights = params["text"]
    dtype = weights["tokens"].dtype
    with jax.default_matmul_precision(precision_of(dtype)), jax.named_scope("clip_text"):
        x = weights["tokens"][ids] + weights["positions"][: ids.shape[1]]
        x = _blocks(weights, x, config.text.heads, config.activation, causal=True)
        end = jnp.argmax(ids, axis=1)
        x = jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0]
        x = _norm(x, weights["norm_out"])
        return (x @ weights["projection"]["kernel"]).astype(jnp.float32)


def unit(x: Float[Array, "... E"]) -> Float[Array, "... E"]:
    """x / |x| over the last axis."""
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


# --- pixels -----------------------------------------------------------------------------------------

Fit = Literal["crop", "crop_floor", "pad"]
Resize = Literal["pillow", "torch_antialias", "torch"]


def preprocess(
    images: Num[Array, "N H W 3"], side: int, fit: Fit = "crop", resize: Resize = "pillow"
) -> Float[Array, "N side side 3"]:
    """Images as CLIP takes them.

    Args:
      images: whole values 0..255.
      side: of the result.
      fit: "crop": the shorter side becomes `side`, the middle is kept, as torchvision's CenterCrop rounds
        its place (OpenAI, open_clip); "crop_floor": as transformers does, a pixel apart where an odd
        number is cut off; "pad": the longer side becomes `side`, zeros around it (HPSv2).
      resize: "pillow": `bicubic_pillow`, of 8-bit images (OpenAI, transformers); "torch_antialias":
        of floats, a = -0.5, antialiased (torchvision 0.17 and later, of tensors: HPSv2); "torch": of
        floats, a = -0.75, not antialiased (torchvision before, of tensors).

    Returns:
      float32, with CLIP's mean and standard deviation taken out.
    """
    height, width = images.shape[1:3]
    if fit == "pad":
        scale = side / max(height, width)
        small = max(1, round(height * scale)), max(1, round(width * scale))
    else:
        short = min(height, width)
        small = int(side * height / short), int(side * width / short)
    x = _resized(images, small, resize) / 255.0
    if fit == "pad":
        spare = side - small[0], side - small[1]
        x = jnp.pad(x, ((0, 0), *((n // 2, n - n // 2) for n in spare), (0, 0)))
    else:
        place = [(n - side) // 2 if fit == "crop_floor" else round((n - side) / 2) for n in small]
        x = x[:, place[0] : place[0] + side, place[1] : place[1] + side]
    return (x - MEAN) / STD


def _resized(images: Array, size: tuple[int, int], resize: Resize) -> Float[Array, "N h w 3"]:
    if images.shape[1:3] == size:
        return images.astype(jnp.float32)
    if resize == "pillow":
        return bicubic_pillow(images, *size)
    wide = images.astype(jnp.float32)
    if resize == "torch":
        return bicubic_torch(wide, *size)
    shape = (len(images), *size, images.shape[-1])
    return jax.image.resize(wide, shape, "cubic", antialias=True, precision="highest")
