"""What a study would cost, by arithmetic: nothing is run, no weights or images are needed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from vapi_jax.bench.flops import method_flops, sample_flops
from vapi_jax.bench.scaling import H100
from vapi_jax.common.tables import format_table
from vapi_jax.generation.protocols import PROTOCOLS
from vapi_jax.methods.classes import labels_option
from vapi_jax.methods.generator import sized_policy
from vapi_jax.methods.resolve import examine, raise_all
from vapi_jax.models.policies import make_policy
from vapi_jax.study.spec import BASE, Arm, Draw, Study, recipe_of

TRAINING, SAMPLING = H100.utilisation, 0.05
"""Shares of the peak that are assumed of a step and of drawing, which waits for memory token after token."""
_GENEVAL = 553  # prompts


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of all seeds of an arm.

    Attributes:
      name: of the arm.
      steps, batch: of one training; 0 of the base.
      training: model FLOPs; None where the method is not counted.
      judging: FLOPs of all its samples, those of the base beside it included.
    """

    name: str
    steps: int
    batch: int
    training: float | None
    judging: float

    @property
    def hours(self) -> float:
        """Of one H100, without compiling, loading and writing."""
        seconds = (self.training or 0.0) / TRAINING + self.judging / SAMPLING
        return seconds / H100.flops / 3600


def costs(study: Study) -> list[Cost]:
    """Of the base and of every arm.

    Raises:
      ConfigError: options of a recipe that are wrong in themselves.
    """
    return [_cost(study, arm) for arm in (Arm(BASE), *study.trained)]


def _cost(study: Study, arm: Arm) -> Cost:
    config, errors = examine(recipe_of(study, None if arm.name == BASE else arm))
    raise_all(errors)
    options = sized_policy(config)
    if (classes := labels_option(config)) is not None:
        options.setdefault(classes, 1)  # weights or data would say how many; they cost nothing
    policy = make_policy(**options)
    draws: Sequence[Draw] = [*study.draws.values()]
    if arm.name == BASE:
        draws = [*draws, *(other.draw for other in study.untrained if other.draw is not None)]
    count = study.samples + _in_files(study)
    sets = study.seeds * study.sampling_seeds * (1 if arm.name == BASE else 2)
    judging = sum(
        sets * count * sample_flops(config, policy, draw.cfg_scale != 1.0) for draw in draws
    )
    if arm.name == BASE:
        return Cost(arm.name, 0, 0, 0.0, judging)
    step = method_flops(config, policy)
    training = None if step is None else study.seeds * config.steps * step
    return Cost(arm.name, config.steps, config.batch_size, training, judging)


def _in_files(study: Study) -> int:
    """Images of a set that the published protocol asks for."""
    if study.files is None or not study.files.asked:
        return 0
    flags = {**PROTOCOLS[study.files.protocol], **study.files.changes}
    return int(flags["num"] if "num" in flags else _GENEVAL * flags["per_prompt"])


def render(study: Study, found: Sequence[Cost]) -> str:
    """The table, and what it assumes."""
    rows = [
        [
            one.name,
            f"{study.seeds if one.steps else 0} x {one.steps} x {one.batch}" if one.steps else "–",
            "not counted" if one.training is None else f"{one.training / 1e15:,.3g}",
            f"{one.judging / 1e15:,.3g}",
            f"{one.hours:,.2g}" + (" and more" if one.training is None else ""),
        ]
        for one in found
    ]
    rows.append(["in all", "", "", "", f"{sum(one.hours for one in found):,.3g}"])
    head = ["arm", "seeds x steps x images", "training, PFLOP", "judging, PFLOP", "H100 hours"]
    return (
        f"{format_table(rows, head)}\n"
        f"An estimate by arithmetic, nothing of it measured: model FLOPs at {100 * TRAINING:.0f} % of one "
        f"H100's {H100.flops / 1e12:.0f} TFLOP/s (bfloat16) in training and {100 * SAMPLING:.0f} % where "
        "images are drawn. Compiling, reading, held-out evaluation, reports and reward models other than "
        "LPIPS come on top."
    )
