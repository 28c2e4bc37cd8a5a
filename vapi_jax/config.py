"""The typed configuration: where a recipe's ConfigDict meets the code.

A recipe under `configs/` returns an `ml_collections.ConfigDict`; `resolve` turns it into the frozen
dataclasses below. A name that nothing reads is an error, with the nearest known name beside it, and
all errors of a configuration are reported at once (`vapi_jax.config_checks` has the rules).
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from vapi_jax.config_checks import TASKS, Errors, broken_limit, check_together
from vapi_jax.data import DataConfig
from vapi_jax.models.janus import JanusConfig
from vapi_jax.models.llama import LlamaConfig
from vapi_jax.models.vq import VQConfig
from vapi_jax.policy import POLICIES
from vapi_jax.reward import RewardWeights
from vapi_jax.tokenizer_loss import GeneratorWeights
from vapi_jax.vapi import PRESETS, VAPiConfig


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
    sampled_every: int = 0  # steps between judgements of free-running samples; 0 for none
    sampled: int = 256  # their number


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints under WORKDIR/checkpoints."""

    every: int = 50  # steps; the last step is always saved, and 0 saves it alone
    keep_last: int = 2  # newest steps that stay; two, so that there is one to go back to
    keep_every: int = 0  # steps that are a multiple of it stay for good; 0 for none


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
    on_nonfinite: str = "stop"  # "stop" | "skip": a step whose gradient is not finite
    max_skipped: int = 10  # steps of a run that may be skipped
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
    resolved, errors = examine(config)
    raise_all(errors)
    return resolved


def raise_all(errors: Sequence[str]) -> None:
    """Raises `ConfigError` with all error lines, if there are any."""
    if errors:
        lines = [f"{len(errors)} error(s) in the configuration:"]
        lines += ["  - config." + error.replace("\n", "\n      ") for error in errors]
        raise ConfigError("\n".join(lines))


def examine(config: ConfigDict | Mapping[str, Any]) -> tuple[TrainConfig, Errors]:
    """The typed configuration, and a line for everything that is wrong with it.

    A value that cannot be used is left at its default, so that the rest can be judged as well.
    """
    raw = config.to_dict() if isinstance(config, ConfigDict) else dict(config)
    errors = Errors()
    preset = raw.get("preset", "paper")
    if not isinstance(preset, str) or preset not in PRESETS:
        errors.append(f"preset={preset!r}: choose one of {tuple(PRESETS)}")
        raw["preset"] = preset = "paper"
    if isinstance(raw.setdefault("vapi", {}), Mapping):
        raw["vapi"] = {**PRESETS[preset], **raw["vapi"]}
    errors += [f"{required}: missing" for required in _STAND_INS if required not in raw]
    resolved = _build(TrainConfig, raw, "", errors)
    check_together(resolved, errors)
    return resolved, errors


_STAND_INS = {"name": "unnamed", "task": TASKS[0]}  # for the two options without a default


def _build(kind: type, values: Any, where: str, errors: Errors) -> Any:
    """A dataclass from a mapping, collecting errors instead of stopping at the first."""
    if not isinstance(values, Mapping):
        errors.append(f"{where.rstrip('.')}={values!r}: wants options of its own, not a value")
        return kind()
    hints = typing.get_type_hints(kind)
    kwargs: dict[str, Any] = dict(_STAND_INS) if kind is TrainConfig else {}
    for name, value in values.items():
        path = f"{where}{name}"
        if name not in hints:
            errors.append(f"{path}: nothing reads this option{_nearest(name, hints, where)}")
        elif dataclasses.is_dataclass(hints[name]):
            kwargs[name] = _build(hints[name], value, f"{path}.", errors)
        elif path == "policy":
            kwargs[name] = _build_policy(value, values.get("task"), errors)
        else:
            _keep(kwargs, name, value, hints[name], path, errors)
    try:
        return kind(**kwargs)
    except ValueError as error:  # the dataclass's own check, one line for each finding
        errors += [f"{where.rstrip('.')}: {line}" for line in str(error).splitlines()]
        return kind()


def _build_policy(values: Any, task: Any, errors: Errors) -> dict[str, Any]:
    """The generator's options, which are those of its own kind."""
    if not isinstance(values, Mapping):
        errors.append(f"policy={values!r}: wants options of its own, not a value")
        return {}
    kind = values.get("kind")
    if kind not in POLICIES:
        if task != "tokenizer":
            errors.append(f"policy.kind={kind!r}: choose one of {tuple(POLICIES)}")
        return dict(values)
    hints = {"kind": str, **typing.get_type_hints(JanusConfig if kind == "janus" else LlamaConfig)}
    more = ("alignment", "padding") if kind == "janus" else ("size",)
    hints |= dict.fromkeys(more, str)
    kept: dict[str, Any] = {}
    for name, value in values.items():
        if name in hints:
            _keep(kept, name, value, hints[name], f"policy.{name}", errors)
        else:
            near = _nearest(name, hints, "policy.")
            errors.append(f"policy.{name}: nothing reads this option{near}")
    return kept


def _keep(
    kept: dict[str, Any], name: str, value: Any, hint: Any, path: str, errors: Errors
) -> None:
    """Adds an option's value under its name, if it is of the right type and within its limits."""
    before = len(errors)
    value = _coerce(value, hint, path, errors)
    if len(errors) == before:
        broken = broken_limit(path, value)
        if broken is None:
            kept[name] = value
        else:
            errors.append(broken)


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


def device_errors(config: TrainConfig, devices: int) -> list[str]:
    """A line for every batch that does not split evenly over the devices."""
    errors = []
    batch, micro = config.batch_size, config.microbatch_size or config.batch_size
    if batch % devices:
        errors.append(_uneven("batch_size", batch, devices, -(-batch // devices) * devices))
    elif micro % devices:
        fitting = [n for n in range(devices, batch + 1, devices) if batch % n == 0]
        nearest = next((n for n in fitting if n >= micro), batch)
        errors.append(_uneven("microbatch_size", micro, devices, nearest))
    images = config.eval.images
    if images % devices:
        errors.append(_uneven("eval.images", images, devices, -(-images // devices) * devices))
    return errors


def _uneven(name: str, size: int, devices: int, fix: int) -> str:
    return f"{name}={size}: not a multiple of the {devices} devices; take {fix}"
