"""The VQ image tokenizer of LlamaGen: encoder, l2-normalised codebook, decoder (paper Sec. 3).

An image [B, H, W, 3] in [-1, 1] becomes a grid of h x w tokens, h = H / downsample_factor, read in
raster order. Everything is NHWC and parameters are float32. Encoder and decoder compute in dtypes of
their own; the search for the nearest code always runs in float32.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from vapi_jax.common.options import Count, Dtype, NotNegative, Positive, Rate, Vocabulary
from vapi_jax.models.layers import Conv, GroupNorm
from vapi_jax.models.quantize import entropy_loss, l2_normalize, nearest_codes, squared_distances
from vapi_jax.weights.names import Rule


@dataclasses.dataclass(frozen=True)
class VQConfig:
    """Sizes of a tokenizer; the defaults are LlamaGen's VQ-16.

    Raises:
      ValueError: if the two halves differ in depth, or a width does not divide into the groups.
    """

    codebook_size: Vocabulary = 16384  # K, the vocabulary
    codebook_embed_dim: Count = 8  # D, width of a code
    codebook_l2_norm: bool = True  # compare and decode unit vectors
    commit_loss_beta: NotNegative = 0.25  # weight of the commitment term, beta in Eq. 33
    entropy_loss_ratio: NotNegative = 0.0  # weight of the entropy term; 0 = not computed
    entropy_temperature: Positive = 0.01
    ch: Count = 128  # width at full resolution
    encoder_ch_mult: tuple[Count, ...] = (1, 1, 2, 2, 4)  # one entry a resolution, finest first
    decoder_ch_mult: tuple[Count, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: Count = 2  # per resolution; the decoder has one more
    z_channels: Count = 256
    dropout_p: Rate = 0.0
    groupnorm_groups: Count = 32
    # Each token is encoded from its own pixels alone. Otherwise normalisation and attention tell every
    # token of the whole image, and a generator trained by teacher forcing learns to read that there.
    encoder_patches: bool = False
    # Of the convolutions. An encoder in bfloat16 gives other tokens: 2 % of the demo's differ. So x* is
    # that of float32 unless a recipe says otherwise.
    encoder_dtype: Dtype = "float32"
    decoder_dtype: Dtype = "float32"

    def __post_init__(self) -> None:
        for name in ("encoder_ch_mult", "decoder_ch_mult"):
            # Lists (from JSON) would make the config, and so the module, unhashable.
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(self.encoder_ch_mult) != len(self.decoder_ch_mult):
            raise ValueError(
                f"encoder_ch_mult {self.encoder_ch_mult} and decoder_ch_mult "
                f"{self.decoder_ch_mult} must have the same length"
            )
        for multiplier in (1, *self.encoder_ch_mult, *self.decoder_ch_mult):
            if self.ch * multiplier % self.groupnorm_groups:
                raise ValueError(
                    f"width {self.ch * multiplier} does not divide into "
                    f"{self.groupnorm_groups} normalisation groups"
                )
        for name in ("encoder_dtype", "decoder_dtype"):
            if getattr(self, name) not in ("float32", "bfloat16"):
                raise ValueError(f"{name} must be float32 or bfloat16, not {getattr(self, name)!r}")

    @property
    def downsample_factor(self) -> int:
        """Pixels per token along each side: 16 for VQ-16."""
        return 2 ** (len(self.encoder_ch_mult) - 1)


VQ_PRESETS: dict[str, VQConfig] = {
    "VQ-16": VQConfig(),
    "VQ-8": VQConfig(encoder_ch_mult=(1, 2, 2, 4), decoder_ch_mult=(1, 2, 2, 4)),
}


class VQOutput(NamedTuple):
    """What one pass through the tokenizer gives; losses are weighted float32 scalars."""

    reconstruction: Float[Array, "B H W 3"]  # float32
    indices: Int[Array, "B T"]  # int32
    z: Float[Array, "B h w D"]  # encoder output before normalisation, float32
    quantized: Float[Array, "B h w D"]  # chosen codes; the gradient passes straight to z
    vq_loss: Float[Array, ""]  # codebook term of Eq. 33
    commit_loss: Float[Array, ""]  # commitment term of Eq. 33, times beta
    entropy_loss: Float[Array, ""]  # times entropy_loss_ratio
    features: Float[Array, "B H W C"]  # input of the decoder's last convolution


# --- layers -------------------------------------------------------------------------------------


def _codebook_init(rng: Array, shape: tuple[int, int], unit_norm: bool) -> Float[Array, "K D"]:
    codes = jax.random.uniform(rng, shape, jnp.float32, -1.0 / shape[0], 1.0 / shape[0])
    return l2_normalize(codes) if unit_norm else codes


class ResBlock(nn.Module):
    """Two normalised 3x3 convolutions beside a shortcut (1x1 where the width changes)."""

    features: int
    config: VQConfig
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "B H W I"], deterministic: bool) -> Array:
        config, dtype, groups = self.config, self.dtype, self.config.groupnorm_groups
        h = nn.swish(GroupNorm(groups, dtype=dtype, name="norm1")(x))
        h = Conv(self.features, 3, dtype=dtype, name="conv1")(h)
        h = nn.swish(GroupNorm(groups, dtype=dtype, name="norm2")(h))
        h = nn.Dropout(config.dropout_p)(h, deterministic=deterministic)
        h = Conv(self.features, 3, dtype=dtype, name="conv2")(h)
        if x.shape[-1] != self.features:
            x = Conv(self.features, 1, dtype=dtype, name="nin_shortcut")(x)
        return x + h


class AttentionBlock(nn.Module):
    """Self-attention over all pixels, one head as wide as the feature map, with a residual."""

    config: VQConfig
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        batch, height, width, channels = x.shape
        dtype = self.dtype
        h = GroupNorm(self.config.groupnorm_groups, dtype=dtype, name="norm")(x)
        q, k, v = (
            Conv(channels, 1, dtype=dtype, name=name)(h).reshape(batch, height * width, channels)
            for name in ("q", "k", "v")
        )
        scores = jnp.einsum("bqc,bkc->bqk", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores * channels**-0.5, axis=-1).astype(dtype)
        h = jnp.einsum("bqk,bkc->bqc", weights, v).reshape(x.shape)
        return x + Conv(channels, 1, dtype=dtype, name="proj_out")(h)


class Level(nn.Module):
    """All blocks of one resolution, then the change of resolution ("down", "up" or none)."""

    features: int
    num_blocks: int
    attention: bool
    resample: str | None
    config: VQConfig
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "B H W I"], deterministic: bool) -> Array:
        for i in range(self.num_blocks):
            block = ResBlock(self.features, self.config, self.dtype, name=f"res_{i}")
            x = block(x, deterministic)
            if self.attention:
                x = AttentionBlock(self.config, self.dtype, name=f"attn_{i}")(x)
        if self.resample == "down":
            # Padded at the far edges only: the stride-2 grid starts on the first pixel.
            pads = ((0, 1), (0, 1))
            x = Conv(self.features, 3, 2, padding=pads, dtype=self.dtype, name="downsample")(x)
        elif self.resample == "up":
            x = Conv(self.features, 3, upsample=True, dtype=self.dtype, name="upsample")(x)
        return x


def _middle(x: Array, config: VQConfig, dtype: str, deterministic: bool) -> Array:
    """Residual, attention, residual; called inside a compact module, which owns the blocks."""
    x = ResBlock(x.shape[-1], config, dtype, name="mid_0")(x, deterministic)
    x = AttentionBlock(config, dtype, name="mid_1")(x)
    return ResBlock(x.shape[-1], config, dtype, name="mid_2")(x, deterministic)


class Encoder(nn.Module):
    """Image to feature map at 1 / downsample_factor of its size; attention at the coarsest."""

    config: VQConfig

    @nn.compact
    def __call__(self, images: Float[Array, "B H W 3"], deterministic: bool) -> Array:
        config, dtype = self.config, self.config.encoder_dtype
        last = len(config.encoder_ch_mult) - 1
        h = Conv(config.ch, 3, dtype=dtype, name="conv_in")(images)
        for i, multiplier in enumerate(config.encoder_ch_mult):
            h = Level(
                config.ch * multiplier,
                config.num_res_blocks,
                attention=i == last,
                resample=None if i == last else "down",
                config=config,
                dtype=dtype,
                name=f"level_{i}",
            )(h, deterministic)
        h = _middle(h, config, dtype, deterministic)
        h = nn.swish(GroupNorm(config.groupnorm_groups, dtype=dtype, name="norm_out")(h))
        return Conv(config.z_channels, 3, dtype=dtype, name="conv_out")(h)


class Decoder(nn.Module):
    """Feature map to image; levels are numbered in the order they run, coarsest first."""

    config: VQConfig

    @nn.compact
    def __call__(
        self, z: Float[Array, "B h w Z"], deterministic: bool
    ) -> tuple[Float[Array, "B H W 3"], Float[Array, "B H W C"]]:
        config, dtype = self.config, self.config.decoder_dtype
        multipliers = config.decoder_ch_mult[::-1]
        last = len(multipliers) - 1
        h = Conv(config.ch * multipliers[0], 3, dtype=dtype, name="conv_in")(z)
        h = _middle(h, config, dtype, deterministic)
        for i, multiplier in enumerate(multipliers):
            h = Level(
                config.ch * multiplier,
                config.num_res_blocks + 1,
                attention=i == 0,
                resample=None if i == last else "up",
                config=config,
                dtype=dtype,
                name=f"level_{i}",
            )(h, deterministic)
        h = nn.swish(GroupNorm(config.groupnorm_groups, dtype=dtype, name="norm_out")(h))
        images = Conv(3, 3, dtype=dtype, name="conv_out")(h)
        return images.astype(jnp.float32), h


class Codebook(nn.Module):
    """The code vectors as stored, `embedding` [K, D] float32."""

    config: VQConfig

    @nn.compact
    def __call__(self) -> Float[Array, "K D"]:
        config = self.config
        shape = (config.codebook_size, config.codebook_embed_dim)
        return self.param("embedding", _codebook_init, shape, config.codebook_l2_norm)


def _gather(
    table: Float[Array, "K D"], indices: Int[Array, "B T"], grid: tuple[int, int] | None
) -> Float[Array, "B h w D"]:
    batch, num_tokens = indices.shape
    height, width = grid or (math.isqrt(num_tokens),) * 2
    if height * width != num_tokens:
        raise ValueError(f"{num_tokens} tokens do not fill a grid of {height} x {width}")
    return table[indices].reshape(batch, height, width, -1)


# --- the tokenizer ------------------------------------------------------------------------------


class VQModel(nn.Module):
    """LlamaGen's tokenizer. Use `model.apply({"params": params}, x, method="encode")` and so on."""

    config: VQConfig

    def setup(self) -> None:
        config = self.config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = Conv(config.codebook_embed_dim, 1, dtype=config.encoder_dtype)
        self.post_quant_conv = Conv(config.z_channels, 1, dtype=config.decoder_dtype)
        self.codebook = Codebook(config)

    def codes(self) -> Float[Array, "K D"]:
        """The codes as compared and decoded: unit length if `codebook_l2_norm`."""
        return self._normalize(self.codebook())

    def encode_latents(
        self, images: Float[Array, "B H W 3"], deterministic: bool = True
    ) -> Float[Array, "B h w D"]:
        """Encoder output before normalisation and quantisation, float32.

        Raises:
          ValueError: if a side of the image is not a multiple of `downsample_factor`.
        """
        factor = self.config.downsample_factor
        if images.shape[1] % factor or images.shape[2] % factor:
            raise ValueError(f"image sides {images.shape[1:3]} must be multiples of {factor}")
        # Accelerators multiply float32 in fewer bits unless told otherwise. Of the demo's tokens, one
        # bfloat16 pass (a TPU's default) changes 0.9 %, TF32 0.2 %, three passes none.
        with jax.default_matmul_precision("high"):
            if not self.config.encoder_patches:
                return self.quant_conv(self.encoder(images, deterministic)).astype(jnp.float32)
            rows, columns = images.shape[1] // factor, images.shape[2] // factor
            patches = rearrange(
                images, "B (h p) (w q) C -> (B h w) p q C", h=rows, w=columns, p=factor
            )
            latents = self.quant_conv(self.encoder(patches, deterministic)).astype(jnp.float32)
            return rearrange(latents, "(B h w) 1 1 D -> B h w D", h=rows, w=columns)

    def encode(self, images: Float[Array, "B H W 3"]) -> Int[Array, "B T"]:
        """Tokens of images, int32 in raster order: the x* of the paper (Eq. 34)."""
        latents = self.encode_latents(images)
        return self._search(self._normalize(latents)).reshape(images.shape[0], -1)

    def decode(
        self, quantized: Float[Array, "B h w D"], deterministic: bool = True
    ) -> Float[Array, "B H W 3"]:
        """Images of quantised latents, float32; about [-1, 1], not clamped."""
        return self.decoder(self.post_quant_conv(quantized), deterministic)[0]

    def lookup(
        self, indices: Int[Array, "B T"], grid: tuple[int, int] | None = None
    ) -> Float[Array, "B h w D"]:
        """Codes of tokens: one gather. `grid` = (h, w), a square if not given.

        Raises:
          ValueError: if the tokens do not fill the grid.
        """
        return _gather(self.codes(), indices, grid)

    def projected_codes(self) -> Float[Array, "K z"]:
        """What the decoder gets for each code: normalised and through `post_quant_conv`."""
        return self.post_quant_conv(self.codes()[None, None])[0, 0]

    def decode_tokens(
        self,
        indices: Int[Array, "B T"],
        grid: tuple[int, int] | None = None,
        projected: Float[Array, "K z"] | None = None,
    ) -> Float[Array, "B H W 3"]:
        """Images of tokens (Eq. 37); decoding starts with one gather.

        Give `projected` (see `projected_codes`) where many batches are decoded with one codebook.
        """
        table = self.projected_codes() if projected is None else projected
        return self.decoder(_gather(table, indices, grid), True)[0]

    def __call__(self, images: Float[Array, "B H W 3"], deterministic: bool = True) -> VQOutput:
        """One training pass: reconstruction and the codebook terms of Eq. 33.

        Dropout draws from the rng stream "dropout" unless `deterministic`.
        """
        return self.from_latents(self.encode_latents(images, deterministic), deterministic)

    def from_tokens(self, indices: Int[Array, "B T"], deterministic: bool = True) -> VQOutput:
        """A training pass of the decoder alone; the codes take no gradient, and there is none else."""
        quantized = _gather(jax.lax.stop_gradient(self.codes()), indices, None)
        images, features = self.decoder(self.post_quant_conv(quantized), deterministic)
        zero = jnp.zeros((), jnp.float32)
        return VQOutput(images, indices, quantized, quantized, zero, zero, zero, features)

    def from_latents(
        self, latents: Float[Array, "B h w D"], deterministic: bool = True
    ) -> VQOutput:
        """The part of a training pass after the encoder.

        As in LlamaGen the codebook terms are means, not sums, of squares over normalised latents.
        The forward value of the codes is exact; their gradient goes to the latents unchanged.
        """
        config = self.config
        z = self._normalize(latents)
        codes = self.codes()
        indices = self._search(z)
        chosen = codes[indices].reshape(z.shape)
        entropy = jnp.zeros((), jnp.float32)
        if config.entropy_loss_ratio:
            distances = squared_distances(z.reshape(-1, z.shape[-1]), codes)
            entropy = entropy_loss(-distances, config.entropy_temperature)
        straight_through = jax.lax.stop_gradient(chosen) + (z - jax.lax.stop_gradient(z))
        reconstruction, features = self.decoder(
            self.post_quant_conv(straight_through), deterministic
        )
        return VQOutput(
            reconstruction=reconstruction,
            indices=indices.reshape(z.shape[0], -1),
            z=latents,
            quantized=straight_through,
            vq_loss=jnp.square(chosen - jax.lax.stop_gradient(z)).mean(),
            commit_loss=config.commit_loss_beta
            * jnp.square(jax.lax.stop_gradient(chosen) - z).mean(),
            entropy_loss=config.entropy_loss_ratio * entropy,
            features=features,
        )

    def _normalize(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return l2_normalize(x) if self.config.codebook_l2_norm else x

    def _search(self, z: Float[Array, "B h w D"]) -> Int[Array, " N"]:
        # The choice itself has no gradient; saying so keeps the scan out of the backward pass.
        latents = jax.lax.stop_gradient(z.reshape(-1, z.shape[-1]))
        return nearest_codes(latents, jax.lax.stop_gradient(self.codes()))


# Reference names number the modules of a list ("mid.0"); ours join name and number ("mid_0").
_BLOCK = r"(encoder|decoder)/level_(\d+)/(res|attn)_(\d+)/(\w+)"
_BLOCK_THEIRS = r"\1.conv_blocks.\2.\3.\4.\5"
_RESAMPLE = r"(encoder|decoder)/level_(\d+)/(downsample|upsample)"
_RESAMPLE_THEIRS = r"\1.conv_blocks.\2.\3.conv"
_MIDDLE = r"(encoder|decoder)/mid_(\d)/(\w+)"
_MIDDLE_THEIRS = r"\1.mid.\2.\3"
_END = r"(encoder|decoder)/(conv_in|norm_out|conv_out)"
_POINTWISE = r"(quant_conv|post_quant_conv)"

NAME_RULES: tuple[Rule, ...] = (
    Rule(r"codebook/embedding", r"quantize.embedding.weight"),
    *(
        Rule(f"{ours}/{leaf}", f"{theirs}.{their_leaf}", kind)
        for ours, theirs in (
            (_BLOCK, _BLOCK_THEIRS),
            (_RESAMPLE, _RESAMPLE_THEIRS),
            (_MIDDLE, _MIDDLE_THEIRS),
            (_END, r"\1.\2"),
            (_POINTWISE, r"\1"),
        )
        for leaf, their_leaf, kind in (
            ("kernel", "weight", "conv"),
            ("scale", "weight", "same"),
            ("bias", "bias", "same"),
        )
    ),
)
# Buffers of the reference that hold no weights, without which it does not load a file.
BUFFER_SHAPES: dict[str, tuple[int, ...]] = {"quantize.codebook_used": (65536,)}
IGNORED_NAMES: tuple[str, ...] = tuple(re.escape(name) for name in BUFFER_SHAPES)
