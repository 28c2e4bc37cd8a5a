"""The contract of a condition: from a raw label, caption or prompt to what a policy takes.

A condition object holds no arrays. What it makes is a pytree with a leading batch axis on every leaf, which
callers pass along and gather rows of (`jax.tree.map(lambda x: x[rows], condition)`) without looking
inside. A policy names the kind that it takes; a recipe can put another in its place
(`config.condition`, a name of `CONDITIONS` or "module:Class"), which makes the same pytree from other
raw data.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vapi_jax.common.options import given

Tree = Any
"""A condition as a policy takes it: a pytree of arrays [B, ...]."""


@dataclasses.dataclass(frozen=True)
class Condition(abc.ABC):
    """What a generator is asked for.

    Attributes:
      droppable: whether the model has an unconditional embedding, for guidance and label dropout.
    """

    droppable: bool = given(True)

    @property
    def num_classes(self) -> int | None:
        """How many labels there are; None where conditions are no labels."""
        return None

    @abc.abstractmethod
    def example(self, batch: int) -> Tree:
        """A valid condition of this batch size, for initialisation and shape inference."""

    def prepare(self, raw: Any) -> Tree:
        """What a data source gives for B samples, as the policy takes it; NumPy, on the host."""
        return raw

    def name(self, raw: Any) -> str:
        """What a picture calls one raw condition where nobody knows a better name."""
        return str(raw)

    def unconditional(self, condition: Tree) -> Tree:
        """The other half of classifier-free guidance: same structure, shapes and dtypes.

        Raises:
          ValueError: where the model has no unconditional embedding.
        """
        if not self.droppable:
            raise ValueError(
                "class_dropout_prob is 0: this model has no unconditional embedding, so neither "
                "guidance nor dropping of conditions is possible"
            )
        return self._unconditional(condition)

    @abc.abstractmethod
    def _unconditional(self, condition: Tree) -> Tree:
        """`unconditional` of a model that has one."""


@dataclasses.dataclass(frozen=True)
class Label(Condition):
    """A class: Int[B], 0 .. classes - 1; `classes` itself stands for none."""

    classes: int = 1000

    @property
    def num_classes(self) -> int:
        return self.classes

    def example(self, batch: int) -> Int[Array, " B"]:
        return jnp.zeros((batch,), dtype=jnp.int32)

    def prepare(self, raw: Any) -> Int[np.ndarray, " B"]:
        return np.asarray(raw, np.int32)

    def name(self, raw: Any) -> str:
        return f"class {int(raw)}"

    def _unconditional(self, condition: Int[Array, " B"]) -> Int[Array, " B"]:
        return jnp.full_like(condition, self.classes)


@dataclasses.dataclass(frozen=True)
class Caption(Condition):
    """An encoded caption.

    A dict of features Float[B, P, W] (LEFT padded), mask Bool[B, P] (False = padding) and dropped Bool[B]
    (True = the unconditional embedding replaces the features, under the same mask).
    """

    length: int = 120  # P
    width: int = 2048  # W

    def example(self, batch: int) -> Tree:
        features = jnp.zeros((batch, self.length, self.width), dtype=jnp.float32)
        return text_condition(features, jnp.ones((batch, self.length), dtype=bool))

    def _unconditional(self, condition: Tree) -> Tree:
        return {**condition, "dropped": jnp.ones_like(condition["dropped"])}


def text_condition(features: Float[Array, "B P W"], mask: Array) -> Tree:
    """The condition of a `Caption` from its features and their mask [B, P] (bool or 0/1)."""
    mask = jnp.asarray(mask).astype(bool)
    dropped = jnp.zeros(mask.shape[:1], dtype=bool)
    return {"features": jnp.asarray(features), "mask": mask, "dropped": dropped}


@dataclasses.dataclass(frozen=True)
class Prompt(Condition):
    """Tokens of a prompt: a dict of tokens Int[B, P] and mask Bool[B, P], padded on either side."""

    pad_id: int = 100015

    def example(self, batch: int) -> Tree:
        tokens = jnp.zeros((batch, 2), dtype=jnp.int32)
        return {"tokens": tokens, "mask": jnp.ones_like(tokens, dtype=bool)}

    def _unconditional(self, condition: Tree) -> Tree:
        """All real prompt tokens but the first and the last become `pad_id`, and stay visible."""
        real = condition["mask"]
        count = jnp.cumsum(real.astype(jnp.int32), axis=1)
        inner = real & (count > 1) & (count < count[:, -1:])
        return {**condition, "tokens": jnp.where(inner, self.pad_id, condition["tokens"])}


CONDITIONS: dict[str, type[Condition]] = {"label": Label, "caption": Caption, "prompt": Prompt}


def drop(kind: Condition, keys: Array, condition: Tree, rate: float) -> Tree:
    """Makes each sample unconditional with probability `rate`, decided by its own key of `keys` [B]."""
    if rate <= 0:
        return condition
    dropped = jax.vmap(lambda key: jax.random.bernoulli(key, rate))(keys)

    def pick(without: Array, given: Array) -> Array:
        return jnp.where(dropped.reshape(-1, *[1] * (given.ndim - 1)), without, given)

    return jax.tree.map(pick, kind.unconditional(condition), condition)
