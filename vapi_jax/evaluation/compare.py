"""The table at the end of a run: the base, the base sharpened, the post-trained policy, controls.

Most of a gain in Fréchet distance can come from a sharper distribution alone, which a lower sampling
temperature gives without any training. So the table always holds the base at lower temperatures, one of
them chosen so that its sampling entropy equals the post-trained policy's.
"""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import jax
import numpy as np

from vapi_jax.config import TrainConfig
from vapi_jax.data import fixed_batch, num_classes
from vapi_jax.evaluation.features import FEATURES, extract_features
from vapi_jax.evaluation.frechet import frechet_distance, gaussian_statistics
from vapi_jax.loop import HeldOut
from vapi_jax.metrics import Progress
from vapi_jax.sampling import generate
from vapi_jax.sharding import host_array, replicated, shard_whole
from vapi_jax.tasks.generator import GeneratorTask

logger = logging.getLogger(__name__)

SEEN, UNSEEN = "vgg_relu4_3", "alex_conv5"
"""Features of the network that the reward looks through, and of one it has never seen."""

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


@dataclasses.dataclass
class Judge:
    """Samples policies and measures them against real crops, always on the same terms.

    Attributes:
      task: the run's task.
      frozen: its frozen weights on the mesh.
      held_out: teacher-forced metrics on the run's held-out images.
      batch: samples drawn at once; 0 for about 256, so that `eval.samples` divides with little rest.
    """

    task: GeneratorTask
    frozen: Mapping[str, Any]
    held_out: HeldOut
    batch: int = 0

    def __post_init__(self) -> None:
        samples, devices = self.task.config.eval.samples, self.task.mesh.size
        if not self.batch:
            rounds = -(-samples // 256)
            self.batch = -(-samples // (rounds * devices)) * devices
        self._whole = replicated(self.task.mesh)
        self._decode = jax.jit(self.task.pixels.decode)

    def _put(self, value: Any) -> jax.Array:
        return jax.device_put(value, self._whole)

    def real(self, number: int) -> np.ndarray:
        """Fresh real crops, set `number`; set 0 is the reference. float32 [N, H, W, 3]."""
        config = self.task.config
        seed = 1000 * (number + 1) + _REFERENCE_SEED[config.eval.split]
        return fixed_batch(config.data, "train", config.eval.samples, seed)["image"]

    @cached_property
    def _feature_params(self) -> dict[str, Any]:
        return {name: jax.device_put(FEATURES[name].load()) for name in (SEEN, UNSEEN)}

    @cached_property
    def _reference(self) -> dict[str, Any]:
        """Mean and covariance of the reference crops, in both networks."""
        features = self.features(self.real(0))
        return {name: gaussian_statistics(found) for name, found in features.items()}

    def features(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Features of images in both networks."""
        return {
            name: extract_features(name, images, params=params)
            for name, params in self._feature_params.items()
        }

    def distances(self, images: np.ndarray) -> dict[str, float]:
        """Fréchet distance of images to the reference crops, in both networks."""
        return {
            name: frechet_distance(*gaussian_statistics(features), *self._reference[name])
            for name, features in self.features(images).items()
        }

    def sample_labels(
        self, params: Any, labels: np.ndarray, seed: int, temperature: float = 1.0
    ) -> tuple[np.ndarray, np.ndarray]:
        """One free-running sample of each label; the same labels and seed give the same uniforms.

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
            batch = shard_whole({"condition": padded, "ids": ids}, self.task.mesh)
            tokens, entropy = generate(
                self.task.policy,
                params,
                batch["condition"],
                rng,
                temperature=self._put(np.float32(temperature)),
                sample_ids=batch["ids"],
                return_entropy=True,
            )
            images.append(host_array(self._decode(self.frozen, tokens))[: len(part)])
            entropies.append(host_array(entropy)[: len(part)])
        return np.clip(np.concatenate(images), -1.0, 1.0), np.concatenate(entropies)

    def sample(
        self, params: Any, count: int, seed: int, temperature: float
    ) -> tuple[np.ndarray, float]:
        """Samples of all classes in turn, and their mean entropy in nats per token."""
        labels = np.arange(count) % num_classes(self.task.config.data)
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

    def row(self, entry: Entry, tick: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """A row of the table, over `eval.seeds` sampling seeds."""
        config = self.task.config.eval
        found: dict[str, list[float]] = {SEEN: [], UNSEEN: []}
        entropies = []
        for seed in range(config.seeds):
            images, entropy = self.sample(entry.params, config.samples, seed, entry.temperature)
            entropies.append(entropy)
            for name, distance in self.distances(images).items():
                found[name].append(distance)
            tick()
        forced = self.held_out(entry.params, entry.temperature)
        return {
            "name": entry.name,
            "kind": entry.kind,
            "temperature": round(entry.temperature, 4),
            "reward": forced["reward"],
            "ce": forced["ce"],
            "entropy": float(np.mean(entropies)),
            "frechet": estimate(found[SEEN]),
            "frechet_unseen": estimate(found[UNSEEN]),
        }

    def real_row(self, name: str, kind: str, through_tokenizer: bool) -> dict[str, Any]:
        """Real crops, or their reconstructions, in place of samples: what a row can reach."""
        found: dict[str, list[float]] = {SEEN: [], UNSEEN: []}
        for seed in range(self.task.config.eval.seeds):
            images = self.real(seed + 1)
            if through_tokenizer:
                images = self.reconstruct(images)
            for feature, distance in self.distances(images).items():
                found[feature].append(distance)
        row = {"name": name, "kind": kind, "temperature": None}
        row |= {"reward": None, "ce": None, "entropy": None}
        return {**row, "frechet": estimate(found[SEEN]), "frechet_unseen": estimate(found[UNSEEN])}

    def reconstruct(self, images: np.ndarray) -> np.ndarray:
        """D(Q(E(I))) of any number of images, clamped to [-1, 1]."""
        there_and_back = jax.jit(
            lambda frozen, x: self.task.pixels.decode(frozen, self.task.pixels.encode(frozen, x))
        )
        out = []
        for start in range(0, len(images), self.batch):
            part = images[start : start + self.batch]
            padded = np.pad(part, ((0, self.batch - len(part)), (0, 0), (0, 0), (0, 0)))
            decoded = there_and_back(self.frozen, shard_whole(padded, self.task.mesh))
            out.append(host_array(decoded)[: len(part)])
        return np.clip(np.concatenate(out), -1.0, 1.0)


def estimate(values: Sequence[float]) -> dict[str, float | int | None]:
    """Mean, unbiased standard deviation (None for one value) and count."""
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "sd": sd, "n": len(values)}


def compare(
    judge: Judge, base: Any, tuned: Any, controls: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The rows of the table.

    Args:
      judge: measures on equal terms.
      base: parameters before post-training.
      tuned: and after.
      controls: name -> parameters of other trainings from the same base.
    """
    config: TrainConfig = judge.task.config
    seeds, temperatures = config.eval.seeds, config.eval.temperatures
    total = seeds * (len(temperatures) + 3 + len(controls))
    with Progress(total, "evaluation") as progress:
        done = 0

        def tick() -> None:
            nonlocal done
            done += 1
            progress.update(done, config.eval.samples)

        vapi_row = judge.row(Entry("VA-π, T=1", "vapi", tuned), tick)
        matched = judge.match_entropy(base, vapi_row["entropy"], seed=10_000)
        entries = [Entry("base, T=1", "base", base)]
        entries += [Entry(f"base, T={t:g}", "temperature", base, t) for t in temperatures]
        entries.append(Entry(f"base, T={matched:.3f}", "matched", base, matched))
        rows = [judge.row(entry, tick) for entry in entries]
        rows.append(vapi_row)
        rows += [judge.row(Entry(n, "control", p), tick) for n, p in controls.items()]
    rows.append(judge.real_row("tokenizer floor (real crops, reconstructed)", "floor", True))
    rows.append(judge.real_row("real crops against other real crops", "real", False))
    return rows
