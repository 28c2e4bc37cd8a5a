"""Table 3 on Janus-Pro-1B: GenEval of VA-π, with guidance 5.

    python -m vapi_jax.study --study=configs/studies/table3_janus.py --workdir=studies/table3_janus

Needs what table3_llamagen.py needs, which says how GenEval's detector comes in. ":tiny" runs all arms on
small generators from scratch in minutes. Not run yet.
"""

from vapi_jax.study.paper import GUIDED, METADATA, geneval, is_tiny, tiny_study
from vapi_jax.study.spec import Arm, Draw, Files, Study

VAPI = geneval(0.600, 0.912, 0.585, 0.540, 0.988, 0.835, 0.744)


def get_study(variant: str = "") -> Study:
    """The study; variant "tiny", on drawn scenes with their scores."""
    tiny = is_tiny(variant)
    given = (
        tiny_study(classes=False) if tiny else {"samples": 5000, "seeds": 4, "sampling_seeds": 4}
    )
    return Study(
        "Table 3, Janus-Pro-1B",
        "Do VA-π's images follow their captions better?",
        "janus_pro_1b:tiny" if tiny else "janus_pro_1b",
        (Arm("VA-π", published=VAPI),),
        draws={GUIDED: Draw(cfg_scale=5.0)},
        verdict="scenes/overall" if tiny else "geneval/overall",
        files=None if tiny else Files("geneval_janus", "weights/janus_pro_1b", prompts=METADATA),
        published=geneval(0.605, 0.902, 0.540, 0.531, 0.972, 0.801, 0.725),
        **given,
    )
