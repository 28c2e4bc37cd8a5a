"""The typed configuration: where a recipe's ConfigDict meets the code.

A recipe under `configs/` returns an `ml_collections.ConfigDict`; `resolve` turns it into the frozen
dataclasses below. A name that nothing reads is an error, with the nearest known name beside it, and
all errors of a configuration are reported at once (`vapi_jax.methods.config_checks` has the rules).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from vapi_jax.common.errors import ExpectedError
from vapi_jax.data import DataConfig
from vapi_jax.methods.tokenizer_loss import GeneratorWeights
from vapi_jax.methods.vapi import VAPiConfig
from vapi_jax.models.vq import VQConfig
from vapi_jax.rewards.reconstruction import RewardWeights


class ConfigError(ExpectedError, ValueError):
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
    discriminator_kind: str = "hinge"  # of vapi_jax.methods.tokenizer_loss.DISCRIMINATOR_KINDS
    adversarial_kind: str = "hinge"  # of vapi_jax.methods.tokenizer_loss.ADVERSARIAL_KINDS
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
    preset: str = "paper"  # VA-π variant: see vapi_jax.methods.vapi.PRESETS
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
