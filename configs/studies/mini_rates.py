"""Learning rates of the miniature studies: three for each method, on validation crops of photographs.

    python -m vapi_jax.study --study=configs/studies/mini_rates.py --workdir=studies/mini_rates

Chooses `RATES`, which mini_table2.py, mini_ablations.py and mini_beyond.py take, on other crops than those
judge by: the same three steps of half a decade around a first guess, the same 50 steps of 16 images and one
training for each. Taken of each is the rate with the lowest distance in the features of the verdict; the
results are in docs/studies/mini_rates. One training a rate is little: most differences are within noise,
and VA-π and CE chose the highest of their three. docs/studies.md has what they cost.
":tiny" shows in minutes that every method works.
"""

from typing import Any

from vapi_jax.study.paper import ONE_DEVICE, is_tiny, tiny_study
from vapi_jax.study.spec import Arm, Study

RECIPE = "c2i_demo"
STEPS = 50
RATES = {
    "vapi": 1e-4,
    "spatial": 1e-5,
    "energy": 3e-5,
    "ste": 3e-5,
    "cca": 1e-5,
    "sft": 1e-4,
    "tokenizer_post": 1e-4,
}
"""Method, or variant of VA-π -> learning rate, of docs/studies/mini_rates/study.md."""
VARIANTS = {"spatial": {"vapi.credit": "spatial"}, "energy": {"vapi.score": "energy"}}
"""Of VA-π, which may want a rate of their own -> options."""
NAMES = {
    "vapi": "VA-π",
    "spatial": "VA-π, spatial credit",
    "energy": "VA-π, energy score",
    "ste": "STE",
    "cca": "CCA",
    "sft": "CE",
    "tokenizer_post": "tokenizer",
}
_GRIDS = {"tokenizer_post": (3e-5, 1e-4, 3e-4)}
_GRID = (1e-5, 3e-5, 1e-4)


def arm(name: str, method: str = "vapi", average: bool = False, **more: Any) -> Arm:
    """An arm of a method, or variant, at its rate; `more` are changes of the recipe, under dotted paths."""
    variant = VARIANTS.get(method)
    given = {"method": method} if variant is None else {"method": "vapi", **variant}
    changes = {**given, "optimizer.learning_rate": RATES[method], **more}
    return Arm(name, changes, average=average)


def common(tiny: bool, split: str = "test") -> dict[str, Any]:
    """What the miniature studies share: 50 steps on one CPU device, and who judges.

    1,408 samples are more than EfficientNet has features, which no reward here has seen and which knows
    ImageNet's classes, as FID's network does.
    """
    if tiny:
        small = tiny_study()
        return {
            **small,
            "changes": {**small["changes"], **_changes("val"), "steps": 2, "eval.images": 8},
        }
    return {"changes": _changes(split), "seeds": 4, "sampling_seeds": 1, "samples": 1408}


def _changes(split: str) -> dict[str, Any]:
    judged = {
        "split": split,
        "every": STEPS,
        "grid_classes": 4,
        "grid_per_class": 1,
        "sampled_every": 0,
    }
    return {
        "steps": STEPS,
        **ONE_DEVICE,
        **{f"eval.{name}": value for name, value in judged.items()},
    }


def get_study(variant: str = "") -> Study:
    """The study; variant "tiny", of one rate for each method."""
    tiny = is_tiny(variant)
    given = {**common(tiny, "val"), "seeds": 1}
    return Study(
        "learning rates in miniature",
        "Which learning rate does each method want?",
        RECIPE,
        tuple(
            arm(f"{NAMES[method]}, {rate:g}", method, **{"optimizer.learning_rate": rate})
            for method in RATES
            for rate in _GRIDS.get(method, _GRID)[-1 if tiny else 0 :]
        ),
        **given,
    )
