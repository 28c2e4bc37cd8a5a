"""The typed configuration: where a recipe's ConfigDict meets the code.

A recipe under `configs/` returns an `ml_collections.ConfigDict`; `resolve` turns it into the frozen
dataclasses below. A name that nothing reads is an error, with the nearest known name beside it, and
all errors of a configuration are reported at once.
"""

import dataclasses
import difflib
import typing
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from vapi_jax.data import DataConfig
from vapi_jax.models.vq import VQConfig
from vapi_jax.reward import RewardWeights
from vapi_jax.tokenizer_loss import GeneratorWeights
from vapi_jax.vapi import PRESETS, VAPiConfig

TASKS = ("vapi", "tokenizer", "base")


class ConfigError(ValueError):
    """A configuration that cannot run; the message lists everything that is wrong with it."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices by axis; -1 takes what is left."""

    data: int = -1
    fsdp: int = 1


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW without decay on norms and biases, after clipping by the global norm."""

    learning_rate: float = 1e-6
    weight_decay: float = 1e-4
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    max_grad_norm: float = 1.0  # 0 leaves gradients as they are
    warmup_steps: int = 0  # linear, from 0
    schedule: str = "constant"  # "constant" | "cosine" (to a tenth of the peak at the last step)


@dataclasses.dataclass(frozen=True)
class TokenizerTrainConfig:
    """How the tokenizer is trained (Eq. 30-33), beside its sizes."""

    loss: GeneratorWeights = GeneratorWeights()
    discriminator_kind: str = "hinge"  # of vapi_jax.tokenizer_loss.DISCRIMINATOR_KINDS
    adversarial_kind: str = "hinge"  # of vapi_jax.tokenizer_loss.ADVERSARIAL_KINDS
    discriminator_start: int = 20_000  # step at which the adversarial term sets in
    discriminator_ndf: int = 64  # width of its first layer
    discriminator_layers: int = 3
    restart_below: float = 0.0  # restart codes used less than this share of the mean use; 0 never
    restart_every: int = 50  # steps
    restart_until: float = 0.5  # share of the run after which codes are left alone


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """Safetensors files to start from; "demo" names the shipped ones; "" starts from scratch."""

    tokenizer: str = ""
    policy: str = ""


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluation on held-out images, in training and at the end."""

    split: str = "val"  # held-out images: "val" to choose settings on, "test" for a final table
    every: int = 25  # steps between evaluations of the fixed held-out batch
    images: int = 64  # its size; a multiple of the device count
    compare: bool = False  # the table of base, sharpened base and post-trained policy at the end
    controls: bool = False  # also train CE-only and shuffled-advantage controls for that table
    samples: int = 2048  # free-running samples for each Fréchet distance
    seeds: int = 3  # sampling seeds of each row
    temperatures: tuple[float, ...] = (0.95, 0.9, 0.87)  # of the sharpened base
    grid_per_class: int = 2  # samples of each class in the picture
    grid_classes: int = 8  # classes in the picture


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints under WORKDIR/checkpoints."""

    every: int = 0  # steps; 0 keeps none but the final weights
    keep_last: int = 2


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One run: what is trained, on what, and how."""

    name: str
    task: str  # one of TASKS
    seed: int = 0
    steps: int = 100
    batch_size: int = 128  # images of one update, over all devices
    microbatch_size: int = 0  # images of one forward and backward, over all devices; 0 for all
    cpu_devices: int = 1  # virtual devices where the platform is CPU
    preset: str = "paper"  # VA-π variant: see vapi_jax.vapi.PRESETS
    perceptual_net: str = "vgg"  # "vgg" | "alex": LPIPS backbone of reward and tokenizer loss
    label_dropout: float = 0.1  # share of conditions dropped when a base generator is trained
    decode_chunk: int = 0  # images whose samples a device decodes at once; 0 for all
    log_every: int = 1  # steps between rows of metrics.jsonl
    mesh: MeshConfig = MeshConfig()
    data: DataConfig = DataConfig()
    tokenizer: VQConfig = VQConfig()
    tokenizer_training: TokenizerTrainConfig = TokenizerTrainConfig()
    policy: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of policy.make_policy
    vapi: VAPiConfig = VAPiConfig()
    reward: RewardWeights = RewardWeights()
    optimizer: OptimizerConfig = OptimizerConfig()
    init: InitConfig = InitConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()


def resolve(config: ConfigDict | Mapping[str, Any]) -> TrainConfig:
    """The typed configuration of a recipe, with its VA-π preset applied under its explicit choices.

    Raises:
      ConfigError: listing every unknown name, wrong type and impossible value.
    """
    raw = config.to_dict() if isinstance(config, ConfigDict) else dict(config)
    errors: list[str] = []
    preset = raw.get("preset", "paper")
    if preset not in PRESETS:
        errors.append(f"preset={preset!r}: choose one of {tuple(PRESETS)}")
    raw["vapi"] = {**PRESETS.get(preset, {}), **dict(raw.get("vapi", {}))}
    for required in ("name", "task"):
        if required not in raw:
            errors.append(f"{required}: missing")
    resolved = _build(TrainConfig, raw, "", errors) if not errors else None
    if resolved is not None:
        errors += _impossible(resolved)
    if errors or resolved is None:
        raise ConfigError(
            f"{len(errors)} error(s) in the configuration:\n"
            + "\n".join(f"  - config.{error}" for error in errors)
        )
    return resolved


def _build(kind: type, values: Mapping[str, Any], where: str, errors: list[str]) -> Any:
    """A dataclass from a mapping, collecting errors instead of stopping at the first."""
    hints = typing.get_type_hints(kind)
    kwargs: dict[str, Any] = {}
    for name, value in values.items():
        if name not in hints:
            near = difflib.get_close_matches(name, hints, n=1)
            hint = f"; did you mean {where}{near[0]}?" if near else f"; known: {', '.join(hints)}"
            errors.append(f"{where}{name}: nothing reads this option{hint}")
        elif dataclasses.is_dataclass(hints[name]):
            kwargs[name] = _build(hints[name], value, f"{where}{name}.", errors)
        else:
            kwargs[name] = _coerce(value, hints[name], f"{where}{name}", errors)
    return kind(**kwargs) if not errors else None


def _coerce(value: Any, hint: Any, where: str, errors: list[str]) -> Any:
    """A value of the field's type; whole floats pass for ints and ints for floats."""
    origin = typing.get_origin(hint)
    if origin is tuple and isinstance(value, list | tuple):
        inner = typing.get_args(hint)[0]
        return tuple(_coerce(item, inner, where, errors) for item in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint in (int, float, str, bool) and (
        not isinstance(value, hint) or (hint is int and isinstance(value, bool))
    ):
        errors.append(f"{where}={value!r}: wants {hint.__name__}, not {type(value).__name__}")
    return value


def _impossible(config: TrainConfig) -> list[str]:
    """Everything about a well-typed configuration that cannot work, each with its fix."""
    errors = []

    def wants(condition: bool, message: str) -> None:
        if not condition:
            errors.append(message)

    v, tokenizer = config.vapi, config.tokenizer
    wants(config.task in TASKS, f"task={config.task!r}: choose one of {TASKS}")
    wants(config.steps > 0, f"steps={config.steps}: wants at least 1")
    wants(config.batch_size > 0, f"batch_size={config.batch_size}: wants at least 1")
    micro = config.microbatch_size or config.batch_size
    wants(
        micro > 0 and config.batch_size % micro == 0,
        f"microbatch_size={micro}: batch_size={config.batch_size} is not a multiple of it",
    )
    factor = tokenizer.downsample_factor
    wants(
        config.data.image_size % factor == 0,
        f"data.image_size={config.data.image_size}: the tokenizer reduces by {factor}; take a "
        "multiple of it",
    )
    if config.task in ("vapi", "base"):
        grid = config.data.image_size // factor
        block = config.policy.get("block_size", grid * grid)
        wants(
            block == grid * grid,
            f"policy.block_size={block}: images of {config.data.image_size} px give {grid}x{grid} "
            f"tokens, so {grid * grid}",
        )
        vocab = config.policy.get("vocab_size", tokenizer.codebook_size)
        wants(
            vocab == tokenizer.codebook_size,
            f"policy.vocab_size={vocab}: the tokenizer has {tokenizer.codebook_size} codes",
        )
    if config.task == "vapi":
        wants(v.group_size >= 2, f"vapi.group_size={v.group_size}: advantages need at least 2")
        wants(0.0 <= v.noise_rate <= 1.0, f"vapi.noise_rate={v.noise_rate}: wants 0 to 1")
        wants(v.temperature > 0.0, f"vapi.temperature={v.temperature}: wants more than 0")
        wants(0.0 <= v.token_dropout < 1.0, f"vapi.token_dropout={v.token_dropout}: wants [0, 1)")
        wants(
            not (v.fused and v.update_dropout),
            "vapi.update_dropout: the fused step samples from its training forward; set "
            "vapi.fused=False to run dropout in the update",
        )
        wants(bool(config.reward.used()), "reward: all weights are 0; the reward would be constant")
        wants(config.reward.gan == 0.0, "reward.gan: no discriminator weights can be named yet")
    wants(
        config.optimizer.schedule in ("constant", "cosine"),
        f"optimizer.schedule={config.optimizer.schedule!r}: choose 'constant' or 'cosine'",
    )
    wants(
        config.perceptual_net in ("vgg", "alex"),
        f"perceptual_net={config.perceptual_net!r}: choose 'vgg' or 'alex'",
    )
    return errors


def check_devices(config: TrainConfig, devices: int) -> None:
    """Raises `ConfigError` unless every batch splits evenly over the devices."""
    errors = []
    micro = config.microbatch_size or config.batch_size
    for name, size in (("microbatch_size", micro), ("eval.images", config.eval.images)):
        if size % devices:
            errors.append(
                f"{name}={size}: not a multiple of the {devices} devices; take "
                f"{-(-size // devices) * devices}"
            )
    if errors:
        raise ConfigError("\n".join(f"config.{error}" for error in errors))
