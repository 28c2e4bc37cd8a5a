"""Table 5: how much noise in the contexts, on LlamaGen-XL with captions, by GenEval.

    python -m vapi_jax.study --study=configs/studies/table5.py --workdir=studies/table5

One run of GenEval has a standard deviation of about 0.01 overall, and the published rates from 0.5 on differ
by no more; hence four trainings a rate and four sets of images of each. Needs what table3_llamagen.py needs,
which says how GenEval's detector comes in. ":tiny" runs three of the rates on small generators from scratch
in minutes. Not run yet.
"""

from vapi_jax.study.paper import GUIDED, METADATA, geneval, is_tiny, tiny_study
from vapi_jax.study.spec import Arm, Draw, Files, Study

PUBLISHED = {
    0.0: geneval(0.048, 0.566, 0.023, 0.159, 0.688, 0.326, 0.302),
    0.25: geneval(0.043, 0.598, 0.025, 0.215, 0.700, 0.306, 0.315),
    0.5: geneval(0.050, 0.606, 0.040, 0.238, 0.769, 0.328, 0.339),
    0.75: geneval(0.075, 0.641, 0.028, 0.163, 0.750, 0.333, 0.332),
    0.95: geneval(0.043, 0.652, 0.040, 0.181, 0.728, 0.328, 0.329),
}
FILES = Files("geneval", "weights/t2i_xl", prompts=METADATA, text_encoder="weights/flan-t5-xl")


def get_study(variant: str = "") -> Study:
    """The study; variant "tiny", of three rates."""
    tiny = is_tiny(variant)
    rates = (0.0, 0.5, 0.95) if tiny else tuple(PUBLISHED)
    given = (
        tiny_study(classes=False) if tiny else {"samples": 5000, "seeds": 4, "sampling_seeds": 4}
    )
    return Study(
        "Table 5",
        "How much noise do contexts want?",
        "t2i_xl:tiny" if tiny else "t2i_xl",
        tuple(
            Arm(f"ξ = {rate:g}", {"vapi.noise_rate": rate}, published=PUBLISHED[rate])
            for rate in rates
        ),
        draws={GUIDED: Draw(cfg_scale=7.5, top_k=0 if tiny else 2000)},
        verdict="geneval/overall",
        against="ξ = 0.5",
        files=None if tiny else FILES,
        published=geneval(0.042, 0.550, 0.032, 0.197, 0.750, 0.263, 0.306),
        **given,
    )
