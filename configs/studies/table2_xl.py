"""Table 2 on LlamaGen-XL: VA-π, the paper's baselines, AR-GRPO and CCA, with guidance and without.

    python -m vapi_jax.study --study=configs/studies/table2_xl.py --workdir=studies/table2_xl

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
    "VA-π": fidelity((9.23, 111.59, 0.71, 0.59), (2.94, 299.63, 0.84, 0.53)),
    "AR-GRPO": fidelity((), (3.63, 293.07, 0.86, 0.48)),
    "CCA": fidelity((3.10,)),
}


def get_study(variant: str = "") -> Study:
    """The study; variant "tiny"."""
    tiny = is_tiny(variant)
    given = tiny_study() if tiny else {"samples": 5000, "seeds": 3, "sampling_seeds": 1}
    return Study(
        "Table 2, LlamaGen-XL",
        "What does VA-π give on ImageNet beside its baselines, and beside a sharper base?",
        "c2i_xl:tiny" if tiny else "c2i_xl",
        class_arms("XL", tiny, PUBLISHED),
        draws=class_draws(2.0),
        against="VA-π",
        files=None if tiny else class_files("weights/c2i_xl"),
        published=fidelity((15.55, 79.16, 0.62, 0.69), (2.79, 286.88, 0.84, 0.54)),
        **given,
    )
