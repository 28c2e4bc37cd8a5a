"""Table 3 on LlamaGen-XL: GenEval of VA-π and AR-GRPO, with guidance 7.5.

    python -m vapi_jax.study --study=configs/studies/table3_llamagen.py --workdir=studies/table3_llamagen

Needs what the recipes need, and GenEval's evaluation_metadata.jsonl in weights/. GenEval's detector is
yours: the study writes the images in its folders, under WORKDIR/images; put what the detector finds beside
them (detections.jsonl, see docs/text.md), give the command again, and the page has GenEval's scores. Until
then its verdict is of distances to the training data's images, which is another question. `--set
data.path=DIR` and `--set data.options.caption_field=FIELD` say where captions are, for all arms: AR-GRPO's
published run had 30,000 captions of COCO, and eight rewards where two are here. ":tiny" runs all arms on
small generators from scratch in minutes. Not run yet.
"""

from vapi_jax.study.paper import GUIDED, METADATA, geneval, is_tiny, tiny_study
from vapi_jax.study.spec import Arm, Draw, Files, Study

VAPI = geneval(0.050, 0.606, 0.040, 0.238, 0.769, 0.328, 0.339)
AR_GRPO = geneval(0.040, 0.593, 0.030, 0.228, 0.791, 0.263, 0.324)
FILES = Files("geneval", "weights/t2i_xl", prompts=METADATA, text_encoder="weights/flan-t5-xl")


def get_study(variant: str = "") -> Study:
    """The study; variant "tiny"."""
    tiny = is_tiny(variant)
    end = ":tiny" if tiny else ""
    given = (
        tiny_study(classes=False) if tiny else {"samples": 5000, "seeds": 4, "sampling_seeds": 4}
    )
    return Study(
        "Table 3, LlamaGen-XL",
        "Do VA-π's images follow their captions better?",
        f"t2i_xl{end}",
        (
            Arm("VA-π", published=VAPI),
            Arm("AR-GRPO", {"preset": "reference"}, f"t2i_ar_grpo{end}", published=AR_GRPO),
        ),
        draws={GUIDED: Draw(cfg_scale=7.5, top_k=0 if tiny else 2000)},
        verdict="geneval/overall",
        against="VA-π",
        files=None if tiny else FILES,
        published=geneval(0.042, 0.550, 0.032, 0.197, 0.750, 0.263, 0.306),
        **given,
    )
