"""The typed configuration: where a recipe's ConfigDict meets the code.

A recipe under `configs/` returns an `ml_collections.ConfigDict`; `resolve` turns it into the frozen
dataclasses below. A name that nothing reads is an error, with the nearest known name beside it, and
all errors of a configuration are reported at once.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from vapi_jax.corruption import VARIANTS
from vapi_jax.data import DataConfig
from vapi_jax.data.config import SPLITS
from vapi_jax.grpo import RATIOS
from vapi_jax.models.janus import JanusConfig
from vapi_jax.models.llama import LlamaConfig
from vapi_jax.models.vq import VQConfig
from vapi_jax.policy import POLICIES, make_policy
from vapi_jax.reward import RewardWeights
from vapi_jax.tokenizer_loss import ADVERSARIAL_KINDS, DISCRIMINATOR_KINDS, GeneratorWeights
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
    """Weights to start from; "" starts from scratch.

    `gpt` and `vq` take "demo" (shipped), a directory of launch/convert_llamagen.py, the workdir of a
    run, or a file: a released one of LlamaGen, or safetensors with our names.
    """

    gpt: str = ""  # the generator's
    vq: str = ""  # the tokenizer's
    perceptual: tuple[str, ...] = ()  # LPIPS from files, backbone and heads; () for the bundled
    verify: bool = True  # compare a converted directory's digests; False saves seconds
    discriminator: str = (
        ""  # of the GAN reward: weights/discriminator.safetensors of a tokenizer run
    )


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
    if not isinstance(preset, str) or preset not in PRESETS:
        errors.append(f"preset={preset!r}: choose one of {tuple(PRESETS)}")
        raw["preset"] = preset = "paper"
    if isinstance(raw.setdefault("vapi", {}), Mapping):
        raw["vapi"] = {**PRESETS[preset], **raw["vapi"]}
    for required, stand_in in (("name", "unnamed"), ("task", TASKS[0])):
        if required not in raw:
            errors.append(f"{required}: missing")
            raw[required] = stand_in
    resolved = _build(TrainConfig, raw, "", errors)
    errors += _impossible(resolved)
    if errors:
        raise ConfigError(
            f"{len(errors)} error(s) in the configuration:\n"
            + "\n".join(f"  - config.{error}" for error in errors)
        )
    return resolved


def _build(kind: type, values: Any, where: str, errors: list[str]) -> Any:
    """A dataclass from a mapping, collecting errors instead of stopping at the first.

    A value that cannot be used is left at its default, so that the rest can be judged as well.
    """
    if not isinstance(values, Mapping):
        errors.append(f"{where.rstrip('.')}={values!r}: wants options of its own, not a value")
        return kind()
    hints = typing.get_type_hints(kind)
    kwargs: dict[str, Any] = {}
    for name, value in values.items():
        if name not in hints:
            errors.append(f"{where}{name}: nothing reads this option{_nearest(name, hints, where)}")
        elif dataclasses.is_dataclass(hints[name]):
            kwargs[name] = _build(hints[name], value, f"{where}{name}.", errors)
        else:
            before = len(errors)
            value = _coerce(value, hints[name], f"{where}{name}", errors)
            if len(errors) == before:
                kwargs[name] = value
            elif kind is TrainConfig and name in ("name", "task"):  # these have no default
                kwargs[name] = str(value)
    try:
        return kind(**kwargs)
    except ValueError as error:  # the dataclass's own check
        errors.append(f"{where.rstrip('.')}: {error}")
        return kind()


def _nearest(name: str, known: Iterable[str], where: str) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {where}{near[0]}?" if near else f"; known: {', '.join(known)}"


def _coerce(value: Any, hint: Any, where: str, errors: list[str]) -> Any:
    """A value of the field's type; whole floats pass for ints and ints for floats."""
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            errors.append(f"{where}={value!r}: wants a tuple, not {type(value).__name__}")
            return value
        inner = typing.get_args(hint)[0]
        return tuple(_coerce(item, inner, where, errors) for item in value)
    if typing.get_origin(hint) is Mapping:
        if not isinstance(value, Mapping):
            errors.append(f"{where}={value!r}: wants options of its own, not a value")
        return value
    if typing.get_origin(hint) is types.UnionType:  # "int | None"
        return value if value is None else _coerce(value, typing.get_args(hint)[0], where, errors)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        errors.append(f"{where}={value!r}: wants {hint.__name__}, not {type(value).__name__}")
    return value


def _impossible(config: TrainConfig) -> list[str]:
    """Everything about a well-typed configuration that cannot work, each with its fix."""
    errors: list[str] = []

    def wants(condition: bool, message: str) -> None:
        if not condition:
            errors.append(message)

    def one_of(name: str, value: Any, choices: Iterable[Any]) -> None:
        wants(value in choices, f"{name}={value!r}: choose one of {tuple(choices)}")

    def at_least(name: str, value: float, least: float) -> None:
        wants(value >= least, f"{name}={value}: wants at least {least}")

    one_of("task", config.task, TASKS)
    one_of("perceptual_net", config.perceptual_net, ("vgg", "alex"))
    one_of("optimizer.schedule", config.optimizer.schedule, ("constant", "cosine"))
    one_of("eval.split", config.eval.split, SPLITS)
    for name in ("steps", "batch_size", "cpu_devices", "log_every"):
        at_least(name, getattr(config, name), 1)
    at_least("decode_chunk", config.decode_chunk, 0)
    for name in ("every", "images", "samples", "seeds", "grid_per_class", "grid_classes"):
        at_least(f"eval.{name}", getattr(config.eval, name), 1)
    at_least("checkpoint.every", config.checkpoint.every, 0)
    at_least("checkpoint.keep_last", config.checkpoint.keep_last, 1)
    for name in ("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps"):
        at_least(f"optimizer.{name}", getattr(config.optimizer, name), 0)
    share = config.label_dropout
    wants(0.0 <= share <= 1.0, f"label_dropout={share}: wants 0 to 1")
    micro = config.microbatch_size or config.batch_size
    wants(
        config.batch_size < 1 or (micro > 0 and config.batch_size % micro == 0),
        f"microbatch_size={micro}: batch_size={config.batch_size} is not a multiple of it",
    )
    factor = config.tokenizer.downsample_factor
    wants(
        config.data.image_size % factor == 0,
        f"data.image_size={config.data.image_size}: the tokenizer reduces by {factor}; take a "
        "multiple of it",
    )
    if config.task == "tokenizer":
        training = config.tokenizer_training
        name = "tokenizer_training."
        one_of(f"{name}discriminator_kind", training.discriminator_kind, DISCRIMINATOR_KINDS)
        one_of(f"{name}adversarial_kind", training.adversarial_kind, ADVERSARIAL_KINDS)
        at_least(f"{name}restart_every", training.restart_every, 1)
    else:
        errors += _policy_errors(config)
    if config.task == "vapi":
        errors += _method_errors(config)
    return errors


def _method_errors(config: TrainConfig) -> list[str]:
    v = config.vapi
    checks = {
        f"group_size={v.group_size}: advantages need at least 2": v.group_size >= 2,
        f"noise_rate={v.noise_rate}: wants 0 to 1": 0.0 <= v.noise_rate <= 1.0,
        f"corruption={v.corruption!r}: choose one of {VARIANTS}": v.corruption in VARIANTS,
        f"temperature={v.temperature}: wants more than 0": v.temperature > 0.0,
        f"ratio={v.ratio!r}: choose one of {RATIOS}": v.ratio in RATIOS,
        f"mse_reduction={v.mse_reduction!r}: choose 'mean' or 'sum'": (
            v.mse_reduction in ("mean", "sum")
        ),
        f"clip_epsilon={v.clip_epsilon}: wants more than 0": v.clip_epsilon > 0.0,
        f"advantage_clip={v.advantage_clip}: wants more than 0": v.advantage_clip > 0.0,
        f"kl_weight={v.kl_weight}: wants at least 0": v.kl_weight >= 0.0,
        f"token_dropout={v.token_dropout}: wants [0, 1)": 0.0 <= v.token_dropout < 1.0,
        f"label_dropout={v.label_dropout}: wants 0 to 1": 0.0 <= v.label_dropout <= 1.0,
        "update_dropout: the fused step samples from its training forward; set vapi.fused=False to "
        "run dropout in the update": not (v.fused and v.update_dropout),
    }
    errors = [f"vapi.{message}" for message, holds in checks.items() if not holds]
    if not config.reward.used():
        errors.append("reward: all weights are 0; the reward would be constant")
    if config.reward.gan != 0.0 and not config.init.discriminator:
        errors.append("reward.gan: name the discriminator's weights in init.discriminator")
    return errors


def _policy_errors(config: TrainConfig) -> list[str]:
    """What is wrong with the generator's options, which are those of its own kind."""
    options: dict[str, Any] = dict(config.policy)
    errors: list[str] = []
    kind = options.pop("kind", None)
    if kind not in POLICIES:
        return [f"policy.kind={kind!r}: choose one of {tuple(POLICIES)}"]
    hints = typing.get_type_hints(JanusConfig if kind == "janus" else LlamaConfig)
    more = ("alignment", "padding") if kind == "janus" else ("size",)
    hints |= dict.fromkeys(more, str)
    for name, value in options.items():
        if name in hints:
            options[name] = _coerce(value, hints[name], f"policy.{name}", errors)
        else:
            near = _nearest(name, hints, "policy.")
            errors.append(f"policy.{name}: nothing reads this option{near}")
    side, codes = config.data.image_size, config.tokenizer.codebook_size
    grid = side // config.tokenizer.downsample_factor
    length = "num_tokens" if kind == "janus" else "block_size"
    if options.setdefault(length, grid * grid) != grid * grid:
        errors.append(
            f"policy.{length}={options[length]}: images of {side} px give {grid}x{grid} tokens, so "
            f"{grid * grid}"
        )
    if options.setdefault("vocab_size", codes) != codes:
        errors.append(f"policy.vocab_size={options['vocab_size']}: the tokenizer has {codes} codes")
    if not errors:
        try:
            make_policy(kind, **options)
        except ValueError as error:
            errors.append(f"policy: {error}")
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
