"""Table 2 in miniature, on photographs: VA-π, STE, the decoder and CCA at equal steps and equal arithmetic.

    python -m vapi_jax.study --study=configs/studies/mini_table2.py --workdir=studies/mini_table2

Run mini_rates.py first and write its rates down. Four trainings an arm, with guidance and without, on the
shipped models. "Equal arithmetic" is as many steps as cost the model FLOPs of VA-π's 50 when they ran
(vapi_jax/bench/flops.py); decoders have become cheaper since, so that STE has 2 % and CCA 6 % more than it.
AR-GRPO is left out: it wants a reward model that needs no image beside it, and none is at hand for
photographs of 32 pixels. ":tiny" shows in minutes that every arm works.
"""

from vapi_jax.common.recipes import load_recipe
from vapi_jax.study.paper import GUIDED, PLAIN, is_tiny
from vapi_jax.study.spec import Arm, Draw, Study

EQUAL_ARITHMETIC = {"ste": 137, "cca": 238}
LONGER = 200


def get_study(variant: str = "") -> Study:
    """The study; variant "tiny"."""
    tiny, mini = is_tiny(variant), load_recipe(__file__, "mini_rates")
    steps = {name: 3 if tiny else count for name, count in EQUAL_ARITHMETIC.items()}
    return Study(
        "Table 2 in miniature",
        "What does VA-π give on photographs beside its baselines, and beside a sharper base?",
        mini.RECIPE,
        (
            mini.arm("VA-π"),
            mini.arm("STE", "ste"),
            mini.arm("STE, equal arithmetic", "ste", steps=steps["ste"]),
            mini.arm("tokenizer", "tokenizer_post"),
            mini.arm("tokenizer, longer", "tokenizer_post", steps=3 if tiny else LONGER),
            mini.arm("CCA", "cca"),
            mini.arm("CCA, equal arithmetic", "cca", steps=steps["cca"]),
            Arm("base, T = 0.9", draw=Draw(temperature=0.9), trained=False),
        ),
        draws={PLAIN: Draw(), GUIDED: Draw(cfg_scale=1.5)},
        against="VA-π",
        **mini.common(tiny),
    )
