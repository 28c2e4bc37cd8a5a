"""The typed configuration of a run: what every method may ask for. `resolve` makes it of a recipe."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from vapi_jax.common.errors import ExpectedError
from vapi_jax.common.options import (
    Count,
    Limits,
    Natural,
    NotNegative,
    Positive,
    Rate,
    Rule,
    given,
)
from vapi_jax.common.paths import PathText
from vapi_jax.data import DataConfig
from vapi_jax.models.vq import VQConfig
from vapi_jax.rewards import DEFAULT, RewardSpec


class ConfigError(ExpectedError, ValueError):
    """A configuration that cannot run; the message lists everything that is wrong with it."""


Axis = Annotated[int, Rule(lambda n: n == -1 or n >= 1, "at least 1, or -1 for what is left")]
Split = Literal["train", "val", "test"]


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices by axis; -1 takes what is left."""

    data: Axis = -1
    fsdp: Axis = 1

    def __post_init__(self) -> None:
        if self.data == self.fsdp == -1:
            raise ValueError("only one of data and fsdp can be -1, what is left")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW without decay on norms and biases, after clipping by the global norm."""

    learning_rate: NotNegative = 1e-6
    weight_decay: NotNegative = 1e-4
    b1: Rate = 0.9
    b2: Rate = 0.999
    eps: Positive = 1e-8
    max_grad_norm: NotNegative = 1.0  # 0 leaves gradients as they are
    warmup_steps: Natural = 0  # linear, from 0
    schedule: Literal["constant", "cosine"] = (
        "constant"  # cosine: to a tenth of the peak at the end
    )


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """Weights to start from; "" starts from scratch.

    `gpt` and `vq` take "demo" or "scenes" (shipped), a directory of vapi_jax.convert, the workdir of
    a run, or a file: a released one of LlamaGen, or safetensors with our names.
    """

    gpt: PathText = ""  # the generator's
    vq: PathText = ""  # the tokenizer's
    verify: bool = True  # compare a converted directory's digests; False saves seconds
    # "new": fresh rows for the classes of the data, all else from `gpt`
    classes: Literal["keep", "new"] = "keep"


@dataclasses.dataclass(frozen=True)
class ConditionConfig:
    """What generators are asked for, where it is not what their kind takes by itself."""

    name: str = (
        ""  # of vapi_jax.models.conditions.CONDITIONS, or "module:Class"; "" for the policy's
    )
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluation on held-out images, in training and at the end."""

    split: Split = "val"  # held-out images: "val" to choose settings on, "test" for a final table
    every: Count = 25  # steps between evaluations of the fixed held-out batch
    images: Count = 64  # its size; a multiple of the device count
    compare: bool = False  # the table of base, sharpened base and post-trained policy at the end
    controls: bool = False  # also train the method's controls for that table
    samples: Count = 2048  # free-running samples for each Fréchet distance
    # the network of the table's second distance, which the reward has not seen
    unseen: Literal["alex_conv5", "efficientnet_lite0_112"] = "alex_conv5"
    allow_singular: bool = (
        False  # also no more than features: a table that means nothing, for trials
    )
    seeds: Count = 3  # sampling seeds of each row
    temperatures: tuple[Positive, ...] = (0.95, 0.9, 0.87)  # of the sharpened base
    cfg_scales: tuple[Positive, ...] = ()  # guidance of more rows of the base, at temperature 1
    grid_per_class: Count = 2  # samples of each class in the picture
    grid_classes: Count = 8  # classes in the picture
    sampled_every: Natural = 0  # steps between judgements of free-running samples; 0 for none
    sampled: Annotated[int, Limits(3)] = 256  # their number; leaving one out of two is no error bar


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints under WORKDIR/checkpoints."""

    every: Natural = 50  # steps; the last step is always saved, and 0 saves it alone
    keep_last: Count = 2  # newest steps that stay; two, so that there is one to go back to
    keep_every: Natural = 0  # steps that are a multiple of it stay for good; 0 for none


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One run: what is trained, on what, and how.

    Attributes:
      options: the method's own, of its class `Options`; a recipe writes them in the section that the
        method names (`vapi`, `base`, `tokenizer_training`).
    """

    name: str
    method: str  # of vapi_jax.methods.METHODS, or "module:Class"
    seed: Annotated[int, Limits(0, 2**32 - 1)] = 0  # JAX takes larger ones modulo 2**32, silently
    steps: Count = 100
    batch_size: Count = 128  # images of one update, over all devices
    microbatch_size: Natural = 0  # images of one forward and backward, over all devices; 0 for all
    cpu_devices: Count = 1  # virtual devices where the platform is CPU
    preset: str = "paper"  # variant of the method: a key of its PRESETS
    decode_chunk: Natural = 0  # images that a device decodes at once; 0 for as many as fit
    log_every: Count = 1  # steps between rows of metrics.jsonl
    on_nonfinite: Literal["stop", "skip"] = "stop"  # a step whose gradient is not finite
    max_skipped: Natural = 10  # steps of a run that may be skipped
    rewards: tuple[RewardSpec, ...] = DEFAULT  # see vapi_jax.rewards.parse
    mesh: MeshConfig = MeshConfig()
    data: DataConfig = DataConfig()
    tokenizer: VQConfig = VQConfig()
    policy: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # "kind", and its options
    condition: ConditionConfig = ConditionConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    init: InitConfig = InitConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    options: Any = given()
    section: str = given("")  # where a recipe has them


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """The configuration as a recipe would write it, in JSON's types; `resolve` takes it back."""
    fields = dataclasses.asdict(config)
    options, section = fields.pop("options"), fields.pop("section")
    if section:
        fields[section] = options
    found: dict[str, Any] = json.loads(json.dumps(fields))
    return found
