"""A generator that is ready to draw: a policy, a tokenizer, and who they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int, UInt8

from vapi_jax.common.images import to_uint8
from vapi_jax.generation.sampler import DEFAULTS, Sampler, decode, encode, in_batches
from vapi_jax.models.conditions import Condition, Label
from vapi_jax.models.pixels import PixelSpace
from vapi_jax.models.policy import Policy
from vapi_jax.parallel.sharding import host_array, shard_whole
from vapi_jax.weights.names import WeightsError


@dataclasses.dataclass(frozen=True, eq=False)
class Generator:
    """Everything that sampling needs, its arrays on the mesh.

    Attributes:
      policy: the autoregressive model.
      params: its parameters, laid out by `vapi_jax.parallel.sharding`.
      mesh: the devices.
      pixels: the tokenizer on them.
      frozen: {"tokenizer": its parameters}.
      image_size: side of the decoded square images, in pixels.
      class_names: by label; None where they are unknown or there are no classes.
      facts: JSON-able: which checkpoint, which architecture, SHA-256 of every file of weights.
      condition: what turns raw conditions into those that the policy takes.
      noted: what `Condition.describe` said of it in training; empty where nobody noted it.
    """

    policy: Policy
    params: Any
    mesh: Mesh
    pixels: PixelSpace
    frozen: Mapping[str, Any]
    image_size: int
    class_names: tuple[str, ...] | None
    facts: dict[str, Any]
    condition: Condition
    noted: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def changed(self, now: Mapping[str, Any]) -> str:
        """The files behind a condition that are not those of the training, by what `describe` says now."""
        for part in ("text_encoder", "tokenizer"):
            then, found = self.noted.get(part), now.get(part)
            if then and found and then != found:
                both = isinstance(then, dict) and isinstance(found, dict)
                names = (
                    [n for n in {**then, **found} if then.get(n) != found.get(n)]
                    if both
                    else [part]
                )
                return ", ".join(sorted(names))
        return ""

    def refuse_changed(self, now: Mapping[str, Any]) -> None:
        """Raises WeightsError where files behind the generator's own condition have changed."""
        if names := self.changed(now):
            raise WeightsError(
                f"the text encoder of {self.facts['path']} has changed since it was trained ({names}): put "
                "back what it was trained with, or name that with --text_encoder"
            )

    @property
    def num_classes(self) -> int | None:
        """How many labels there are; None for a generator of another condition."""
        return self.policy.condition.num_classes

    def sample(
        self,
        conditions: Sequence[Any] | None = None,
        *,
        per_condition: int = 1,
        count: int | None = None,
        seed: int = 0,
        cfg: float = 1.0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        batch: int = 64,
    ) -> UInt8[np.ndarray, "N H W 3"]:
        """Images, drawn as `python -m vapi_jax.sample` draws them.

        Args:
          conditions: labels, or whatever raw conditions the generator's kind prepares; labels in turn
            where none are given.
          per_condition: images of each, one after the other.
          count: how many in all, the conditions repeated as often as needed; None for all of them once.
          seed: image i depends on it, on i and on its condition alone.
          cfg: scale of classifier-free guidance; 1 is none.
          temperature, top_k, top_p: of the distribution that is drawn from; 0 and 1 filter nothing.
          batch: images at once.

        Raises:
          ValueError: guidance of a model without an unconditional embedding, a label that is no class, or
            nothing to draw.
        """
        if conditions is None:
            if self.num_classes is None:
                raise ValueError("a generator without classes has to be told its conditions")
            conditions = range(self.num_classes)
        rows = np.repeat(np.arange(len(conditions)), per_condition)
        rows = rows if count is None else np.resize(rows, count)
        if not len(rows):
            raise ValueError("there is nothing to draw: no conditions, or a count of 0")
        raw = np.asarray(conditions)[rows]
        if isinstance(self.condition, Label):  # JAX would take row -1, or NaN beyond the last one
            _check_labels(raw, self.condition.classes)
        if self.noted and raw.dtype.kind == "U":
            self.refuse_changed(self.condition.describe())
        prepared = self.condition.prepare(raw)
        asked = {"cfg_scale": cfg, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        size = min(batch, len(rows))
        sampler = Sampler(self.policy, self.pixels, self.frozen, size, {**DEFAULTS, **asked})
        drawn = sampler(
            self.params,
            lambda ids: jax.tree.map(lambda leaf: leaf[ids], prepared),
            in_batches(len(rows), size),
            seed,
        )
        return np.concatenate([part.images for part in drawn])

    def encode(self, images: UInt8[np.ndarray, "N H W 3"]) -> Int[np.ndarray, "N T"]:
        """Tokens of images of the generator's size."""
        floats = np.asarray(images, np.float32) / np.float32(127.5) - np.float32(1.0)
        return self._by_device(lambda batch: encode(self.pixels, self.frozen, batch), floats)

    def decode(self, tokens: Int[np.ndarray, "N T"]) -> UInt8[np.ndarray, "N H W 3"]:
        """Images of tokens."""
        tokens = np.asarray(tokens, np.int32)
        return to_uint8(self._by_device(lambda x: decode(self.pixels, self.frozen, x), tokens))

    def _by_device(self, function: Callable[[Array], Array], rows: np.ndarray) -> np.ndarray:
        """`function` of any number of rows, padded to the devices."""
        missing = -len(rows) % self.mesh.size
        padded = np.pad(rows, ((0, missing), *[(0, 0)] * (rows.ndim - 1)))
        return host_array(function(shard_whole(padded, self.mesh)))[: len(rows)]


def _check_labels(labels: np.ndarray, classes: int) -> None:
    if labels.dtype.kind not in "iu":
        raise ValueError(f"conditions: labels are whole numbers, not {labels.dtype}")
    if odd := sorted({int(label) for label in labels if not 0 <= label < classes}):
        raise ValueError(
            f"conditions: there is no class {', '.join(map(str, odd[:5]))}; give labels 0 to {classes - 1}"
        )
