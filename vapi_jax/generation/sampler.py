"""The one way from a policy's parameters to images: of the commands, of judgement and of a run's pictures.

A batch is drawn, decoded and handed on as uint8 while the devices draw the next one. What is drawn from
is a whole copy of the parameters on every device, its matrices in the compute dtype: with parameters as
training splits them, every token would gather them once more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from vapi_jax.common.errors import ExpectedError
from vapi_jax.common.images import to_uint8
from vapi_jax.models import sampling
from vapi_jax.models.conditions import Tree
from vapi_jax.models.pixels import PixelSpace
from vapi_jax.models.policy import Params, Policy
from vapi_jax.models.resize import bicubic_torch
from vapi_jax.parallel import compiler
from vapi_jax.parallel.sharding import host_array, replicate, shard_whole, whole_copy
from vapi_jax.parallel.targets import memory_of


class BrokenSamplesError(ExpectedError, ValueError):
    """Samples that are no images."""


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A batch of samples.

    Attributes:
      samples: their numbers.
      images: one of each.
      entropies: in nats, of the distributions that their tokens were drawn from, temperature, filters
        and guidance included; None where nobody asked.
    """

    samples: range
    images: UInt8[np.ndarray, "N H W 3"]
    entropies: Float[np.ndarray, "N T"] | None


DEFAULTS: Mapping[str, Any] = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "greedy": False,
    "cfg_scale": 1.0,
    "cfg_schedule": "constant",
    "cfg_interval": -1,
    "cfg_power": 1.0,
}
"""Settings of `sampling.generate` where nothing is asked for."""


def encode(
    pixels: PixelSpace, frozen: Mapping[str, Any], images: Float[Array, "B H W 3"]
) -> Int[Array, "B T"]:
    """Tokens of images, compiled; B is a multiple of the device count."""
    options = compiler.options(frozen)
    return jax.jit(_encode, static_argnums=0, compiler_options=options)(pixels, frozen, images)


def _encode(pixels: PixelSpace, frozen: Mapping[str, Any], images: Array) -> Array:
    return pixels.encode(frozen, images)


def decode(
    pixels: PixelSpace, frozen: Mapping[str, Any], tokens: Int[Array, "B T"]
) -> Float[Array, "B H W 3"]:
    """Images of tokens, unclamped, compiled; B is a multiple of the device count."""
    options = compiler.options(frozen)
    return jax.jit(_decode, static_argnums=0, compiler_options=options)(pixels, frozen, tokens)


# Hashable, so that all samplers with the same tokenizer share a compiled program.
def _decode(pixels: PixelSpace, frozen: Mapping[str, Any], tokens: Array) -> Array:
    return pixels.decode(frozen, tokens)


CACHE_BYTES = 12 * 2**30
"""Of keys and values that a device holds while it draws, or a quarter of its memory where that is less; as
buffers grow, for a moment nearly twice."""


def most_at_once(policy: Policy, guided: bool, device: jax.Device) -> int:
    """How many samples' keys and values fit a device; a guided sample has two rows of them."""
    most = min(CACHE_BYTES, (memory_of(device) or 4 * CACHE_BYTES) // 4)
    return max(1, most // max(1, _row_bytes(policy) * (1 + guided)))


@lru_cache(maxsize=8)  # every sampler asks, and tracing takes a second
def _row_bytes(policy: Policy) -> int:
    """Keys and values of a row."""

    def cache(params: Params) -> Any:
        cached = policy.prefill(policy.unstacked(params), policy.condition.longest(1))[1]
        return policy.with_room(cached, policy.context_length)

    rows = jax.eval_shape(cache, jax.eval_shape(policy.init, jax.random.key(0)))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(rows))


def in_batches(count: int, batch: int) -> list[range]:
    """Samples 0 .. count - 1, a batch at a time."""
    return [range(start, min(start + batch, count)) for start in range(0, count, batch)]


class Sampler:
    """Draws samples in batches of one shape, so that one program serves all.

    Sample i depends on the seed, i and its condition alone.

    Args:
      policy: what is drawn from.
      pixels: from its tokens to images, on the devices that draw.
      frozen: {"tokenizer": its parameters}, on those devices; empty where every call brings them.
      batch: samples at once; rounded up to the devices, which changes no sample.
      settings: of `sampling.generate`; by default neither filters nor guidance, at temperature 1.
      side: of the images in pixels, resized where they are decoded at another; 0 for as decoded.
      numbers: what the keys of samples are made of beside the seed, uint32; by default i.
    """

    def __init__(
        self,
        policy: Policy,
        pixels: PixelSpace,
        frozen: Mapping[str, Any],
        batch: int,
        settings: Mapping[str, Any] | None = None,
        side: int = 0,
        numbers: Callable[[Int[np.ndarray, " N"]], Int[np.ndarray, " N"]] = lambda samples: samples,
    ):
        assert pixels.mesh is not None, "a sampler draws on devices of its own"
        self._policy, self._pixels, self._mesh = policy, pixels, pixels.mesh
        self._tokenizer = {name: frozen[name] for name in frozen if name == "tokenizer"}
        self._settings, self._side, self._numbers = dict(settings or {}), side, numbers
        # Kept, or they would be compiled at every call.
        self._narrowed, self._unstacked = jax.jit(policy.narrowed), jax.jit(policy.unstacked)
        self.rows = -(-batch // self._mesh.size) * self._mesh.size

    def weights(self, params: Params) -> Params:
        """The copy of the parameters that is drawn from."""
        return self._unstacked(whole_copy(params, self._mesh, self._narrowed))

    def tokens(
        self,
        weights: Params,
        conditions: Callable[[Int[np.ndarray, " N"]], Tree],
        samples: range,
        rng: PRNGKeyArray,
        **settings: Any,
    ) -> Any:
        """What `sampling.generate` gives for these samples, on the devices; padding follows.

        Args:
          weights: from `weights`.
          conditions: of the samples of these numbers, as the policy takes them; NumPy.
          samples: at most `rows`.
          rng: of the seed, on every device.
          settings: more than, or others than, those of all batches.
        """
        ids = np.arange(samples.start, samples.start + self.rows, dtype=np.uint32)
        given = np.minimum(ids, samples[-1])  # padding repeats the last sample's condition
        batch = shard_whole({"condition": conditions(given), "ids": self._numbers(ids)}, self._mesh)
        return sampling.generate(
            self._policy,
            weights,
            batch["condition"],
            rng,
            sample_ids=batch["ids"],
            **{**self._settings, **settings},
        )

    def images(
        self, tokens: Int[Array, "B T"], frozen: Mapping[str, Any] | None = None
    ) -> Float[Array, "B H W 3"]:
        """Their images, unclamped, still on the devices; by another tokenizer where `frozen` brings one."""
        images = decode(self._pixels, self._tokenizer if frozen is None else frozen, tokens)
        if self._side in (0, images.shape[1]):
            return images
        # A program of its own, so that no rounding differs from the published protocol's function.
        return bicubic_torch(images, self._side, self._side)

    def key(self, seed: int) -> PRNGKeyArray:
        """The rng of a seed."""
        return replicate(jax.random.key(seed), self._mesh)

    def at(self, temperature: float) -> dict[str, Any]:
        """Settings for `tokens`: a temperature, and the entropies beside the tokens.

        Another value compiles nothing anew.
        """
        return {
            "temperature": replicate(np.float32(temperature), self._mesh),
            "return_entropy": True,
        }

    def __call__(
        self,
        params: Params,
        conditions: Callable[[Int[np.ndarray, " N"]], Tree],
        batches: Iterable[range],
        seed: int,
        temperature: float | None = None,
        frozen: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> Iterator[Drawn]:
        """Samples, batch by batch; the next one is drawn while the caller works on this one.

        Args:
          params: in any layout.
          conditions: see `tokens`.
          batches: numbers of samples, at most `rows` each.
          seed: of the samples.
          temperature: see `at`; None is the settings', without entropies.
          frozen: {"tokenizer": its parameters} in the place of the sampler's.
          more: settings than, or other than, those of all batches.

        Raises:
          BrokenSamplesError: for values that are not finite.
        """
        weights, rng = self.weights(params), self.key(seed)
        settings = {**more, **({} if temperature is None else self.at(temperature))}
        ahead: tuple[range, Any, Any] | None = None
        for samples in batches:
            found = self.tokens(weights, conditions, samples, rng, **settings)
            tokens, entropies = found if temperature is not None else (found, None)
            running = samples, self.images(tokens, frozen), entropies
            if ahead is not None:
                yield self._fetch(*ahead)
            ahead = running
        if ahead is not None:
            yield self._fetch(*ahead)

    def _fetch(self, samples: range, images: Array, entropies: Array | None) -> Drawn:
        count = len(samples)
        try:
            pixels = to_uint8(host_array(images)[:count])
        except ValueError as error:
            raise BrokenSamplesError(
                f"samples {samples[0]} to {samples[-1]} hold NaN or infinite values: the weights are "
                "broken, or the compute dtype is too narrow for them"
            ) from error
        return Drawn(samples, pixels, None if entropies is None else host_array(entropies)[:count])
