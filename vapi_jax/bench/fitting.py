"""The fastest setting of a step that fits a target: microbatch, remat and decoding chunk.

Settings are tried in the order of their predicted time. What is far too large by its shapes alone is not
compiled.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

from vapi_jax.bench.bandwidth import table_bandwidth
from vapi_jax.bench.devices import table_peak
from vapi_jax.bench.flops import step_flops
from vapi_jax.bench.measure import say
from vapi_jax.bench.scaling import Link, count_parameters, predict
from vapi_jax.bench.targets import Figures, compile_program, lower_step, on_mesh, open_mesh
from vapi_jax.methods.config import TrainConfig
from vapi_jax.methods.vapi_method import VAPi
from vapi_jax.parallel.fsdp import AXIS
from vapi_jax.parallel.targets import Target
from vapi_jax.training import memory, train

TRIES = 8
"""Most settings that are compiled."""

_DOUBT = 1.3  # what shapes say may be too much by so much and still be worth a try
_SMALLER_CHUNK = 1.02  # what decoding fewer images at once costs, where it is a choice
_UTILISATION, _ACHIEVED = 0.5, 0.8  # of the peak and of the links, as in `scaling.H100`


@dataclasses.dataclass(frozen=True)
class Setting:
    """Options that change how a step runs and not what it computes.

    Attributes:
      seconds: of a step, predicted from FLOPs and bytes; good for the order alone.
    """

    microbatch_size: int
    remat: str
    decode_chunk: int
    seconds: float

    def of(self, config: TrainConfig) -> TrainConfig:
        """The recipe with this setting."""
        return dataclasses.replace(
            config,
            microbatch_size=self.microbatch_size,
            decode_chunk=self.decode_chunk,
            policy={**config.policy, "remat": self.remat},
        )

    def __str__(self) -> str:
        return (
            f"--config.microbatch_size={self.microbatch_size} --config.policy.remat={self.remat} "
            f"--config.decode_chunk={self.decode_chunk}"
        )


def settings(method: VAPi, target: Target) -> list[Setting]:
    """All that are to be tried on a mesh, the fastest by prediction first."""
    config, devices = method.config, method.mesh.size
    group, side = method.options.group_size, config.data.image_size
    state = train.abstract_state(
        method, train.make_optimizer(config.optimizer, config.steps), config.seed
    )
    parameters = count_parameters(state.params, method.mesh)
    between = target.kind.link if target.kind.gpu is None else 50e9
    peak = table_peak(target.kind.title, "bfloat16")
    memory_speed = table_bandwidth(target.kind.title)
    assert peak is not None and memory_speed is not None, target.kind.title
    # A microbatch reads all matrices three times in bfloat16, and reads and writes its share of a float32
    # sum of gradients: many small ones wait for memory.
    whole = parameters.layers + parameters.rest + parameters.whole
    per_microbatch = (6 * whole + 12 * whole / method.mesh.shape[AXIS]) / memory_speed

    link = Link(
        target.name, peak, _UTILISATION, method.mesh.shape[AXIS], target.kind.link, between, _ACHIEVED
    )  # fmt: skip

    def made() -> Iterator[Setting]:
        batch, given = config.batch_size, config.microbatch_size or config.batch_size
        sizes = [n for n in range(devices, batch + 1, devices) if batch % n == 0]
        # Powers of two of the whole batch, and the recipe's own.
        sizes = [n for n in sizes if (batch // n).bit_count() == 1 or n == given]
        for size, remat in itertools.product(sizes, ("none", "dots", "full")):
            one = Setting(size, remat, config.decode_chunk, 0.0)
            changed = dataclasses.replace(method, config=one.of(config))
            flops = step_flops(changed.config, changed.policy).hardware / batch
            found = predict(
                parameters, method.compute_dtype, flops, batch, devices, size // devices, link
            )
            seconds = found.exposed + batch // size * per_microbatch
            one = dataclasses.replace(one, seconds=seconds)
            yield one
            if changed.judged_pixels.at_once(size // devices, group, side)[0] > group:
                yield dataclasses.replace(
                    one, decode_chunk=group, seconds=one.seconds * _SMALLER_CHUNK
                )

    return sorted(made(), key=lambda one: (one.seconds, -one.microbatch_size))


def fastest(config: TrainConfig, target: Target) -> tuple[Setting, Figures] | None:
    """The fastest setting by prediction whose step the target's compiler fits into a device.

    None if there is none among the first `TRIES` that are worth a try, or for a method other than VA-π.

    Raises:
      ConfigError, TargetError: as `targets.examine`.
    """
    method = on_mesh(config, open_mesh(config, target))
    if not isinstance(method, VAPi):
        return None
    tried = 0
    for setting in settings(method, target):
        changed = dataclasses.replace(method, config=setting.of(method.config))
        state = train.abstract_state(
            changed, train.make_optimizer(config.optimizer, config.steps), config.seed
        )
        parts = memory.estimate(changed, state, changed.frozen_shapes())
        told = sum(part.bytes for part in parts)
        if told > _DOUBT * target.kind.memory:
            continue
        tried += 1
        say(f"{target.name}: trying {setting}")
        found = compile_program("step", *lower_step(changed), target)
        if found.fits:
            return setting, found
        if tried == TRIES:
            return None
    return None
