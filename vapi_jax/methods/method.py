"""The contract of a method: what the one trainer asks of whatever is trained.

A method is a frozen dataclass of its configuration and devices. It holds no arrays; they are passed to
every call. The trainer, the plan, the memory estimate, the report and the benchmark ask the method, never
its name. A new one is a file here with one class, a line in `METHODS`, and a recipe; a user's own is named
as "module:Class".

A step, as `vapi_jax.training.train` runs it:

    batch ─ rollout (no gradient, on the devices) ─ review (on the host) ─▶ experience
    experience ─ loss, gradient, AdamW, after_update ─▶ next state            `updates` times

Where a method has no rollout of its own (`rolls_out` False, the default) the batch is the experience, and
all of a step is one compiled program.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PRNGKeyArray

from vapi_jax.common.errors import ExpectedError
from vapi_jax.common.options import Errors
from vapi_jax.methods.config import TrainConfig
from vapi_jax.models import vq
from vapi_jax.models.loading import WeightsSource
from vapi_jax.models.pixels import PixelSpace
from vapi_jax.models.policy import Policy
from vapi_jax.parallel.sharding import Rules

Params = Any
Aux = dict[str, Array]
Scalars = dict[str, Float[Array, ""]]
Curve = tuple[str, str, str]
"""(metric, title, axis label) of a chart."""


EMA = "ema"
"""In the extra state: a copy of the parameters that follows them, laid out as they are; no loss sees it."""


class HealthError(ExpectedError, RuntimeError):
    """A run that can no longer learn anything, stopped with the reason and what to look at."""


class NothingLearned(HealthError):
    """A step without a gradient: a fault where many come in a row (`Method.patience`)."""


@dataclasses.dataclass(frozen=True)
class NoOptions:
    """Of a method that has none."""


@dataclasses.dataclass(frozen=True)
class Network:
    """A network of a run, before anything of it is read.

    Attributes:
      name: what the plan calls it.
      option: the option that says where its weights are from.
      shapes: gives its parameters' shapes.
      origin: () -> (where its weights are from, what vouches for them), after a look at them; raises
        ExpectedError with what is wrong. None for weights that `source` locates.
      load: reads those weights as the run will, beside `origin`.
      source: weights to start from or to be kept frozen; None for fresh ones.
    """

    name: str
    option: str
    shapes: Callable[[], Any]
    source: WeightsSource | None = None
    origin: Callable[[], tuple[str, str] | None] | None = None
    load: Callable[[], Any] | None = None


@dataclasses.dataclass(frozen=True)
class Flops:
    """Floating-point operations of one image's forward passes, counted from a configuration.

    A backward pass to parameters costs two of them, one to an input alone costs one.

    Attributes:
      encode: from its pixels to tokens; 0 where the data bring those.
      policy: the generator over all its tokens.
      decode: from tokens to pixels.
      rewards: the perceptual features of all rewards; their other networks are left out.
      perceptual: name of an LPIPS backbone -> its features.
    """

    encode: float
    policy: float
    decode: float
    rewards: float
    perceptual: Callable[[str], float]


@dataclasses.dataclass(frozen=True)
class SampledPolicy:
    """What a method needs so that others can draw samples of what it trains.

    Attributes:
      policy: the generator.
      params: (the method's parameters, frozen) -> the generator's, on the method's devices.
      pixels: from its tokens to images.
      tokenizer: the method's parameters -> those of the tokenizer, where it trains that; None for
        frozen["tokenizer"].
    """

    policy: Policy
    params: Callable[[Params, Mapping[str, Any]], Params]
    pixels: PixelSpace
    tokenizer: Callable[[Params], Params] | None = None


@dataclasses.dataclass(frozen=True)
class Method(abc.ABC):
    """One way to train.

    Attributes:
      config: the run.
      mesh: devices.
      local: inside `jax.shard_map`, where a method sees one device's images only.
    """

    # --- what it says of itself -------------------------------------------------------------------

    title: ClassVar[str] = "training"
    label: ClassVar[str] = "post-trained"
    """What a table calls the policy that it has trained."""
    section: ClassVar[str] = ""
    """Where a recipe has its options; a user's method may leave it out and use "method_options"."""
    Options: ClassVar[type] = NoOptions
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": {}}
    """Variants: name -> fragment of a recipe, under the recipe's own choices."""
    headline: ClassVar[tuple[str, ...]] = ("loss",)
    """Metrics shown in the progress line."""
    curves: ClassVar[tuple[Curve, ...]] = (
        ("loss", "Loss", "loss"),
        ("grad_norm", "Gradient norm", "L2 norm, unclipped"),
        ("learning_rate", "Learning rate", "learning rate"),
    )
    """The first of those present gets the large place in the report, the next the small ones."""
    independent_images: ClassVar[bool] = False
    """Whether the loss is a mean over images that do not see each other."""
    rolls_out: ClassVar[bool] = False
    """Whether `rollout` and `review` run before the updates of a step."""
    compares: ClassVar[bool] = False
    """Whether samples before and after can be compared (`eval.compare`): it post-trains what draws them."""
    patience: ClassVar[int] = 1
    """How many steps in a row without anything to learn end a run."""
    partition_rules: ClassVar[Rules] = ()
    """Layouts of parameters whose names the table of `vapi_jax.parallel.sharding` does not have."""

    config: TrainConfig
    mesh: Mesh
    local: bool = False

    @property
    def options(self) -> Any:
        """Its own options, of class `Options`."""
        return self.config.options

    @property
    def compute_dtype(self) -> str:
        """What the trained network's matrices are multiplied in."""
        return "float32"

    @property
    def updates(self) -> int:
        """Updates on one rollout, >= 1."""
        return 1

    @property
    def samples_per_image(self) -> int:
        """Samples that a step decodes and rewards for each image; 0 for a method without."""
        return 0

    @property
    def wants_images(self) -> bool:
        """Whether its batches bring "image"."""
        return True

    @property
    def keeps_start(self) -> bool:
        """Whether frozen["base"] holds the parameters of step 0."""
        return False

    @classmethod
    def depends_on_steps(cls, options: Any) -> bool:
        """Whether more steps change what the first ones do, beside the learning rate."""
        del options
        return False

    @classmethod
    def depends_on_cut(cls, config: TrainConfig) -> bool:
        """Whether steps depend on how a batch is cut into microbatches and over devices.

        As where dropout is drawn for a part, or statistics are a part's; rounding is no such thing.
        """
        del config
        return False

    @classmethod
    def check(cls, config: TrainConfig, errors: Errors) -> None:
        """Adds what is wrong with options that do not fit one another; nothing is read."""
        if config.eval.compare and not cls.compares:
            errors.append(f"eval.compare: method {config.method!r} has no table; set it to False")

    @classmethod
    def flops(cls, config: TrainConfig, one: Flops) -> float | None:
        """Model FLOPs of one step over all devices; None for a method that does not count them."""
        del config, one
        return None

    def networks(self) -> list[Network]:
        """The trained and the frozen networks, for the plan and for a look at their weights."""
        return []

    def controls(self) -> dict[str, TrainConfig]:
        """Other trainings from the same start, for the table: name -> configuration."""
        return {}

    # --- networks ---------------------------------------------------------------------------------

    @abc.abstractmethod
    def init(self, rng: PRNGKeyArray) -> Params:
        """All trainable parameters from scratch; traced, so that they are born sharded."""

    @property
    def init_from(self) -> WeightsSource | None:
        """The weights to start from instead, if any."""
        return None

    @property
    def trained_parts(self) -> str:
        """What of a published model is trained, and what is not; "" where that needs no saying."""
        return ""

    def whole(self, params: Params, frozen: Mapping[str, Any]) -> Params:
        """The parameters as `rollout`, `loss` and `held_out` take them: with what of a network is frozen."""
        del frozen
        return params

    def start_like(self, params: Params) -> Params:
        """The part of the parameters that `init_from` replaces: all of them."""
        return params

    def with_start(self, loaded: Params, fresh: Callable[[str], Params]) -> Params:
        """All parameters, of which `loaded` replaces `start_like`; `fresh` makes another part by name."""
        del fresh
        return loaded

    def init_extra(self, params: Params) -> Any:
        """State beside the parameters that gradients do not touch (running statistics, `EMA`).

        Of a method with `independent_images` a loss may read it, and `after_update` alone may change it.
        """
        del params
        return {}

    def load_frozen(self) -> dict[str, Any]:
        """Frozen weights by role, as trees of host arrays."""
        return {}

    def frozen_shapes(self) -> dict[str, Any]:
        """Shapes of what `load_frozen` gives, without reading it."""
        return {}

    def raw_name(self, condition: Any) -> str:
        """What a picture calls a raw condition of the data."""
        return str(condition)

    def describe(self) -> dict[str, Any]:
        """What batches depend on that no weights of the run tell, such as digests of an encoder's files."""
        return {}

    def computed(self) -> dict[str, Any]:
        """Paths in the frozen weights that are computed and not read -> what they are computed of."""
        return {}

    @abc.abstractmethod
    def weights_of(self, params: Params, extra: Any) -> dict[str, Params]:
        """What is saved at the end: file name (without suffix) -> tree."""

    # --- a step -----------------------------------------------------------------------------------

    def prepare(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """A batch of the data pipeline as the step takes it; NumPy, on the host.

        Captions are no arrays of a device: a method that says nothing of them does without.
        """
        dtypes = {name: getattr(value, "dtype", np.dtype(object)) for name, value in batch.items()}
        return {name: value for name, value in batch.items() if dtypes[name].kind != "U"}

    def example_batch(self, rows: int) -> dict[str, Any]:
        """Shapes of a prepared batch of `rows`, without "index"."""
        side = self.config.data.image_size
        batch = {"condition": jax.ShapeDtypeStruct((rows,), jnp.int32)}
        if self.wants_images:
            batch["image"] = jax.ShapeDtypeStruct((rows, side, side, 3), jnp.float32)
        return batch

    def rollout(
        self,
        params: Params,
        frozen: Mapping[str, Any],
        batch: Mapping[str, Any],
        rng: PRNGKeyArray,
        step: Array,
    ) -> dict[str, Any]:
        """Experience that the updates of a step learn from, every leaf [B, ...]; compiled, no gradient."""
        del params, frozen, rng, step
        return dict(batch)

    def review(self, experience: Mapping[str, Any]) -> dict[str, Any]:
        """Adds to a rollout what is computed on the host, such as rewards.

        Args:
          experience: this process's rows, NumPy.

        Returns:
          What is added, every leaf with the same leading axis.
        """
        del experience
        return {}

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
        """Mean loss of a microbatch of experience, arrays for `summarize`, and the new extra state.

        `batch["index"]` holds the images' places in the whole batch; randomness derived from it
        makes a step independent of how the batch is cut up. (Dropout of activations is drawn for a
        microbatch as a whole, and does depend on the cut.)
        """

    def summarize(self, aux: Aux) -> Scalars:
        """Metrics of an update from the microbatches' arrays, each with a leading microbatch axis.

        Over several updates of a step they are averaged; where "max" or "min" is a word of the name, the
        extreme stays.
        """
        return {name: jnp.mean(value) for name, value in aux.items()}

    def after_update(
        self,
        params: Params,
        extra: Any,
        rng: PRNGKeyArray,
        step: Array,
        metrics: Mapping[str, Array],
    ) -> tuple[Params, Any]:
        """What happens to parameters and extra state outside the gradient, given `summarize`'s metrics."""
        del rng, step, metrics
        return params, extra

    def check_health(self, step: int, metrics: Mapping[str, float]) -> None:
        """Raises `HealthError` where a step's metrics say that training is broken.

        `NothingLearned` is forgiven until `patience` is at its end.
        """
        norm = metrics["grad_norm"]
        if not norm > 0.0 or norm == float("inf"):
            kind = NothingLearned if norm == 0.0 else HealthError
            raise kind(
                f"step {step}: gradient norm {norm}. Nothing can be learned from such a gradient; "
                "the last finite state is what was saved. Look at the loss, the learning rate and "
                "the data."
            )

    # --- judgement --------------------------------------------------------------------------------

    def narrowed(self, params: Params) -> Params:
        """The parameters for forward passes alone: see `Policy.narrowed`."""
        return params

    @property
    def precision(self) -> dict[str, Any]:
        """Dtypes of everything between parameters and a judgement, the same for all that is judged."""
        tokenizer = self.config.tokenizer
        return {"encoder": tokenizer.encoder_dtype, "decoder": tokenizer.decoder_dtype}

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

        `temperature` is that of sampling, for methods that sample.
        """

    @property
    def temperature(self) -> float:
        """That of sampling in training, where it samples."""
        return 1.0

    def sampled(self) -> SampledPolicy | None:
        """How to draw samples of what is trained; None for a method that has none."""
        return None

    def reconstruct(
        self, params: Params, frozen: Mapping[str, Any], images: Float[Array, "B H W 3"]
    ) -> Float[Array, "B H W 3"] | None:
        """D(Q(E(I))) as the run sees it, compiled by the caller; None for a method without images."""
        del params, frozen, images
        return None

    def memory(self, rows: int) -> Sequence[tuple[str, int, str]]:
        """(name, bytes, what) of a device's memory in a step beside parameters and what is kept of the
        loss for the backward pass, for `rows` images of a microbatch.
        """
        del rows
        return ()


def index_of(batch: Mapping[str, Any]) -> Int[np.ndarray, " B"]:
    """Places of a whole batch's rows."""
    return np.arange(len(jax.tree.leaves(dict(batch))[0]))


def mean_of(aux: Aux, *names: str) -> Scalars:
    """The mean of each named array."""
    return {name: jnp.mean(aux[name]) for name in names}


def tokenizer_source(config: TrainConfig) -> WeightsSource | None:
    """The tokenizer weights that a configuration names, if any."""
    init = config.init
    if not init.vq:
        return None
    return WeightsSource(
        init.vq, "vq", vq.NAME_RULES, vq.IGNORED_NAMES, config.tokenizer, init.verify
    )
