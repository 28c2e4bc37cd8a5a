"""Samples of what a method trains and real crops beside them, as features, batch by batch.

All images are rounded to uint8 before they are judged, samples, crops and reconstructions alike, and no
more than a batch or two of them is held.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int, UInt8

from vapi_jax.common.images import to_uint8
from vapi_jax.data import fixed_samples, labels_of
from vapi_jax.data.pipeline import make_source
from vapi_jax.evaluation.features import FeatureStream, stream_of
from vapi_jax.generation.sampler import Sampler, in_batches, most_at_once
from vapi_jax.methods import Method
from vapi_jax.methods.config import TrainConfig
from vapi_jax.models.conditions import Tree
from vapi_jax.parallel import compiler
from vapi_jax.parallel.sharding import (
    host_array,
    replicated,
    shard_whole,
    without_virtual_devices,
)

SEEN = "vgg_relu4_3"
"""Features of the network that the reward looks through."""


def judged_features(config: TrainConfig) -> tuple[str, str]:
    """Names of the table's features: `SEEN`, and those of a network that the reward has never seen."""
    return SEEN, config.eval.unseen


# Reference crops come from a seed of their own for each split, so that settings chosen against one
# set are never judged against the same.
_REFERENCE_SEED = {"train": 101, "val": 202, "test": 303}


def on_judging_devices(
    method: Method, frozen: Mapping[str, Any]
) -> tuple[Method, Mapping[str, Any]]:
    """A run's method and frozen weights where it is judged: on all devices, or on one virtual one."""
    mesh = without_virtual_devices(method.mesh)
    if mesh is method.mesh:
        return method, frozen
    return dataclasses.replace(method, mesh=mesh), jax.device_put(dict(frozen), replicated(mesh))


def even_batch(count: int, devices: int, most: int = 256) -> int:
    """About `most` samples at once, a multiple of the devices that divides `count` with little rest."""
    rounds = -(-count // most)
    return -(-count // (rounds * devices)) * devices


def judging_batch(method: Method, count: int, guided: bool = False) -> int:
    """How many of `count` samples are drawn and judged at once; `guided` if some are drawn with guidance."""
    found = method.sampled()
    assert found is not None, "a method that trains no generator has no samples"
    devices = method.mesh.size
    most = most_at_once(found.policy, guided, method.mesh.devices.flat[0])
    return even_batch(count, devices, min(256, devices * most))


def real_crops(
    config: TrainConfig, count: int, batch: int, number: int = 0
) -> Iterator[Float[np.ndarray, "N H W 3"]]:
    """Fresh real crops, set `number`, in [-1, 1] and batches; set 0 is the reference.

    Raises:
      DataError: the training split is smaller than `count`.
    """
    seed = 1000 * (number + 1) + _REFERENCE_SEED[config.eval.split]
    samples = fixed_samples(config.data, "train", count, seed, number=number)
    while part := list(itertools.islice(samples, batch)):
        yield np.stack([sample["image"] for sample in part])


def asked_of(config: TrainConfig, most: int) -> np.ndarray:
    """What samples are drawn of: all labels, or where the data have none, held-out captions.

    Those are of the first images of `eval.split`, at most so many.
    """
    if len(labels := labels_of(config.data)):
        return labels
    count = min(most, len(make_source(config.data, config.eval.split)))
    held = fixed_samples(config.data, config.eval.split, count, config.seed)
    return np.stack([sample["condition"] for sample in held])


def by_label(method: Method, labels: np.ndarray) -> Callable[[Int[np.ndarray, " B"]], Tree]:
    """Conditions of samples of these labels [N], or captions, as `Sampler` takes them."""
    raw = labels.astype(np.int32) if labels.dtype.kind in "iu" else labels
    return lambda ids: method.prepare({"condition": raw[ids]})["condition"]


def decoder_of(method: Method, params: Any) -> dict[str, Any] | None:
    """{"tokenizer": its parameters} of a method that trains it, on its devices; None for the frozen one."""
    found = method.sampled()
    if found is None or found.tokenizer is None:
        return None
    return {"tokenizer": jax.device_put(found.tokenizer(params), replicated(method.mesh))}


def sampler_of(
    method: Method, frozen: Mapping[str, Any], batch: int, settings: Mapping[str, Any] | None = None
) -> Sampler:
    """Draws from what a method trains; its parameters are the method's."""
    found = method.sampled()
    assert found is not None, "a method that trains no generator has no samples"
    return Sampler(found.policy, found.pixels, frozen, batch, settings)


@dataclasses.dataclass(frozen=True)
class Judged:
    """What is kept of a set of samples.

    Attributes:
      features: name -> features of all of them.
      entropy: mean of the distributions drawn from, in nats per token.
      images: the first of them.
    """

    features: dict[str, Float[np.ndarray, "N D"]]
    entropy: float
    images: UInt8[np.ndarray, "K H W 3"]


class SampleJudge:
    """Samples and real images as features, with programs that are compiled at the first call.

    Args:
      method: the run's.
      frozen: its frozen weights on the mesh.
      batch: images at once, a multiple of the devices.
      features: of `vapi_jax.evaluation.features.FEATURES`.
    """

    def __init__(
        self, method: Method, frozen: Mapping[str, Any], batch: int, features: Sequence[str]
    ):
        found = method.sampled()
        assert found is not None, "a method that trains no generator has no samples"
        self._params = lambda params: found.params(params, frozen)
        self.method, self.frozen, self.batch = method, frozen, batch
        self.sampler = sampler_of(method, frozen, batch)
        self._stream: FeatureStream = stream_of(features, method.mesh, batch)
        self._there_and_back = jax.jit(
            method.reconstruct, compiler_options=compiler.options(method.mesh)
        )

    @cached_property
    def _asked(self) -> np.ndarray:
        judged = self.method.config.eval
        return asked_of(self.method.config, max(judged.samples, judged.sampled))

    def with_settings(self, **settings: Any) -> SampleJudge:
        """The same judge of samples that are drawn otherwise, as `vapi_jax.models.sampling.generate` says."""
        other = copy.copy(self)
        other.sampler = sampler_of(self.method, self.frozen, self.batch, settings)
        return other

    def with_tokenizer(self, tokenizer: Any) -> SampleJudge:
        """The same judge of samples that another tokenizer decodes, its parameters in any layout."""
        other = copy.copy(self)
        other.frozen = {
            **self.frozen,
            "tokenizer": jax.device_put(tokenizer, replicated(self.method.mesh)),
        }
        return other.with_settings()

    def _decoder(self, params: Any) -> dict[str, Any] | None:
        return None if params is None else decoder_of(self.method, params)

    @property
    def names(self) -> tuple[str, ...]:
        """The features."""
        return self._stream.names

    def features(
        self, batches: Iterable[UInt8[np.ndarray, "B H W 3"]]
    ) -> dict[str, Float[np.ndarray, "N D"]]:
        """Features of all images."""
        return self._stream.whole(batches)

    def samples(
        self,
        params: Any,
        count: int,
        seed: int,
        temperature: float,
        shown: int = 0,
        guidance: float | None = None,
        see: Callable[[range, UInt8[np.ndarray, "B H W 3"]], None] = lambda samples, images: None,
    ) -> Judged:
        """Judges samples of all classes in turn, of which the first `shown` are kept as images.

        The same count and seed give the same uniforms. Every process of a run has to call it.

        Args:
          params: the method's.
          count: of samples.
          seed: of the samples.
          temperature, guidance: that they are drawn with; None is the guidance of the judge's settings.
          shown: images to keep.
          see: called with the numbers of a batch and its images.
        """
        conditions, kept, entropy = by_label(self.method, np.resize(self._asked, count)), [], 0.0
        batches = in_batches(count, self.batch)
        more = {} if guidance is None else {"cfg_scale": guidance}
        drawn = self.sampler(
            self._params(params),
            conditions,
            batches,
            seed,
            temperature,
            self._decoder(params),
            **more,
        )

        def images() -> Iterator[np.ndarray]:
            nonlocal entropy
            for batch in drawn:
                assert batch.entropies is not None
                entropy += batch.entropies.mean(axis=1, dtype=np.float64).sum()
                if batch.samples.start < max(shown, 1):
                    kept.append(batch.images)
                see(batch.samples, batch.images)
                yield batch.images

        features = self.features(images())
        return Judged(features, entropy / count, np.concatenate(kept)[:shown])

    def weights(self, params: Any) -> Any:
        """The copy of a method's parameters that is drawn from."""
        return self.sampler.weights(self._params(params))

    def entropies(self, weights: Any, count: int, seeds: Iterable[int]) -> Callable[[float], float]:
        """Temperature -> `Judged.entropy` of the samples of these seeds, which are not decoded.

        Each temperature is drawn once, from `weights`, which it keeps. Every process of a run has to call it.
        """
        conditions = by_label(self.method, np.resize(self._asked, count))
        keys = [self.sampler.key(seed) for seed in seeds]
        batches = in_batches(count, self.batch)

        @functools.cache
        def entropy(temperature: float) -> float:
            at, total = self.sampler.at(temperature), 0.0
            for key, batch in itertools.product(keys, batches):
                found = self.sampler.tokens(weights, conditions, batch, key, **at)[1]
                total += host_array(found)[: len(batch)].mean(axis=1, dtype=np.float64).sum()
            return float(total) / (count * len(keys))

        return entropy

    def real(self, count: int, number: int) -> Iterator[UInt8[np.ndarray, "B H W 3"]]:
        """Real crops, set `number`; set 0 is the reference."""
        return map(to_uint8, real_crops(self.method.config, count, self.batch, number))

    def reconstructed(
        self, count: int, number: int, params: Any = None
    ) -> Iterator[UInt8[np.ndarray, "B H W 3"]]:
        """D(Q(E(I))) of the same crops."""
        crops = real_crops(self.method.config, count, self.batch, number)
        return (to_uint8(self.reconstruct(part, params)) for part in crops)

    def reconstruct(
        self, images: Float[np.ndarray, "N H W 3"], params: Any = None
    ) -> Float[np.ndarray, "N H W 3"]:
        """D(Q(E(I))) of images in [-1, 1]; not clamped.

        Args:
          images: any number of them.
          params: the method's; only one that trains the tokenizer looks at them.
        """
        parts, decoder = [], self._decoder(params)
        for start in range(0, len(images), self.batch):
            part = images[start : start + self.batch]
            padded = np.pad(part, ((0, self.batch - len(part)), (0, 0), (0, 0), (0, 0)))
            decoded = self._there_and_back(
                decoder, self.frozen, shard_whole(padded, self.method.mesh)
            )
            parts.append(host_array(decoded)[: len(part)])
        return np.concatenate(parts)


def judge_of(method: Method, frozen: Mapping[str, Any]) -> SampleJudge:
    """What judges samples at the end of a run and, of about as many, in training: by the same programs.

    Compiling them again for another batch or fewer features takes longer than the rest of a small run's
    judgements. Where training judges less than half a batch, it has programs of its own.
    """
    judged = method.config.eval
    if judged.compare:
        batch = table_batch(method)
        if not judged.sampled_every or 2 * judged.sampled >= batch:
            return SampleJudge(method, frozen, batch, judged_features(method.config))
    return SampleJudge(method, frozen, judging_batch(method, judged.sampled), (SEEN,))


def table_batch(method: Method) -> int:
    """Of the table at the end of a run."""
    judged = method.config.eval
    return judging_batch(method, judged.samples, any(scale != 1.0 for scale in judged.cfg_scales))
