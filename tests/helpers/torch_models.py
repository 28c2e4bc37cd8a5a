"""LlamaGen's two models in PyTorch: what the JAX models are measured against.

Inference only. Modules are registered under the names and in the order of LlamaGen's, so that
`state_dict()` has the names, shapes and order of its released files. Under
`torch.device("meta")` a model has all of these and no memory.
"""

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Layers, heads, width.
GPT_SIZES: dict[str, tuple[int, int, int]] = {
    "GPT-B": (12, 12, 768),
    "GPT-L": (24, 16, 1024),
    "GPT-XL": (36, 20, 1280),
    "GPT-XXL": (48, 24, 1536),
    "GPT-XXXL": (48, 40, 2560),
    "GPT-1B": (22, 32, 2048),
    "GPT-3B": (24, 32, 3200),
    "GPT-7B": (32, 32, 4096),
}
VQ_MULTIPLIERS: dict[str, tuple[int, ...]] = {"VQ-16": (1, 1, 2, 2, 4), "VQ-8": (1, 2, 2, 4)}


# The generator ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class GPTArgs:
    """Sizes under LlamaGen's names; `block_size` is the number of image tokens, a square."""

    n_layer: int
    n_head: int
    dim: int
    n_kv_head: int | None = None
    multiple_of: int = 256
    ffn_dim_multiplier: float | None = None
    rope_base: float = 10000.0
    norm_eps: float = 1e-5
    num_classes: int = 1000
    caption_dim: int = 2048
    model_type: str = "c2i"
    vocab_size: int = 16384
    cls_token_num: int = 1
    block_size: int = 256


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


class ClassEmbedding(nn.Module):
    """Labels [B] to [B, 1, D]; the row after the last class means "no condition"."""

    def __init__(self, args: GPTArgs):
        super().__init__()
        self.embedding_table = nn.Embedding(args.num_classes + 1, args.dim)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)[:, None]


class CaptionEmbedding(nn.Module):
    """Features [B, P, W] to [B, P, D]; "no condition" is `uncond_embedding` in their place."""

    def __init__(self, args: GPTArgs):
        super().__init__()
        self.register_buffer("uncond_embedding", torch.empty(args.cls_token_num, args.caption_dim))
        self.cap_proj = nn.ModuleDict(
            {"fc1": linear(args.caption_dim, args.dim), "fc2": linear(args.dim, args.dim)}
        )

    def forward(self, features: Tensor) -> Tensor:
        hidden = F.gelu(self.cap_proj["fc1"](features), approximate="tanh")
        return self.cap_proj["fc2"](hidden)


def rotations(args: GPTArgs) -> Tensor:
    """A complex number a position and pair of a head [P + T, hd/2]: row angles, then column angles.

    Conditioning positions get 0, which is no rotation: it makes their queries and keys vanish.
    """
    grid, pairs = math.isqrt(args.block_size), args.dim // args.n_head // 2
    exponents = torch.arange(0, pairs, 2).float() / pairs
    angles = torch.outer(torch.arange(grid).float(), 1.0 / args.rope_base**exponents)
    rows = angles[:, None].expand(grid, grid, -1)
    columns = angles[None].expand(grid, grid, -1)
    both = torch.cat([rows, columns], dim=-1).flatten(0, 1)
    image = torch.polar(torch.ones_like(both), both)
    return torch.cat([torch.zeros(args.cls_token_num, pairs, dtype=image.dtype), image])


def rotate(x: Tensor, by: Tensor) -> Tensor:
    """Neighbouring features of [B, S, H, hd] are the two parts of a complex number."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * by[:, None]).flatten(-2).type_as(x)


class Attention(nn.Module):
    """Grouped-query attention from one fused projection."""

    def __init__(self, args: GPTArgs):
        super().__init__()
        self.head_dim = args.dim // args.n_head
        self.widths = [args.dim] + 2 * [(args.n_kv_head or args.n_head) * self.head_dim]
        self.wqkv = linear(args.dim, sum(self.widths))
        self.wo = linear(args.dim, args.dim)

    def forward(self, x: Tensor, by: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (-1, self.head_dim)) for part in self.wqkv(x).split(self.widths, -1)
        )
        q, k = rotate(q, by), rotate(k, by)
        group = q.shape[2] // k.shape[2]
        k, v = (part.repeat_interleave(group, dim=2) for part in (k, v))
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.wo(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU of two thirds of four widths, rounded up."""

    def __init__(self, args: GPTArgs):
        super().__init__()
        hidden = int(8 * args.dim / 3)
        if args.ffn_dim_multiplier is not None:
            hidden = int(args.ffn_dim_multiplier * hidden)
        hidden = math.ceil(hidden / args.multiple_of) * args.multiple_of
        self.w1 = linear(args.dim, hidden)
        self.w3 = linear(args.dim, hidden)
        self.w2 = linear(hidden, args.dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class TransformerBlock(nn.Module):
    def __init__(self, args: GPTArgs):
        super().__init__()
        self.attention = Attention(args)
        self.feed_forward = FeedForward(args)
        self.attention_norm = nn.RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = nn.RMSNorm(args.dim, args.norm_eps)

    def forward(self, x: Tensor, by: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), by, mask)
        return x + self.feed_forward(self.ffn_norm(x))


class GPT(nn.Module):
    """Class- or text-conditional generator."""

    def __init__(self, args: GPTArgs):
        super().__init__()
        self.args = args
        embedding = ClassEmbedding if args.model_type == "c2i" else CaptionEmbedding
        self.cls_embedding = embedding(args)
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(TransformerBlock(args) for _ in range(args.n_layer))
        self.norm = nn.RMSNorm(args.dim, args.norm_eps)
        self.output = linear(args.dim, args.vocab_size)

    def forward(self, condition: Tensor, context: Tensor, seen: Tensor | None = None) -> Tensor:
        """Logits [B, S + 1, V] of the tokens after 0, 1, .. S context tokens [B, S].

        condition: labels [B] or features [B, P, W]. seen: [B, P] bool, False = padding.
        """
        x = torch.cat([self.cls_embedding(condition), self.tok_embeddings(context)], dim=1)
        by, prefix = rotations(self.args)[: x.shape[1]], self.args.cls_token_num
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril().repeat(len(x), 1, 1)
        if seen is not None:
            mask[:, :, :prefix] &= seen[:, None]
            mask |= torch.eye(x.shape[1], dtype=torch.bool)
        for layer in self.layers:
            x = layer(x, by, mask[:, None])
        return self.output(self.norm(x))[:, prefix - 1 :].float()


# The tokenizer ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class VQArgs:
    """Sizes under LlamaGen's names; `ch_mult` has one entry a resolution, finest first."""

    ch_mult: tuple[int, ...]
    ch: int = 128
    num_res_blocks: int = 2
    z_channels: int = 256
    codebook_size: int = 16384
    codebook_embed_dim: int = 8


def norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, width, eps=1e-6)


def conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel_size=3, padding=1)


def pointwise(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel_size=1)


class ResnetBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.norm1 = norm(inputs)
        self.conv1 = conv(inputs, outputs)
        self.norm2 = norm(outputs)
        self.conv2 = conv(outputs, outputs)
        if inputs != outputs:
            self.nin_shortcut = pointwise(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """Every pixel attends to all pixels, with one head."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = norm(width)
        self.q = pointwise(width, width)
        self.k = pointwise(width, width)
        self.v = pointwise(width, width)
        self.proj_out = pointwise(width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2) for layer in (self.q, self.k, self.v))
        weights = torch.softmax(q @ k.transpose(1, 2) * x.shape[1] ** -0.5, dim=-1)
        return x + self.proj_out((weights @ v).transpose(1, 2).unflatten(2, x.shape[2:]))


class Downsample(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, kernel_size=3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = conv(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """All blocks of one resolution; `resample` is "downsample", "upsample" or None."""

    def __init__(
        self, inputs: int, outputs: int, blocks: int, attention: bool, resample: str | None
    ):
        super().__init__()
        self.res = nn.ModuleList(
            ResnetBlock(inputs if i == 0 else outputs, outputs) for i in range(blocks)
        )
        self.attn = nn.ModuleList(AttnBlock(outputs) for _ in range(blocks if attention else 0))
        self.resample = resample
        if resample == "downsample":
            self.downsample = Downsample(outputs)
        elif resample == "upsample":
            self.upsample = Upsample(outputs)

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.res):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        return getattr(self, self.resample)(x) if self.resample else x


def middle(width: int) -> nn.ModuleList:
    return nn.ModuleList([ResnetBlock(width, width), AttnBlock(width), ResnetBlock(width, width)])


class Encoder(nn.Module):
    def __init__(self, args: VQArgs):
        super().__init__()
        widths = [args.ch * multiplier for multiplier in args.ch_mult]
        last = len(widths) - 1
        self.conv_in = conv(3, args.ch)
        self.conv_blocks = nn.ModuleList(
            Level(
                ([args.ch, *widths])[i],
                width,
                args.num_res_blocks,
                i == last,
                None if i == last else "downsample",
            )
            for i, width in enumerate(widths)
        )
        self.mid = middle(widths[-1])
        self.norm_out = norm(widths[-1])
        self.conv_out = conv(widths[-1], args.z_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in (*self.conv_blocks, *self.mid):
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    def __init__(self, args: VQArgs):
        super().__init__()
        widths = [args.ch * multiplier for multiplier in reversed(args.ch_mult)]
        last = len(widths) - 1
        self.conv_in = conv(args.z_channels, widths[0])
        self.mid = middle(widths[0])
        self.conv_blocks = nn.ModuleList(
            Level(
                ([widths[0], *widths])[i],
                width,
                args.num_res_blocks + 1,
                i == 0,
                None if i == last else "upsample",
            )
            for i, width in enumerate(widths)
        )
        self.norm_out = norm(widths[-1])
        self.conv_out = conv(widths[-1], 3)

    def forward(self, z: Tensor) -> Tensor:
        x = self.conv_in(z)
        for block in (*self.mid, *self.conv_blocks):
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class VectorQuantizer(nn.Module):
    """The nearest of the unit-length codes; `codebook_used` remembers the last 65536 choices."""

    def __init__(self, args: VQArgs):
        super().__init__()
        self.embedding = nn.Embedding(args.codebook_size, args.codebook_embed_dim)
        self.register_buffer("codebook_used", torch.zeros(65536))

    def codes(self) -> Tensor:
        return F.normalize(self.embedding.weight, dim=-1)

    def distances(self, latents: Tensor) -> Tensor:
        """Squared distances of latents [B, D, h, w] to all codes, [B, T, K]."""
        z = F.normalize(latents.flatten(2).transpose(1, 2), dim=-1)
        codes = self.codes()
        return z.square().sum(-1, keepdim=True) + codes.square().sum(-1) - 2 * z @ codes.T

    def forward(self, latents: Tensor) -> Tensor:
        """Tokens [B, T] of latents [B, D, h, w]."""
        return self.distances(latents).argmin(-1)


class VQ(nn.Module):
    """Images [B, 3, H, W] in [-1, 1] to tokens [B, T] and back."""

    def __init__(self, args: VQArgs):
        super().__init__()
        self.encoder = Encoder(args)
        self.decoder = Decoder(args)
        self.quantize = VectorQuantizer(args)
        self.quant_conv = pointwise(args.z_channels, args.codebook_embed_dim)
        self.post_quant_conv = pointwise(args.codebook_embed_dim, args.z_channels)

    def latents(self, images: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(images))

    def decode(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        chosen = self.quantize.codes()[tokens].transpose(1, 2).unflatten(2, grid)
        return self.decoder(self.post_quant_conv(chosen))
