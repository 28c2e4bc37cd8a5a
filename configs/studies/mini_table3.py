"""Table 3 in miniature, on drawn scenes: does what is drawn follow its caption better?

    python -m vapi_jax.study --study=configs/studies/mini_table3.py --workdir=studies/mini_table3

VA-π, STE, cross-entropy alone and AR-GRPO from the shipped generator, four trainings each, judged by
GenEval's rules on two samples for the caption of each of 600 held-out scenes, with guidance and without.
AR-GRPO's reward is the rule that judges, on other captions, and its steps are more: it shows what can be
learnt; VA-π's reward never sees a caption. Rates are the recipes', not chosen on scenes. ":tiny" shows in
minutes that every arm works.
"""

from vapi_jax.study.paper import GUIDED, ONE_DEVICE, PLAIN, is_tiny, tiny_study
from vapi_jax.study.spec import Arm, Draw, Study


def get_study(variant: str = "") -> Study:
    """The study; variant "tiny"."""
    tiny = is_tiny(variant)
    end = ":tiny" if tiny else ""
    full = {
        "changes": ONE_DEVICE,
        "seeds": 4,
        "sampling_seeds": 1,
        "samples": 1200,
        "features": ("vgg_relu4_3",),
    }
    return Study(
        "Table 3 in miniature",
        "Do samples follow their captions better after VA-π, and better than a sharper base's?",
        f"t2i_demo{end}",
        (
            Arm("VA-π"),
            Arm("STE", {"method": "ste"}),
            Arm("CE only", {"method": "sft", "sft.weight": 0.1}),
            Arm("AR-GRPO", recipe=f"scenes_ar_grpo{end}"),
            Arm("base, T = 0.9", draw=Draw(temperature=0.9), trained=False),
        ),
        draws={PLAIN: Draw(), GUIDED: Draw(cfg_scale=2.0)},
        verdict="scenes/overall",
        against="VA-π",
        **(tiny_study(classes=False) if tiny else full),
    )
