"""The contract of a reward: what decoded samples are worth, one number a sample.

A reward is a frozen dataclass whose fields are its options. It holds no arrays: `load` gives its weights,
and every call takes them.

    @dataclasses.dataclass(frozen=True)
    class Sharpness(Reward):
        radius: Count = 1

        def __call__(self, weights, pixels, batch):
            return ...                             # [B, G], higher is better

A recipe names rewards in `config.rewards`: by a name of `vapi_jax.rewards.REWARDS`, or as
"module:attribute" for a class like this one or for a plain function (pixels, batch, **options) -> [B, G].
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vapi_jax.common.errors import ExpectedError
from vapi_jax.common.host_calls import on_host
from vapi_jax.common.options import given
from vapi_jax.models.vq import VQModel

Batch = Mapping[str, Any]
"""What is known of the images: "image" [B, H, W, 3] in [-1, 1] where there are any, "condition" as the
policy takes it, "samples" int [B, G, T], the tokens that were decoded, and "prompt", what the reward's
`prepare` made of the raw conditions, where it made anything."""

Rewards = Float[Array, "B G"]


class RewardError(ExpectedError, ValueError):
    """A reward that gives something else than a number for each sample."""


@dataclasses.dataclass(frozen=True)
class Reward(abc.ABC):
    """What samples are worth.

    Attributes:
      tokenizer: the run's, for rewards that look at tokens; set by the method.
    """

    shares: ClassVar[tuple[str, ...]] = ()
    """Networks of the run that it looks through beside its own, such as "tokenizer"."""

    wants_image: ClassVar[bool] = True
    """Whether it looks at batch["image"]; False lets methods that need no images do without."""

    differentiable: ClassVar[bool] = True
    """Whether it has a gradient in the pixels: not where it rounds them, looks at tokens or asks the host."""

    width: ClassVar[int] = 0
    """Channels of its widest map at full resolution, for estimates of memory."""

    has_inner: ClassVar[bool] = False
    """Whether it is minus a squared distance to the image, of which `inner` tells more."""

    tokenizer: VQModel | None = given()

    @property
    def least_side(self) -> int:
        """Side in pixels of the smallest images that it takes."""
        return 1

    def problems(self, side: int) -> list[str]:
        """Lines on options that cannot work with images of `side` pixels; nothing is read."""
        least = self.least_side
        return [f"wants images of at least {least} pixels, not {side}"] if side < least else []

    def load(self) -> Any:
        """Its frozen weights, a tree of host arrays.

        Raises:
          WeightsError: if they are not there or do not fit.
        """
        return {}

    def shapes(self) -> Any:
        """Shapes of what `load` gives, without reading it."""
        return {}

    def computed(self) -> dict[str, Any]:
        """Names in what `load` gives that it computes instead of reading -> what they are computed of.

        Their last bits may differ between devices, so that they tell nothing of the files.
        """
        return {}

    def origin(self) -> tuple[str, str] | None:
        """(where its weights are from, what vouches for them), after a look; None without any.

        Raises:
          WeightsError: as `load`, as far as can be told without reading all.
        """
        return None

    def prepare(self, raw: Any) -> Any:
        """What it needs of a batch's raw conditions (labels, captions) that the policy's own do not tell.

        On the host; every leaf [B, ...]. None for nothing. A call then finds it as batch["prompt"].
        """
        del raw

    def example(self, rows: int) -> Any:
        """Shapes of what `prepare` makes of `rows` conditions."""
        del rows

    @abc.abstractmethod
    def __call__(self, weights: Any, pixels: Float[Array, "B G H W 3"], batch: Batch) -> Rewards:
        """The reward of every sample, float32, higher is better; traced by JAX.

        Args:
          weights: from `load`; where it `shares` networks, {"own": those, name: network's}.
          pixels: decoded samples, float32, unclamped, about [-1, 1].
          batch: see `Batch`.
        """

    def inner(
        self, weights: Any, pixels: Float[Array, "B G H W 3"], batch: Batch, cells: int
    ) -> Float[Array, "B G G C"]:
        """<y_g - x, y_j - x> of samples and their image, in each of C = cells² cells of a grid.

        In the space whose squared distance is minus this reward, the mean over cells of the diagonal.
        """
        raise NotImplementedError(f"{type(self).__name__} is no distance to an image")


@dataclasses.dataclass(frozen=True)
class FunctionReward(Reward):
    """A user's function (pixels, batch, **options) -> [B, G] as a reward.

    Without `wants_image` it may get batches that bring none. With `on_host` it is called outside the compiled
    program, on NumPy arrays, once a device and chunk.
    """

    function: Callable[..., Any] = given()
    arguments: Mapping[str, Any] = given()
    on_host: bool = given(False)
    wants_image: bool = given(True)  # type: ignore[misc]

    @property
    def differentiable(self) -> bool:  # type: ignore[override]
        return not self.on_host

    def __call__(self, weights: Any, pixels: Float[Array, "B G H W 3"], batch: Batch) -> Rewards:
        arguments = dict(self.arguments or {})
        if not self.on_host:
            return jnp.asarray(self.function(pixels, batch, **arguments), jnp.float32)
        shape = pixels.shape[:2]

        def call(pixels: Any, batch: Any) -> np.ndarray:
            found = self.function(*jax.tree.map(np.asarray, (pixels, batch)), **arguments)
            found = np.asarray(found, np.float32)
            if found.shape != shape:
                raise RewardError(f"the reward has shape {found.shape}, not [B, G] = {shape}")
            return found

        return on_host(call, jax.ShapeDtypeStruct(shape, jnp.float32), pixels, dict(batch))
