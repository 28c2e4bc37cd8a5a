"""Beyond the paper in miniature, on photographs: spatial credit, energy score, per-reward advantages, EMA.

    python -m vapi_jax.study --study=configs/studies/mini_beyond.py --workdir=studies/mini_beyond

Does any of them beat plain VA-π, and the base at its own entropy? Four trainings an arm on the shipped
models. Spatial credit and energy score have rates of their own, the two together the lower of them, the
others VA-π's; run mini_rates.py first and write its rates down. ":tiny" shows in minutes that every arm
works.
"""

from vapi_jax.common.recipes import load_recipe
from vapi_jax.study.paper import is_tiny
from vapi_jax.study.spec import Study


def get_study(variant: str = "") -> Study:
    """The study; variant "tiny"."""
    tiny, mini = is_tiny(variant), load_recipe(__file__, "mini_rates")
    return Study(
        "beyond the paper in miniature",
        "Do other ways to credit, score and average give more than plain VA-π?",
        mini.RECIPE,
        (
            mini.arm("VA-π"),
            mini.arm("spatial credit", "spatial"),
            mini.arm("energy score", "energy"),
            mini.arm("both", "spatial", **mini.VARIANTS["energy"]),
            mini.arm("advantages per reward", **{"vapi.advantage": "per_reward"}),
            mini.arm("EMA of 10 steps", average=True, **{"vapi.ema_decay": 0.9}),
        ),
        against="VA-π",
        **mini.common(tiny),
    )
