"""The judge of a study's arms: one protocol, one set of compiled programs, whatever an arm trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from vapi_jax.common.images import to_uint8
from vapi_jax.common.options import Errors
from vapi_jax.evaluation.compare import match_entropy
from vapi_jax.evaluation.frechet import frechet_distance, gaussian_statistics
from vapi_jax.evaluation.geneval_files import Image
from vapi_jax.evaluation.kernel_distance import unbiased_mmd2
from vapi_jax.evaluation.precision_recall import precision_recall
from vapi_jax.evaluation.samples import (
    Judged,
    SampleJudge,
    asked_of,
    judging_batch,
    on_judging_devices,
)
from vapi_jax.evaluation.scene_scores import SceneJudge, scene_judge
from vapi_jax.methods import Method, make_method
from vapi_jax.methods.classes import with_classes
from vapi_jax.methods.config import TrainConfig
from vapi_jax.methods.method import EMA
from vapi_jax.methods.resolve import raise_all
from vapi_jax.models.lpips import load_lpips_params, lpips
from vapi_jax.study.files import OF_FILES, draw_files, folder_of, settled_temperature
from vapi_jax.study.spec import BASE, Draw, Study, recipe_of
from vapi_jax.training import train
from vapi_jax.training.loop import Run
from vapi_jax.training.preflight import require
from vapi_jax.training.run import prepare_devices

MATCHED = "matched.json"
"""Beside an arm's run: temperatures of the base at its entropy."""

_PAIRS, _AT_ONCE = 128, 32  # samples whose LPIPS is taken, in all and at once

Metrics = dict[str, float]


def settled_method(config: TrainConfig) -> Method:
    """The method of a configuration, on this machine's devices, with its data's classes."""
    errors = Errors()
    config = with_classes(config, errors)
    raise_all(errors)
    return make_method(config, prepare_devices(config))


def start_of(method: Method) -> Any:
    """The parameters that its runs start from."""
    optimizer = train.make_optimizer(method.config.optimizer, method.config.steps)
    return train.init_state(method, optimizer, method.config.seed)[0].params


class StudyJudge:
    """Samples, their features and what is measured of them, the same for all arms.

    Nothing is loaded before something is judged.

    Args:
      study: the protocol. Its own recipe says what is drawn of (labels, captions), from which base and
        in which precision; what that recipe would train does not matter.
      workdir: of the study, for images in files.
    """

    def __init__(self, study: Study, workdir: Path):
        self._study, self._workdir = study, workdir
        self._by_temperature: dict[tuple[str, int], Callable[[float], float]] = {}

    def tuned(
        self, done: Run, place: Path, seed: int, name: str, average: bool = False
    ) -> dict[str, Any]:
        """What an arm has trained, and the base at the temperature of its entropy.

        Entropies are those of the judged samples, on the same uniforms. An arm that trained the tokenizer's
        decoder draws the base's tokens, and is matched by the base itself.

        Args:
          done: the arm's run.
          place: of that run, WORKDIR/arms/SLUG/seed_SEED/run.
          seed: of the training.
          name: of one of the study's draws.
          average: of the run's parameters, in their place.
        """
        params, tokenizer = generator_of(done, average)
        draw, who = self._study.draws[name], f"{place.parents[1].name}_{seed}"
        judge = self._judge if tokenizer is None else self._judge.with_tokenizer(tokenizer)
        sets = self._sets(judge.with_settings(**draw.settings), params, seed, draw.temperature)
        temperature, plain = draw.temperature, self._judge.with_settings(**draw.settings)
        if tokenizer is None:
            target = float(np.mean([one["entropy"] for one in sets]))
            find = partial(match_entropy, self._entropies(name, seed), target, draw.temperature)
            temperature = settled_temperature(place.with_name(MATCHED), name, target, find)
        matched = self._sets(plain, self._params, seed, temperature)
        self._add_files(sets, str(place), who, name, draw, seed, draw.temperature)
        self._add_files(matched, "", who, f"{name}_matched", draw, seed, temperature)
        return {
            "sets": sets,
            "matched_temperature": temperature,
            "matched": matched,
            "tokens_of_base": tokenizer is not None,
        }

    def _entropies(self, name: str, seed: int) -> Callable[[float], float]:
        """Of the base in one of the study's draws, for all arms of a seed."""
        if (name, seed) not in self._by_temperature:
            plain = self._judge.with_settings(**self._study.draws[name].settings)
            found = plain.entropies(self._weights, self._study.samples, self._turns(seed))
            self._by_temperature[name, seed] = found
        return self._by_temperature[name, seed]

    def base(self, seed: int) -> dict[str, Any]:
        """The base in every way that the study draws it, the tokenizer's floor and other real crops.

        Drawn with the uniforms of the arms' trainings of this seed.
        """
        arms = {arm.name: arm.draw for arm in self._study.arms if arm.draw is not None}
        found = {}
        for name, draw in {**self._study.draws, **arms}.items():
            judge = self._judge.with_settings(**draw.settings)
            found[name] = self._sets(judge, self._params, seed, draw.temperature)
            self._add_files(found[name], "", f"{BASE}_{seed}", name, draw, seed, draw.temperature)
        count = self._study.samples
        floor = self._measure(self._judge.reconstructed(count, seed + 1))
        real = self._measure(self._judge.real(count, seed + 1))
        if self._scenes:
            floor |= self._scored(self._seen(self._judge.reconstruct))
            real |= self._scored(self._seen(lambda images: images))
        return {"draws": found, "floor": floor, "real": real}

    def _seen(self, through: Callable[[Any], Any]) -> list[Image]:
        """Verdicts of the scenes themselves, through the tokenizer or as they are."""
        assert self._scenes is not None, "asked before"
        return [
            verdict
            for numbers, images in self._scenes.drawn(self._judge.batch)
            for verdict in self._scenes.judge(numbers, to_uint8(through(images)), 0)
        ]

    def _add_files(
        self,
        sets: list[Metrics],
        checkpoint: str,
        who: str,
        what: str,
        draw: Draw,
        seed: int,
        temperature: float,
    ) -> None:
        """Adds what the published way of judging gives; `checkpoint` "" is the base's."""
        files = self._study.files
        if files is None or not files.asked:
            return
        for number, (turn, one) in enumerate(zip(self._turns(seed), sets, strict=True)):
            place = folder_of(self._workdir, who, what, number)
            found = draw_files(
                files, checkpoint or files.checkpoint, place, draw, temperature, turn
            )
            one |= {OF_FILES.get(metric, metric): value for metric, value in found.items()}

    # --- loaded when first asked for ----------------------------------------------------------------

    @cached_property
    def _method(self) -> Method:
        return settled_method(require(recipe_of(self._study)))

    @cached_property
    def _params(self) -> Any:
        """The base's generator."""
        return start_of(self._method)

    @cached_property
    def _weights(self) -> Any:
        """The base's, as they are drawn from: one copy for all draws and seeds."""
        return self._judge.weights(self._params)

    @cached_property
    def _judge(self) -> SampleJudge:
        method, frozen = on_judging_devices(self._method, train.load_frozen(self._method))
        draws = *self._study.draws.values(), *(arm.draw for arm in self._study.untrained)
        guided = any(draw is not None and draw.cfg_scale != 1.0 for draw in draws)
        batch = judging_batch(method, self._study.samples, guided)
        return SampleJudge(method, frozen, batch, self._study.features)

    @cached_property
    def _scenes(self) -> SceneJudge | None:
        return scene_judge(self._method.config)

    @cached_property
    def _reference(self) -> dict[str, Float[np.ndarray, "N D"]]:
        found = self._judge.features(self._judge.real(self._study.samples, 0))
        return {name: rows.astype(np.float64) for name, rows in found.items()}

    @cached_property
    def _conditions(self) -> int:
        """After how many samples the same is asked for again."""
        judged = self._method.config.eval
        return len(asked_of(self._method.config, judged.samples))

    @cached_property
    def _lpips(self) -> Any:
        return jax.jit(partial(_lpips_of, load_lpips_params("vgg")))

    # --- measured -------------------------------------------------------------------------------------

    def _turns(self, seed: int) -> range:
        """Sampling seeds of a training seed."""
        sets = self._study.sampling_seeds
        return range(seed * sets, (seed + 1) * sets)

    def _sets(
        self, judge: SampleJudge, params: Any, seed: int, temperature: float
    ) -> list[Metrics]:
        """What is measured of each set of samples of a training seed."""
        found, shown = [], self._conditions + _PAIRS
        for turn in self._turns(seed):
            verdicts: list[Image] = []
            see = partial(self._look, verdicts)
            count = self._study.samples
            drawn = judge.samples(params, count, turn, temperature, shown, see=see)
            own = {**self._of(drawn.features), **self._spread(drawn)}
            found.append({**own, **(self._scored(verdicts) if self._scenes else {})})
        return found

    def _look(
        self, verdicts: list[Image], samples: range, images: UInt8[np.ndarray, "B H W 3"]
    ) -> None:
        if self._scenes:
            verdicts.extend(self._scenes.judge(samples, images, 0))

    def _scored(self, verdicts: list[Image]) -> Metrics:
        assert self._scenes is not None, "asked before"
        return {
            f"scenes/{task}": one["value"] for task, one in self._scenes.scores(verdicts).items()
        }

    def _measure(self, images: Iterator[UInt8[np.ndarray, "B H W 3"]]) -> Metrics:
        return self._of(self._judge.features(images))

    def _of(self, features: Mapping[str, Float[np.ndarray, "N D"]]) -> Metrics:
        found: Metrics = {}
        for name, theirs in features.items():
            real = self._reference[name]
            if min(len(real), len(theirs)) > theirs.shape[1]:
                both = gaussian_statistics(theirs), gaussian_statistics(real)
                found[f"frechet/{name}"] = frechet_distance(*both[0], *both[1])
            found[f"kernel/{name}"], _ = unbiased_mmd2(theirs.astype(np.float64), real)
        first = self._study.features[0]
        shares = precision_recall(self._reference[first], features[first])
        return {**found, "precision": shares.precision, "recall": shares.recall}

    def _spread(self, drawn: Judged) -> Metrics:
        """Entropy, and the mean LPIPS of two samples of one label or caption, which come in turn."""
        images, step = drawn.images, self._conditions
        found, pairs = {"entropy": drawn.entropy}, min(_PAIRS, len(images) - step)
        if pairs > 0:
            size = min(_AT_ONCE, pairs)
            apart = [
                np.asarray(self._lpips(images[i : i + size], images[i + step :][:size]))
                for i in range(0, pairs - size + 1, size)
            ]
            found["diversity"] = float(np.mean(apart, dtype=np.float64))
        return found


def generator_of(done: Run, average: bool = False) -> tuple[Any, Any]:
    """A finished run's generator, or the average of it, and the tokenizer that goes with it; None for the
    one it began with."""
    sampled = done.method.sampled()
    assert sampled is not None, "an arm has samples"
    params = done.extra[EMA] if average else done.params
    tokenizer = None if sampled.tokenizer is None else sampled.tokenizer(params)
    return sampled.params(params, done.frozen), tokenizer


def _lpips_of(params: Any, a: UInt8[Array, "N H W 3"], b: UInt8[Array, "N H W 3"]) -> Array:
    a, b = (x.astype(jnp.float32) / 127.5 - 1.0 for x in (a, b))
    return lpips(params, a, b, "vgg")
