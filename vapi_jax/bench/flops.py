"""How many floating-point operations a VA-π step must spend, counted from its configuration.

Matrix products and convolutions only, a multiplication and an addition counting two; attention over
all pairs of positions; a backward pass costs twice its forward. These are MODEL FLOPs: what the
arithmetic of the method needs, however it is carried out. What a program spends again on purpose (a
layer's forward in its backward pass, the head's logits) stands apart as `recomputed`.

Convolutions are counted with their taps on padding, as published counts are, unless `padding` is
False, as XLA counts.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from vapi_jax.bench.hlo_flops import taps
from vapi_jax.data.sources import source_class
from vapi_jax.methods import find_method
from vapi_jax.methods.config import TrainConfig
from vapi_jax.methods.generator import make_condition
from vapi_jax.methods.method import Flops
from vapi_jax.models import head, lpips
from vapi_jax.models.conditions import Prompt
from vapi_jax.models.policies import JanusPolicy, TextPolicy
from vapi_jax.models.policy import Policy
from vapi_jax.models.transformer import BlockConfig
from vapi_jax.models.vq import VQConfig
from vapi_jax.rewards import make_terms
from vapi_jax.rewards.reconstruction import LPIPS

WAYS = ("fused", "plain", "reference")


@dataclass(frozen=True)
class PolicyFlops:
    """Forward FLOPs of one sequence.

    Attributes:
      layers: linear maps of the transformer layers.
      last: of these, the last map of each layer, whose output no backward pass needs.
      attention: the two products with the scores.
      head: logits of all tokens.
      condition: what else the model runs: the caption's or the image tokens' projections.
    """

    layers: float
    last: float
    attention: float
    head: float
    condition: float

    @property
    def total(self) -> float:
        return self.layers + self.attention + self.head + self.condition


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of one optimisation step over all devices, by phase; all but `recomputed` are model FLOPs."""

    encode: float
    sampling: float  # a forward of its own to draw from; 0 where the update's forward serves
    decode: float
    lpips: float
    forward: float
    backward: float
    base: float  # the frozen base generator, where it is run
    recomputed: float

    @property
    def model(self) -> float:
        return sum(dataclasses.astuple(self)) - self.recomputed

    @property
    def hardware(self) -> float:
        return self.model + self.recomputed


# --- the generator --------------------------------------------------------------------------------


def _block_flops(block: BlockConfig, layers: int, positions: int) -> tuple[float, float, float]:
    """(linear maps, of these the last of each layer, attention) of one sequence."""
    kv = block.n_kv_head * block.head_dim
    last = block.hidden_dim * block.dim
    linear = block.dim * (block.dim + 2 * kv) + block.dim**2 + 2 * block.dim * block.hidden_dim
    attention = 4.0 * positions**2 * block.dim
    return (
        2.0 * layers * positions * (linear + last),
        2.0 * layers * positions * last,
        layers * attention,
    )


def policy_flops(policy: Policy, prompt_length: int = 0) -> PolicyFlops:
    """The forward pass of one image's sequence.

    Args:
      policy: a generator.
      prompt_length: positions of a Janus prompt, padding included, which only the data tell; the
        others know their conditioning positions.

    Raises:
      ValueError: for a Janus policy without a prompt length.
    """
    tokens, context = policy.num_tokens, policy.context_length
    if isinstance(policy, JanusPolicy):
        if prompt_length < 1:
            raise ValueError("the length of a Janus prompt is the data's: pass prompt_length")
        config, width = policy.config, policy.config.dim
        prefix = prompt_length
        inside, seen = config.aligner_dim or width, config.gen_head_dim or width
        aligner = context * inside * (config.image_embed_dim + width)
        condition = 2.0 * (aligner + tokens * width * seen)
    else:
        config, width = policy.config, policy.config.dim  # type: ignore[attr-defined]
        seen, prefix = width, config.cls_token_num
        condition = 0.0
        if isinstance(policy, TextPolicy):
            condition = 2.0 * prefix * (config.caption_dim * width + width**2)
    layers, last, attention = _block_flops(config.block, config.n_layer, prefix + context)
    logits = 2.0 * tokens * seen * policy.vocab_size
    return PolicyFlops(layers, last, attention, logits, condition)


# --- the tokenizer --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Maps:
    """Counts layers over square maps."""

    padding: bool

    def conv(self, size: int, inputs: int, outputs: int, window: int = 3) -> float:
        along = taps(size, size, window, low=window // 2, padding=self.padding)
        return 2.0 * along**2 * inputs * outputs

    def down(self, size: int, width: int) -> float:
        along = taps(size, size // 2, 3, 2, padding=self.padding)  # padded at the far edge only
        return 2.0 * along**2 * width**2

    def up(self, size: int, width: int, repeated: bool) -> float:
        if repeated:
            return self.conv(2 * size, width, width)
        along = sum(taps(size, size, 2, low=low, padding=self.padding) for low in (0, 1))
        return 2.0 * along**2 * width**2

    def residual(self, size: int, inputs: int, outputs: int) -> float:
        shortcut = self.conv(size, inputs, outputs, 1) if inputs != outputs else 0.0
        return self.conv(size, inputs, outputs) + self.conv(size, outputs, outputs) + shortcut

    def attention(self, size: int, width: int) -> float:
        return 4 * self.conv(size, width, width, 1) + 4.0 * size**4 * width

    def middle(self, size: int, width: int) -> float:
        return 2 * self.residual(size, width, width) + self.attention(size, width)


def encoder_flops(config: VQConfig, side: int, padding: bool = True) -> float:
    """From one image of `side` pixels to its tokens, the search for the nearest codes included."""
    if config.encoder_patches:
        whole, patch = dataclasses.replace(config, encoder_patches=False), config.downsample_factor
        return (side // patch) ** 2 * encoder_flops(whole, patch, padding)
    maps, size, width = _Maps(padding), side, config.ch
    total = maps.conv(size, 3, width)
    last = len(config.encoder_ch_mult) - 1
    for level, multiplier in enumerate(config.encoder_ch_mult):
        wide = config.ch * multiplier
        for _ in range(config.num_res_blocks):
            total += maps.residual(size, width, wide)
            total += maps.attention(size, wide) if level == last else 0.0
            width = wide
        if level < last:
            total += maps.down(size, width)
            size //= 2
    total += maps.middle(size, width) + maps.conv(size, width, config.z_channels)
    total += maps.conv(size, config.z_channels, config.codebook_embed_dim, 1)
    return total + 2.0 * size**2 * config.codebook_size * config.codebook_embed_dim


def decoder_flops(
    config: VQConfig, side: int, padding: bool = True, repeated: bool = False
) -> float:
    """From one image's tokens to its `side` pixels; the codes are projected by a look-up.

    Args:
      config: of the tokenizer.
      side: of the image.
      padding: whether taps on padding count.
      repeated: whether maps are doubled before they are convolved, as published code does, and not by
        `layers.conv2d_upsampled`.
    """
    multipliers, maps = config.decoder_ch_mult[::-1], _Maps(padding)
    size, width = side // config.downsample_factor, config.ch * multipliers[0]
    total = maps.conv(size, config.z_channels, width) + maps.middle(size, width)
    for level, multiplier in enumerate(multipliers):
        wide = config.ch * multiplier
        for _ in range(config.num_res_blocks + 1):
            total += maps.residual(size, width, wide)
            total += maps.attention(size, wide) if level == 0 else 0.0
            width = wide
        if level < len(multipliers) - 1:
            total += maps.up(size, width, repeated)
            size *= 2
    return total + maps.conv(size, width, 3)


def lpips_flops(net: str, side: int, padding: bool = True) -> float:
    """The features of one image of `side` pixels, layer by layer of the backbone."""
    size, width, total = side, 3, 0.0
    for layer in lpips._net(net).layers:
        if isinstance(layer, lpips._Pool):
            size = (size - layer.window) // layer.stride + 1
            continue
        out = (size + 2 * layer.padding - layer.window) // layer.stride + 1
        along = taps(size, out, layer.window, layer.stride, layer.padding, padding=padding)
        total += 2.0 * along**2 * width * layer.features
        size, width = out, layer.features
    return total


# --- the step -------------------------------------------------------------------------------------


def _recomputed(config: TrainConfig, policy: Policy, one: PolicyFlops, way: str) -> float:
    """Forward FLOPs that one sequence's backward pass spends again."""
    remat = policy.config.remat  # type: ignore[attr-defined]
    again = {
        "none": 0.0,
        "dots": one.attention,
        "full": one.layers - one.last + one.attention,
    }[remat]
    if way != "fused":
        return again
    # The head's logits are computed to draw, to score and in the backward pass, unless a whole
    # microbatch is one block: then the compiler sees that the three are one.
    batch = config.microbatch_size or config.batch_size
    size = head.block_length(batch, policy.num_tokens, policy.vocab_size)
    return again + (2 * one.head if size < policy.num_tokens else 0.0)


def _longest(config: TrainConfig, policy: Policy, prompt_length: int) -> int:
    """The given length of a Janus prompt, or the longest that the recipe allows."""
    condition = make_condition(config, policy)
    return prompt_length or (max(condition.lengths) if isinstance(condition, Prompt) else 0)


def _rewards_flops(config: TrainConfig) -> float:
    """The perceptual features of one image, of all rewards."""
    rewards = (term.reward for term in make_terms(config.rewards))
    side = config.data.image_size
    return sum(lpips_flops(reward.net, side) for reward in rewards if isinstance(reward, LPIPS))


def step_flops(
    config: TrainConfig, policy: Policy, way: str = "", prompt_length: int = 0
) -> StepFlops:
    """What one step of VA-π spends.

    Args:
      config: the run, of method "vapi".
      policy: its generator.
      way: "fused": one sequence an image. "plain": `plain_vapi_loss`, a sampling forward and G
        sequences an image. "reference": the authors' code, which also runs a base generator that
        nothing needs, the target's perceptual features once a sample, and a decoder that doubles its
        maps before it convolves them. By default what the configuration says.
      prompt_length: see `policy_flops`; 0 for the longest that the recipe allows.

    Raises:
      ValueError: for another way.
    """
    way = way or ("fused" if config.options.fused else "plain")
    if way not in WAYS:
        raise ValueError(f"way {way!r}: choose one of {WAYS}")
    images, group, side = config.batch_size, config.options.group_size, config.data.image_size
    samples = images * group
    sequences = images if way == "fused" else samples
    one = policy_flops(policy, _longest(config, policy, prompt_length))
    targets = samples if way == "reference" else images
    base = {"reference": samples}.get(way, images if config.options.needs_base else 0)
    encoded = source_class(config.data.name).brings_tokens
    return StepFlops(
        encode=0.0 if encoded else images * encoder_flops(config.tokenizer, side),
        sampling=0.0 if way == "fused" else images * one.total,
        decode=samples * decoder_flops(config.tokenizer, side, repeated=way == "reference"),
        lpips=(samples + targets) * _rewards_flops(config),
        forward=sequences * one.total,
        backward=2 * sequences * one.total,
        base=base * one.total,
        recomputed=sequences * _recomputed(config, policy, one, way),
    )


# --- other methods, and samples -------------------------------------------------------------------


def method_flops(config: TrainConfig, policy: Policy, prompt_length: int = 0) -> float | None:
    """Model FLOPs of one step of any method that trains over or for a generator, by its own count.

    Args:
      config: the run.
      policy: its generator.
      prompt_length: see `step_flops`.

    Returns:
      None for a method that is not counted here.
    """
    side = config.data.image_size
    encoded = source_class(config.data.name).brings_tokens
    one = Flops(
        encode=0.0 if encoded else encoder_flops(config.tokenizer, side),
        policy=policy_flops(policy, _longest(config, policy, prompt_length)).total,
        decode=decoder_flops(config.tokenizer, side),
        rewards=_rewards_flops(config),
        perceptual=lambda net: lpips_flops(net, side),
    )
    return find_method(config.method).flops(config, one)


def sample_flops(
    config: TrainConfig, policy: Policy, guided: bool, prompt_length: int = 0
) -> float:
    """One image drawn and decoded; its judges' networks are small beside that and left out."""
    one = policy_flops(policy, _longest(config, policy, prompt_length)).total
    return (2.0 if guided else 1.0) * one + decoder_flops(config.tokenizer, config.data.image_size)
