"""What a task must offer to be trained: parameters, a loss, metrics, a judgement on held-out images.

The trainer knows nothing else. A new conditioning or loss is a new small class here, never another
trainer.
"""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
from jax.sharding import Mesh
from jaxtyping import Array, Float, PRNGKeyArray

from vapi_jax.common.errors import ExpectedError
from vapi_jax.methods.config import TrainConfig
from vapi_jax.models import vq
from vapi_jax.models.loading import WeightsSource

Params = Any
Aux = dict[str, Array]
Scalars = dict[str, Float[Array, ""]]


class HealthError(ExpectedError, RuntimeError):
    """A run that can no longer learn anything, stopped with the reason and what to look at."""


@dataclasses.dataclass(frozen=True)
class Task(abc.ABC):
    """One thing to train. Arrays are always passed in, never kept.

    Attributes:
      config: the run.
      mesh: devices.
      local: inside `jax.shard_map`, where a task sees one device's images only.
    """

    independent_images: ClassVar[bool] = False
    """Whether the loss is a mean over images that do not see each other."""

    config: TrainConfig
    mesh: Mesh
    local: bool = False

    headline: tuple[str, ...] = dataclasses.field(default=("loss",), init=False)
    """Metrics shown in the progress line."""

    @property
    def compute_dtype(self) -> str:
        """What the trained network's matrices are multiplied in."""
        return "float32"

    @abc.abstractmethod
    def init(self, rng: PRNGKeyArray) -> Params:
        """Trainable parameters from scratch; traced, so that they are born sharded."""

    @property
    def init_from(self) -> WeightsSource | None:
        """The weights to start from instead, if any."""
        return None

    def init_extra(self, params: Params) -> Any:
        """State beside the parameters that gradients do not touch (running statistics)."""
        del params
        return {}

    @abc.abstractmethod
    def load_frozen(self) -> dict[str, Any]:
        """Frozen weights by role, as trees of host arrays."""

    @abc.abstractmethod
    def loss(
        self,
        params: Params,
        extra: Any,
        frozen: Mapping[str, Any],
        batch: Mapping[str, Any],
        rng: PRNGKeyArray,
        step: Array,
    ) -> tuple[Float[Array, ""], tuple[Aux, Any]]:
        """Mean loss of a microbatch, arrays for `summarize`, and the new extra state.

        `batch["index"]` holds the images' places in the whole batch; randomness derived from it
        makes a step independent of how the batch is cut up. (Dropout of activations is drawn for a
        microbatch as a whole, and does depend on the cut.)
        """

    @abc.abstractmethod
    def summarize(self, aux: Aux) -> Scalars:
        """Metrics of a step from the microbatches' arrays, each with a leading microbatch axis."""

    def after_update(
        self, params: Params, extra: Any, rng: PRNGKeyArray, step: Array
    ) -> tuple[Params, Any]:
        """What happens to parameters outside the gradient."""
        del rng, step
        return params, extra

    def check(self, step: int, metrics: Mapping[str, float]) -> None:
        """Raises `HealthError` where a step's metrics say that training is broken."""
        norm = metrics["grad_norm"]
        if not norm > 0.0 or norm == float("inf"):
            raise HealthError(
                f"step {step}: gradient norm {norm}. Nothing can be learned from such a gradient; "
                "the last finite state is what was saved. Look at the loss, the learning rate and "
                "the data."
            )

    @abc.abstractmethod
    def held_out(
        self,
        params: Params,
        frozen: Mapping[str, Any],
        batch: Mapping[str, Any],
        rng: PRNGKeyArray,
        temperature: Float[Array, ""],
    ) -> Scalars:
        """Metrics on a fixed batch of held-out images; the same rng at every call.

        `temperature` is that of sampling, for tasks that sample.
        """

    @abc.abstractmethod
    def weights_of(self, params: Params, extra: Any) -> dict[str, Params]:
        """What is saved at the end: file name (without suffix) -> tree."""

    def start_like(self, params: Params) -> Params:
        """The part of the parameters that `init_from` replaces: all of them."""
        return params

    def with_start(self, loaded: Params, fresh: Callable[[], Params]) -> Params:
        """All parameters, of which `loaded` replaces `start_like`; `fresh` makes the others."""
        del fresh
        return loaded


def mean_of(aux: Aux, *names: str) -> Scalars:
    """The mean of each named array."""
    return {name: jax.numpy.mean(aux[name]) for name in names}


def tokenizer_source(config: TrainConfig) -> WeightsSource | None:
    """The tokenizer weights that a configuration names, if any."""
    init = config.init
    if not init.vq:
        return None
    return WeightsSource(
        init.vq, "vq", vq.NAME_RULES, vq.IGNORED_NAMES, config.tokenizer, init.verify
    )
