"""What a configuration's values must satisfy: limits of single options, and how they fit together.

A line of an error starts with the option's name and says what it wants. Nothing here touches a
device or a file; see `vapi_jax.training.readiness` for those.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vapi_jax.data.config import SPLITS
from vapi_jax.methods.config import TrainConfig
from vapi_jax.methods.corruption import VARIANTS
from vapi_jax.methods.grpo import RATIOS
from vapi_jax.methods.tokenizer_loss import ADVERSARIAL_KINDS, DISCRIMINATOR_KINDS
from vapi_jax.models.policy import POLICIES, make_policy

TASKS = ("vapi", "tokenizer", "base")

PERCEPTUAL_SIDE = {"vgg": 16, "alex": 31}
"""Smallest images that each LPIPS backbone takes, in pixels."""

COMPARED_FEATURES = 512
"""Width of the widest features of the final table: a covariance needs more samples than that."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """An interval for an option; an end that is left out is infinite."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below

    def __str__(self) -> str:
        low, high = (f"{end:.10g}" for end in (self.low, self.high))
        if self.high == math.inf:
            return f"more than {low}" if self.open_low else f"at least {low}"
        return f"[{low}, {high})" if self.open_high else f"{low} to {high}"


_ONE = Limits(1)
_NOT_NEGATIVE = Limits(0)
_POSITIVE = Limits(0, open_low=True)
_SHARE = Limits(0, 1)
_RATE = Limits(0, 1, open_high=True)

# Options by their path; the data's are checked by `DataConfig` itself.
LIMITS: Mapping[str, Limits] = {
    "seed": Limits(0, 2**32 - 1),  # JAX takes larger seeds modulo 2**32, without a word
    **dict.fromkeys(("steps", "batch_size", "cpu_devices", "log_every"), _ONE),
    **dict.fromkeys(("microbatch_size", "decode_chunk"), _NOT_NEGATIVE),
    "label_dropout": _SHARE,
    "tokenizer.codebook_size": Limits(2),  # noise replaces a token by another one
    "policy.vocab_size": Limits(2),
    **dict.fromkeys(
        (
            "tokenizer.codebook_embed_dim", "tokenizer.ch", "tokenizer.encoder_ch_mult",
            "tokenizer.decoder_ch_mult", "tokenizer.num_res_blocks", "tokenizer.z_channels",
            "tokenizer.groupnorm_groups",
        ),
        _ONE,
    ),
    "tokenizer.commit_loss_beta": _NOT_NEGATIVE,
    "tokenizer.entropy_loss_ratio": _NOT_NEGATIVE,
    "tokenizer.entropy_temperature": _POSITIVE,
    "tokenizer.dropout_p": _RATE,
    **dict.fromkeys(
        (
            "tokenizer_training.loss.reconstruction", "tokenizer_training.loss.perceptual",
            "tokenizer_training.loss.codebook", "tokenizer_training.loss.adversarial",
            "tokenizer_training.discriminator_start", "tokenizer_training.restart_below",
        ),
        _NOT_NEGATIVE,
    ),
    **dict.fromkeys(
        (
            "tokenizer_training.discriminator_ndf", "tokenizer_training.discriminator_layers",
            "tokenizer_training.restart_every",
        ),
        _ONE,
    ),
    "tokenizer_training.restart_until": _SHARE,
    **dict.fromkeys(
        (
            "policy.dim", "policy.n_layer", "policy.n_head", "policy.n_kv_head",
            "policy.multiple_of", "policy.num_classes", "policy.caption_dim",
            "policy.cls_token_num", "policy.block_size", "policy.hidden_dim",
            "policy.text_vocab_size", "policy.image_embed_dim", "policy.num_tokens",
        ),
        _ONE,
    ),
    "policy.pad_id": _NOT_NEGATIVE,
    **dict.fromkeys(
        ("policy.ffn_dim_multiplier", "policy.rope_base", "policy.norm_eps"), _POSITIVE
    ),
    "policy.initializer_range": _NOT_NEGATIVE,
    **dict.fromkeys(
        (
            "policy.token_dropout_p", "policy.attn_dropout_p", "policy.resid_dropout_p",
            "policy.ffn_dropout_p", "policy.drop_path_rate",
        ),
        _RATE,
    ),
    "policy.class_dropout_prob": _SHARE,
    "vapi.noise_rate": _SHARE,
    **dict.fromkeys(("vapi.temperature", "vapi.clip_epsilon", "vapi.advantage_clip"), _POSITIVE),
    "vapi.ce_weight": _NOT_NEGATIVE,
    "vapi.kl_weight": _NOT_NEGATIVE,
    "vapi.token_dropout": _RATE,
    "vapi.label_dropout": _SHARE,
    **dict.fromkeys(
        ("reward.mse", "reward.lpips", "reward.l1", "reward.codebook_cosine", "reward.gan"),
        _NOT_NEGATIVE,
    ),
    **dict.fromkeys(
        (
            "optimizer.learning_rate", "optimizer.weight_decay", "optimizer.max_grad_norm",
            "optimizer.warmup_steps",
        ),
        _NOT_NEGATIVE,
    ),
    "optimizer.b1": _RATE,
    "optimizer.b2": _RATE,
    "optimizer.eps": _POSITIVE,
    **dict.fromkeys(
        (
            "eval.every", "eval.images", "eval.samples", "eval.seeds", "eval.grid_per_class",
            "eval.grid_classes",
        ),
        _ONE,
    ),
    "eval.sampled_every": _NOT_NEGATIVE,
    "eval.sampled": Limits(3),  # leaving one out of two says nothing about an error
    "eval.temperatures": _POSITIVE,
    **dict.fromkeys(("checkpoint.every", "checkpoint.keep_every", "max_skipped"), _NOT_NEGATIVE),
    "checkpoint.keep_last": _ONE,
}  # fmt: skip

CHOICES: Mapping[str, Sequence[str]] = {
    "task": TASKS,
    "perceptual_net": tuple(PERCEPTUAL_SIDE),
    "on_nonfinite": ("stop", "skip"),
    "optimizer.schedule": ("constant", "cosine"),
    "eval.split": SPLITS,
    "tokenizer.encoder_dtype": ("float32", "bfloat16"),
    "tokenizer.decoder_dtype": ("float32", "bfloat16"),
    "tokenizer_training.discriminator_kind": DISCRIMINATOR_KINDS,
    "tokenizer_training.adversarial_kind": ADVERSARIAL_KINDS,
    "policy.dtype": ("float32", "bfloat16"),
    "policy.remat": ("none", "full", "dots"),
    "policy.attention": ("auto", "xla", "cudnn"),
    "vapi.corruption": VARIANTS,
    "vapi.ratio": RATIOS,
    "vapi.mse_reduction": ("mean", "sum"),
}

# Options whose limits are no interval, or want a reason.
_OTHERS: Mapping[str, tuple[Callable[[int], bool], str]] = {
    "mesh.data": (lambda n: n == -1 or n >= 1, "wants at least 1, or -1 for what is left"),
    "mesh.fsdp": (lambda n: n == -1 or n >= 1, "wants at least 1, or -1 for what is left"),
    "vapi.group_size": (lambda n: n >= 2, "advantages need at least 2"),
}


def broken_limit(path: str, value: Any) -> str | None:
    """The error line of one option's value, or None where it is possible."""
    if value is None:
        return None
    if path in CHOICES and value not in CHOICES[path]:
        return f"{path}={value!r}: choose one of {tuple(CHOICES[path])}"
    for part in value if isinstance(value, tuple) else (value,):
        if isinstance(part, float) and not math.isfinite(part):
            return f"{path}={value}: wants a finite number"
        if path in LIMITS and part not in LIMITS[path]:
            return f"{path}={value}: wants {LIMITS[path]}"
        if path in _OTHERS and not _OTHERS[path][0](part):
            return f"{path}={value}: {_OTHERS[path][1]}"
    return None


class Errors(list[str]):
    """Lines "path: what is wrong", and which options they are about."""

    def concern(self, *paths: str) -> bool:
        """Whether one of these options, or one below or above it, has an error already.

        What is derived from a value that is itself wrong would only mislead.
        """
        named = [line.partition(":")[0].partition("=")[0] for line in self]
        return any(
            path == name or path.startswith(f"{name}.") or name.startswith(f"{path}.")
            for path in paths
            for name in named
        )


def check_together(config: TrainConfig, errors: Errors) -> None:
    """Adds what is wrong with options that do not fit one another."""
    if not config.name:
        errors.append("name='': wants a name")
    if config.mesh.data == config.mesh.fsdp == -1:
        errors.append("mesh: only one of data and fsdp can be -1, what is left")
    micro = config.microbatch_size or config.batch_size
    if not errors.concern("batch_size", "microbatch_size") and config.batch_size % micro:
        errors.append(
            f"microbatch_size={micro}: batch_size={config.batch_size} is not a multiple of it"
        )
    if config.init.perceptual and len(config.init.perceptual) != 2:
        errors.append(
            f"init.perceptual: wants two files, the backbone's and the heads' (or none), not "
            f"{len(config.init.perceptual)}"
        )
    _check_images(config, errors)
    _check_evaluation(config, errors)
    if config.task == "vapi":
        _check_method(config, errors)
    if config.task in ("vapi", "base"):
        _check_policy(config, errors)


def _check_images(config: TrainConfig, errors: Errors) -> None:
    if errors.concern("tokenizer", "data"):
        return
    if not config.tokenizer.encoder_ch_mult:
        errors.append("tokenizer.encoder_ch_mult=(): wants a width for at least one resolution")
        return
    side, factor = config.data.image_size, config.tokenizer.downsample_factor
    if side % factor:
        errors.append(
            f"data.image_size={side}: the tokenizer reduces by {factor}; take a multiple of it"
        )
        return
    least, net = PERCEPTUAL_SIDE[config.perceptual_net], config.perceptual_net
    if side < least and (config.task == "tokenizer" or _uses(config, "lpips")):
        errors.append(f"data.image_size={side}: LPIPS ({net}) wants at least {least} pixels")
    training = config.tokenizer_training
    judged = config.task == "tokenizer" and training.loss.adversarial != 0.0
    if (judged or _uses(config, "gan")) and _patches(side, training.discriminator_layers) < 1:
        errors.append(
            f"tokenizer_training.discriminator_layers={training.discriminator_layers}: nothing is "
            f"left of {side} pixels; take fewer"
        )


def _uses(config: TrainConfig, term: str) -> bool:
    return config.task == "vapi" and term in config.reward.used()


def _patches(side: int, layers: int) -> int:
    """Side of the discriminator's logits: `layers` 4x4 convolutions of stride 2, two of stride 1."""
    for stride in (*[2] * layers, 1, 1):
        side = (side + 2 - 4) // stride + 1
    return side


def _check_evaluation(config: TrainConfig, errors: Errors) -> None:
    judged = config.eval
    if judged.compare and config.task != "vapi":
        errors.append(f"eval.compare: task {config.task!r} has no table; set it to False")
    if judged.controls and not judged.compare:
        errors.append("eval.controls: they are rows of the table; set eval.compare=True as well")
    if judged.compare and judged.samples <= COMPARED_FEATURES and not errors.concern("eval"):
        errors.append(
            f"eval.samples={judged.samples}: the table compares {COMPARED_FEATURES} features; wants "
            f"at least {COMPARED_FEATURES + 1}"
        )
    if judged.compare and config.data.image_size < PERCEPTUAL_SIDE["vgg"]:
        errors.append(
            f"eval.compare: images of {config.data.image_size} pixels are too small for its "
            f"features; wants at least {PERCEPTUAL_SIDE['vgg']}"
        )

    if judged.sampled_every and config.task == "tokenizer":
        errors.append("eval.sampled_every: a tokenizer draws no samples; set it to 0")
    if judged.sampled_every and config.data.image_size < PERCEPTUAL_SIDE["vgg"]:
        errors.append(
            f"eval.sampled_every: images of {config.data.image_size} pixels are too small for the "
            f"features that judge samples; wants at least {PERCEPTUAL_SIDE['vgg']}, or set it to 0"
        )


def _check_method(config: TrainConfig, errors: Errors) -> None:
    if config.vapi.fused and config.vapi.update_dropout:
        errors.append(
            "vapi.update_dropout: the fused step samples from its training forward; set "
            "vapi.fused=False to run dropout in the update"
        )
    if not config.reward.used():
        errors.append("reward: all weights are 0; the reward would be constant")
    if config.reward.gan != 0.0 and not config.init.discriminator:
        errors.append("reward.gan: name the discriminator's weights in init.discriminator")


def _check_policy(config: TrainConfig, errors: Errors) -> None:
    options: dict[str, Any] = dict(config.policy)
    kind = options.pop("kind", None)
    if kind not in POLICIES or errors.concern("policy"):
        return
    if kind != "class":
        errors.append(f"policy.kind={kind!r}: data sources give class labels; choose 'class'")
    if not errors.concern("data", "tokenizer"):
        side, codes = config.data.image_size, config.tokenizer.codebook_size
        grid = side // config.tokenizer.downsample_factor
        length = "num_tokens" if kind == "janus" else "block_size"
        if options.setdefault(length, grid * grid) != grid * grid:
            errors.append(
                f"policy.{length}={options[length]}: images of {side} px give {grid}x{grid} tokens, "
                f"so {grid * grid}"
            )
        if options.setdefault("vocab_size", codes) != codes:
            errors.append(
                f"policy.vocab_size={options['vocab_size']}: the tokenizer has {codes} codes"
            )
    if errors.concern("policy.block_size", "policy.num_tokens", "policy.vocab_size"):
        return
    try:
        policy = make_policy(kind, **options)
    except ValueError as error:
        errors.append(f"policy: {error}")
        return
    _check_dropout(config, getattr(policy, "config", None), errors)


def _check_dropout(config: TrainConfig, sizes: Any, errors: Errors) -> None:
    """What only shows when dropout is on: in base training, and in updates that ask for it."""
    name = "label_dropout" if config.task == "base" else "vapi.label_dropout"
    rate = config.label_dropout if config.task == "base" else config.vapi.label_dropout
    if config.task == "vapi" and not config.vapi.update_dropout:
        return
    if rate > 0.0 and getattr(sizes, "class_dropout_prob", 1.0) == 0.0:
        errors.append(
            f"policy.class_dropout_prob=0.0: this generator has no embedding for dropped labels; set "
            f"{name}=0.0"
        )
    if getattr(sizes, "attn_dropout_p", 0.0) > 0.0:
        errors.append(
            f"policy.attn_dropout_p={sizes.attn_dropout_p}: attention kernels have no dropout; "
            "set it to 0"
        )
