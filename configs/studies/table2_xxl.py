"""Table 2 on LlamaGen-XXL: VA-π, the paper's baselines, AR-GRPO and CCA, with guidance and without.

    python -m vapi_jax.study --study=configs/studies/table2_xxl.py --workdir=studies/table2_xxl

Needs what the recipes need, the ADM reference batch and FID's weights in weights/ (vapi_jax/study/paper.py
says under which names). `--check` estimates its hours, `--set data.path=DIR` says where ImageNet is
prepared; AR-GRPO's four conditions a step want 1, 2 or 4 devices. Published figures stand beside what they
are of: STE's beside as many steps as its published time holds, AR-GRPO's and CCA's beside the released
scripts' presets; of AR-GRPO's eight rewards two are there. ":tiny" runs all arms on the shipped models in
minutes. Not run yet.
"""

from vapi_jax.study.paper import class_arms, class_draws, class_files, fidelity, is_tiny, tiny_study
from vapi_jax.study.spec import Study

PUBLISHED = {
    "VA-π": fidelity((7.65, 116.70, 0.71, 0.64), (2.28, 273.53, 0.83, 0.56)),
    "STE, longer": fidelity((11.46, 102.21, 0.68, 0.61), (4.17, 267.34, 0.83, 0.51)),
    "tokenizer": fidelity((14.26, 86.70, 0.63, 0.68), (2.72, 246.97, 0.80, 0.59)),
    "tokenizer, longer": fidelity((22.99, 72.49, 0.56, 0.68), (4.31, 221.57, 0.75, 0.58)),
    "CCA": fidelity((3.12,)),
}


def get_study(variant: str = "") -> Study:
    """The study; variant "tiny"."""
    tiny = is_tiny(variant)
    given = tiny_study() if tiny else {"samples": 5000, "seeds": 3, "sampling_seeds": 1}
    return Study(
        "Table 2, LlamaGen-XXL",
        "What does VA-π give on ImageNet beside its baselines, and beside a sharper base?",
        "c2i_xxl:tiny" if tiny else "c2i_xxl",
        class_arms("XXL", tiny, PUBLISHED),
        draws=class_draws(1.75),
        against="VA-π",
        files=None if tiny else class_files("weights/c2i_xxl"),
        published=fidelity((14.36, 86.55, 0.63, 0.69), (2.37, 252.16, 0.81, 0.59)),
        **given,
    )
