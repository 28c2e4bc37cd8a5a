"""The table at the end of a run: the base, the base sharpened, the post-trained policy, controls.

Most of a gain in Fréchet distance can come from a sharper distribution alone, which a lower sampling
temperature gives without any training. So the table always holds the base at lower temperatures, one of
them chosen so that its sampling entropy equals the post-trained policy's.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import jax
import numpy as np

from vapi_jax.common.progress import Progress
from vapi_jax.data import fixed_batch, num_classes
from vapi_jax.evaluation.features import FEATURES, extract_features
from vapi_jax.evaluation.frechet import frechet_distance, gaussian_statistics
from vapi_jax.evaluation.held_out import HeldOut
from vapi_jax.methods import Method
from vapi_jax.methods.config import TrainConfig
from vapi_jax.models.sampling import generate
from vapi_jax.parallel import compiler
from vapi_jax.parallel.sharding import host_array, replicate, shard_whole

logger = logging.getLogger(__name__)

SEEN, UNSEEN = "vgg_relu4_3", "alex_conv5"
"""Features of the network that the reward looks through, and of one it has never seen."""

REAL, BASE, TUNED = "real crops", "base", "post-trained"
"""What pictures call the three sets of images."""

# Reference crops come from a seed of their own for each split, so that settings chosen against one
# set are never judged against the same.
_REFERENCE_SEED = {"train": 101, "val": 202, "test": 303}


@dataclasses.dataclass(frozen=True)
class Entry:
    """A row to fill: who samples, and how sharply."""

    name: str
    kind: str  # "base" | "temperature" | "matched" | "vapi" | "control"
    params: Any
    temperature: float = 1.0


def real_crops(config: TrainConfig, count: int, number: int = 0) -> np.ndarray:
    """Fresh real crops, set `number`; set 0 is the reference. float32 [N, H, W, 3] in [-1, 1].

    Raises:
      DataError: the training split is smaller than `count`.
    """
    seed = 1000 * (number + 1) + _REFERENCE_SEED[config.eval.split]
    return fixed_batch(config.data, "train", count, seed)["image"]


class Sampler:
    """Free-running samples on the mesh, in batches of one size so that one program is compiled.

    Args:
      method: the run's.
      frozen: its frozen weights on the mesh.
      batch: samples drawn at once, a multiple of the devices.
    """

    def __init__(self, method: Method, frozen: Mapping[str, Any], batch: int):
        found = method.sampled()
        assert found is not None, "a method that trains no generator has no samples"
        self.method, self.frozen, self.batch, self._found = method, frozen, batch, found
        self._decode = jax.jit(found.pixels.decode, compiler_options=compiler.options(method.mesh))

    def _put(self, value: Any) -> jax.Array:
        return replicate(value, self.method.mesh)

    def __call__(
        self, params: Any, labels: np.ndarray, seed: int, temperature: float = 1.0
    ) -> tuple[np.ndarray, np.ndarray]:
        """One sample of each label; the same labels and seed give the same uniforms.

        Returns:
          Images float32 [N, H, W, 3] in [-1, 1], and the entropies [N, T] in nats of the
          distributions that were drawn from, temperature included.
        """
        images, entropies = [], []
        rng = self._put(jax.random.key(seed))
        for start in range(0, len(labels), self.batch):
            part = labels[start : start + self.batch].astype(np.int32)
            padded = np.pad(part, (0, self.batch - len(part)))
            ids = np.arange(start, start + self.batch, dtype=np.int32)
            batch = shard_whole(
                {**self.method.prepare({"condition": padded}), "ids": ids}, self.method.mesh
            )
            tokens, entropy = generate(
                self._found.policy,
                self._found.params(params),
                batch["condition"],
                rng,
                temperature=self._put(np.float32(temperature)),
                sample_ids=batch["ids"],
                return_entropy=True,
            )
            images.append(host_array(self._decode(self.frozen, tokens))[: len(part)])
            entropies.append(host_array(entropy)[: len(part)])
        return np.clip(np.concatenate(images), -1.0, 1.0), np.concatenate(entropies)


def even_batch(count: int, devices: int, most: int = 256) -> int:
    """About `most` samples at once, a multiple of the devices that divides `count` with little rest."""
    rounds = -(-count // most)
    return -(-count // (rounds * devices)) * devices


@dataclasses.dataclass
class Judge:
    """Samples policies and measures them against real crops, always on the same terms.

    Attributes:
      method: the run's.
      frozen: its frozen weights on the mesh.
      held_out: teacher-forced metrics on the run's held-out images.
      batch: samples drawn at once; 0 for about 256, so that `eval.samples` divides with little rest.
    """

    method: Method
    frozen: Mapping[str, Any]
    held_out: HeldOut
    batch: int = 0

    def __post_init__(self) -> None:
        samples, devices = self.method.config.eval.samples, self.method.mesh.size
        self.batch = self.batch or even_batch(samples, devices)
        self.sample_labels = Sampler(self.method, self.frozen, self.batch)

    def real(self, number: int) -> np.ndarray:
        """As many real crops as `eval.samples`, set `number`; set 0 is the reference."""
        config = self.method.config
        return real_crops(config, config.eval.samples, number)

    @cached_property
    def _feature_params(self) -> dict[str, Any]:
        return {name: jax.device_put(FEATURES[name].load()) for name in (SEEN, UNSEEN)}

    @cached_property
    def reference(self) -> dict[str, np.ndarray]:
        """Features of the reference crops, in both networks."""
        return self.features(self.real(0))

    @cached_property
    def _reference_statistics(self) -> dict[str, Any]:
        return {name: gaussian_statistics(found) for name, found in self.reference.items()}

    def features(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Features of images in both networks."""
        return {
            name: extract_features(name, images, params=params)
            for name, params in self._feature_params.items()
        }

    def distances(self, features: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Fréchet distance of features to the reference crops', in both networks."""
        return {
            name: frechet_distance(*gaussian_statistics(found), *self._reference_statistics[name])
            for name, found in features.items()
        }

    def sample(
        self, params: Any, count: int, seed: int, temperature: float
    ) -> tuple[np.ndarray, float]:
        """Samples of all classes in turn, and their mean entropy in nats per token."""
        labels = np.arange(count) % num_classes(self.method.config.data)
        images, entropies = self.sample_labels(params, labels, seed, temperature)
        return images, float(entropies.mean())

    def match_entropy(self, params: Any, target: float, seed: int) -> float:
        """The temperature in [0.5, 1] at which the policy samples with the target entropy.

        Bisection on one fixed set of uniforms, to 0.005 nats or 8 halvings; 1.0 where the policy at
        temperature 1 is already sharper than the target.
        """
        low, high = 0.5, 1.0
        if self.sample(params, self.batch, seed, high)[1] <= target:
            return high
        for _ in range(8):
            middle = 0.5 * (low + high)
            entropy = self.sample(params, self.batch, seed, middle)[1]
            if abs(entropy - target) < 0.005:
                return middle
            low, high = (middle, high) if entropy < target else (low, middle)
        return 0.5 * (low + high)

    def row(
        self, entry: Entry, tick: Callable[[], None] = lambda: None
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """A row of the table, over `eval.seeds` sampling seeds, and the features of the first seed."""
        config = self.method.config.eval
        first: dict[str, np.ndarray] = {}
        found: dict[str, list[float]] = {SEEN: [], UNSEEN: []}
        entropies = []
        for seed in range(config.seeds):
            images, entropy = self.sample(entry.params, config.samples, seed, entry.temperature)
            entropies.append(entropy)
            features = self.features(images)
            first = first or features
            for name, distance in self.distances(features).items():
                found[name].append(distance)
            tick()
        forced = self.held_out(entry.params, entry.temperature)
        row = {
            "name": entry.name,
            "kind": entry.kind,
            "temperature": round(entry.temperature, 4),
            "reward": forced["reward"],
            "ce": forced["ce"],
            "entropy": float(np.mean(entropies)),
            "frechet": estimate(found[SEEN]),
            "frechet_unseen": estimate(found[UNSEEN]),
        }
        return row, first

    def real_row(self, name: str, kind: str, through_tokenizer: bool) -> dict[str, Any]:
        """Real crops, or their reconstructions, in place of samples: what a row can reach."""
        found: dict[str, list[float]] = {SEEN: [], UNSEEN: []}
        for seed in range(self.method.config.eval.seeds):
            images = self.real(seed + 1)
            if through_tokenizer:
                images = self.reconstruct(images)
            for feature, distance in self.distances(self.features(images)).items():
                found[feature].append(distance)
        row = {"name": name, "kind": kind, "temperature": None}
        row |= {"reward": None, "ce": None, "entropy": None}
        return {**row, "frechet": estimate(found[SEEN]), "frechet_unseen": estimate(found[UNSEEN])}

    def reconstruct(self, images: np.ndarray) -> np.ndarray:
        """D(Q(E(I))) of any number of images, clamped to [-1, 1]."""
        there_and_back = jax.jit(
            partial(self.method.reconstruct, None),
            compiler_options=compiler.options(self.method.mesh),
        )
        out = []
        for start in range(0, len(images), self.batch):
            part = images[start : start + self.batch]
            padded = np.pad(part, ((0, self.batch - len(part)), (0, 0), (0, 0), (0, 0)))
            decoded = there_and_back(self.frozen, shard_whole(padded, self.method.mesh))
            out.append(host_array(decoded)[: len(part)])
        return np.clip(np.concatenate(out), -1.0, 1.0)


def estimate(values: Sequence[float]) -> dict[str, float | int | None]:
    """Mean, unbiased standard deviation (None for one value) and count."""
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "sd": sd, "n": len(values)}


def compare(
    judge: Judge, base: Any, tuned: Any, controls: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], dict[str, dict[str, np.ndarray]]]:
    """The rows of the table, and the features behind three of them.

    Args:
      judge: measures on equal terms.
      base: parameters before post-training.
      tuned: and after.
      controls: name -> parameters of other trainings from the same base.

    Returns:
      The rows; and for the networks `SEEN` and `UNSEEN` label -> features of the reference crops and
      of the first samples of base and post-trained policy, float32 [`eval.samples`, D].
    """
    config: TrainConfig = judge.method.config
    seeds, temperatures = config.eval.seeds, config.eval.temperatures
    total = seeds * (len(temperatures) + 3 + len(controls))
    with Progress(total, "evaluation") as progress:
        done = 0

        def tick() -> None:
            nonlocal done
            done += 1
            progress.update(done, config.eval.samples)

        vapi_row, vapi_features = judge.row(Entry("VA-π, T=1", "vapi", tuned), tick)
        matched = judge.match_entropy(base, vapi_row["entropy"], seed=10_000)
        base_row, base_features = judge.row(Entry("base, T=1", "base", base), tick)
        entries = [Entry(f"base, T={t:g}", "temperature", base, t) for t in temperatures]
        entries.append(Entry(f"base, T={matched:.3f}", "matched", base, matched))
        rows = [base_row, *(judge.row(entry, tick)[0] for entry in entries), vapi_row]
        rows += [judge.row(Entry(n, "control", p), tick)[0] for n, p in controls.items()]
    rows.append(judge.real_row("tokenizer floor (real crops, reconstructed)", "floor", True))
    rows.append(judge.real_row("real crops against other real crops", "real", False))
    sets = {REAL: judge.reference, BASE: base_features, TUNED: vapi_features}
    features = {
        name: {label: found[name] for label, found in sets.items()} for name in (SEEN, UNSEEN)
    }
    return rows, features
