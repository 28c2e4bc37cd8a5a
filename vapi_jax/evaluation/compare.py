"""The table at the end of a run: the base, the base sharpened, the post-trained policy, controls.

Most of a gain in Fréchet distance can come from a sharper distribution alone, which a lower sampling
temperature gives without any training. So the table always holds the base at lower temperatures, one of
them chosen so that its sampling entropy equals the post-trained policy's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np

from vapi_jax.common.images import to_uint8
from vapi_jax.common.progress import ProgressBar
from vapi_jax.evaluation.frechet import frechet_distance, gaussian_statistics
from vapi_jax.evaluation.geneval_files import Image
from vapi_jax.evaluation.held_out import HeldOut
from vapi_jax.evaluation.kernel_distance import unbiased_mmd2
from vapi_jax.evaluation.samples import SampleJudge, judged_features
from vapi_jax.evaluation.scene_scores import scene_judge
from vapi_jax.methods import Method
from vapi_jax.methods.config import TrainConfig

REAL, BASE, TUNED = "real crops", "base", "post-trained"
"""What pictures call the three sets of images."""

_STEPS = 20  # of temperature, to 1, by which entropies are matched


@dataclasses.dataclass(frozen=True)
class Entry:
    """A row to fill: who samples, and how sharply."""

    name: str
    kind: str  # "base" | "temperature" | "guided" | "matched" | "vapi" | "control"
    params: Any
    temperature: float = 1.0
    guidance: float = 1.0
    held_out: Mapping[str, float] | None = None  # its held-out metrics, where they are known


@dataclasses.dataclass
class Judge:
    """Samples policies and measures them against real crops, always on the same terms.

    Attributes:
      method: the run's.
      held_out: teacher-forced metrics on the run's held-out images.
      judge: of samples, in the `judged_features`.
    """

    method: Method
    held_out: HeldOut
    judge: SampleJudge

    def __post_init__(self) -> None:
        self._samples = self.method.config.eval.samples
        self._seen, self._unseen = judged_features(self.method.config)
        self._scenes = scene_judge(self.method.config)
        self._verdicts: dict[str, list[Image]] = {}

    @cached_property
    def reference(self) -> dict[str, np.ndarray]:
        """Features of the reference crops, in both networks."""
        return self.judge.features(self.judge.real(self._samples, 0))

    @cached_property
    def _reference_statistics(self) -> dict[str, Any]:
        return {name: self._statistics(found) for name, found in self.reference.items()}

    def _statistics(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        singular = self.method.config.eval.allow_singular
        return gaussian_statistics(features, allow_singular=singular)

    def distances(self, features: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Fréchet distance of features to the reference crops' in both networks, kernel distance in the
        one that the reward has not seen."""
        own, real = (found[self._unseen].astype(np.float64) for found in (features, self.reference))
        found = {
            key: frechet_distance(
                *self._statistics(features[name]), *self._reference_statistics[name]
            )
            for key, name in (("frechet", self._seen), ("frechet_unseen", self._unseen))
        }
        return {**found, "kernel_unseen": unbiased_mmd2(own, real)[0]}

    def row(
        self, entry: Entry, tick: Callable[[], None] = lambda: None
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """A row of the table, over `eval.seeds` sampling seeds, and the features of the first seed."""
        config = self.method.config.eval
        first: dict[str, np.ndarray] = {}
        found, entropies = [], []
        verdicts: list[Image] = []
        for seed in range(config.seeds):

            def see(samples: range, images: np.ndarray, turn: int = seed) -> None:
                if self._scenes:
                    verdicts.extend(self._scenes.judge(samples, images, turn))

            drawn = self.judge.samples(
                entry.params, self._samples, seed, entry.temperature, 0, entry.guidance, see
            )
            entropies.append(drawn.entropy)
            first = first or drawn.features
            found.append(self.distances(drawn.features))
            tick()
        forced: Mapping[str, float] = {}  # Teacher-forced numbers know no guidance.
        if entry.guidance == 1.0:
            forced = entry.held_out or self.held_out(entry.params, entry.temperature)
        row = {
            "name": entry.name,
            "kind": entry.kind,
            "temperature": round(entry.temperature, 4),
            "guidance": entry.guidance,
            "reward": forced.get("reward"),
            "ce": forced.get("ce"),
            "entropy": float(np.mean(entropies)),
            **_estimates(found),
        }
        return {**row, **self._scored(entry.kind, verdicts)}, first

    def _scored(self, kind: str, verdicts: list[Image]) -> dict[str, Any]:
        """The scene scores of a row, whose verdicts are kept by its kind; nothing without scenes."""
        if not self._scenes:
            return {}
        self._verdicts[kind] = verdicts
        return {"scenes": self._scenes.scores(verdicts)}

    def scene_changes(self) -> dict[str, Any]:
        """Scene scores of the post-trained policy less those of the rows that it is held against."""
        if not self._scenes:
            return {}
        tuned = self._verdicts["vapi"]
        others = {kind: self._verdicts[kind] for kind in ("base", "matched")}
        return {kind: self._scenes.change(tuned, found) for kind, found in others.items()}

    def real_row(
        self, name: str, kind: str, tick: Callable[[], None], through: Any = None
    ) -> dict[str, Any]:
        """Real crops in place of samples, or their reconstructions by the tokenizer that belongs to
        parameters of the method, `through`: what a row can reach. `tick` is called after each seed."""
        images = self.judge.real
        if through is not None:
            images = partial(self.judge.reconstructed, params=through)
        found = []
        for seed in range(self.method.config.eval.seeds):
            found.append(self.distances(self.judge.features(images(self._samples, seed + 1))))
            tick()
        row = {"name": name, "kind": kind, "temperature": None, "guidance": None}
        row |= {"reward": None, "ce": None, "entropy": None}
        verdicts: list[Image] = []
        if self._scenes:
            for numbers, drawn in self._scenes.drawn(self.judge.batch):
                seen = drawn if through is None else self.judge.reconstruct(drawn, through)
                verdicts += self._scenes.judge(numbers, to_uint8(seen), 0)
        return {**row, **_estimates(found), **self._scored(kind, verdicts)}


def match_entropy(entropy_at: Callable[[float], float], target: float, at: float = 1.0) -> float:
    """The temperature between at / 2 and 3/2 at, at which a policy samples with the target entropy.

    On a straight line between two multiples of `at` / 20 whose entropies enclose the target, so that the same
    few temperatures serve for many targets; a bound where none in between has it.

    Args:
      entropy_at: temperature -> entropy of the very samples that are judged, or of as many.
      target: in nats per token, of the same uniforms.
      at: what the target was drawn at.
    """
    here = entropy_at(at)
    way = 1 if target > here else -1
    for step in range(1, _STEPS // 2 + 1):
        last, there = here, at * (1 + way * step / _STEPS)
        here = entropy_at(there)
        if way * (here - target) >= 0:
            share = (target - last) / (here - last) if here != last else 0.0
            return at * (1 + way * (step - 1 + share) / _STEPS)
    return there


def estimate(values: Sequence[float]) -> dict[str, Any]:
    """Mean, unbiased standard deviation (None for one value), count, and the values, a seed each."""
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "sd": sd, "n": len(values), "values": [*values]}


def _estimates(found: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    return {name: estimate([one[name] for one in found]) for name in found[0]}


def _matched(judge: Judge, base: Any, target: float, drawn: Mapping[float, float]) -> float:
    """`match_entropy` of the base; what was `drawn` for rows need not be drawn again."""
    config = judge.method.config.eval
    weights = judge.judge.weights(base)
    others = judge.judge.entropies(weights, config.samples, range(config.seeds))
    return match_entropy(lambda t: drawn[t] if t in drawn else others(t), target)


def compare(
    judge: Judge,
    base: Any,
    tuned: Any,
    controls: Mapping[str, Callable[[], Any]],
    known: Mapping[str, Mapping[str, float]] | None = None,
) -> tuple[list[dict[str, Any]], dict[str, dict[str, np.ndarray]]]:
    """The rows of the table, and the features behind three of them.

    Args:
      judge: measures on equal terms.
      base: parameters before post-training.
      tuned: and after.
      controls: name -> what trains from the same base otherwise, and gives its parameters. One at a time,
        so that no two are on the devices.
      known: held-out metrics at temperature 1 of `BASE` and `TUNED`, where the run has them already.

    Returns:
      The rows; and for each of the `judged_features` label -> features of the reference crops and
      of the first samples of base and post-trained policy, float32 [`eval.samples`, D].
    """
    config: TrainConfig = judge.method.config
    seeds, temperatures = config.eval.seeds, config.eval.temperatures
    scales = config.eval.cfg_scales
    total = seeds * (len(temperatures) + len(scales) + 3)
    with ProgressBar(total, "evaluation") as progress:
        done = 0

        def tick() -> None:
            nonlocal done
            done += 1
            progress.update(done, config.eval.samples)

        known = known or {}
        vapi = Entry(f"{judge.method.label}, T=1", "vapi", tuned, held_out=known.get(TUNED))
        vapi_row, vapi_features = judge.row(vapi, tick)
        at_one = Entry("base, T=1", "base", base, held_out=known.get(BASE))
        base_row, base_features = judge.row(at_one, tick)
        entries = [Entry(f"base, T={t:g}", "temperature", base, t) for t in temperatures]
        rows = [base_row, *(judge.row(entry, tick)[0] for entry in entries)]
        drawn = {row["temperature"]: row["entropy"] for row in rows}
        matched = _matched(judge, base, vapi_row["entropy"], drawn)
        entries = [Entry(f"base, cfg {s:g}", "guided", base, guidance=s) for s in scales]
        entries.append(Entry(f"base, T={matched:.3f}", "matched", base, matched))
        rows += [*(judge.row(entry, tick)[0] for entry in entries), vapi_row]
    for name, trained in controls.items():
        entry = Entry(name, "control", trained())
        with ProgressBar(seeds, f"evaluation of {name}") as progress:
            done = 0
            rows.append(judge.row(entry, tick)[0])
        del entry
    with ProgressBar(2 * seeds, "evaluation of real crops") as progress:
        done, floor = 0, "tokenizer floor (real crops, reconstructed)"
        rows.append(judge.real_row(floor, "floor", tick, tuned))
        rows.append(judge.real_row("real crops against other real crops", "real", tick))
    sets = {REAL: judge.reference, BASE: base_features, TUNED: vapi_features}
    features = {
        name: {label: found[name] for label, found in sets.items()}
        for name in judged_features(config)
    }
    return rows, features
