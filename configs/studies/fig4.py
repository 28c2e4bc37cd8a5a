"""Figure 4: cross-entropy against KL to the base as the prior term, over β, on LlamaGen-XXL without guidance.

    python -m vapi_jax.study --study=configs/studies/fig4.py --workdir=studies/fig4

The paper's text gives two points, no term and CE at 0.1; the others are only in its picture. The KL is k3
at the samples, as in the released code. Needs what table2_xxl.py needs. ":tiny" runs three arms on the
shipped models in minutes. Not run yet.
"""

from vapi_jax.study.paper import PLAIN, class_files, fidelity, is_tiny, tiny_study
from vapi_jax.study.spec import Arm, Draw, Study

PUBLISHED = {"CE, β = 0.1": fidelity((7.65, 116.70)), "no prior": fidelity((38.63, 48.14))}


def arms(weights: tuple[float, ...]) -> tuple[Arm, ...]:
    """No prior term, and each of both kinds at each weight."""
    found = {"no prior": {"vapi.ce_weight": 0.0}}
    for weight in weights:
        found[f"CE, β = {weight:g}"] = {"vapi.ce_weight": weight}
        found[f"KL, β = {weight:g}"] = {"vapi.ce_weight": 0.0, "vapi.kl_weight": weight}
    return tuple(Arm(n, changes, published=PUBLISHED.get(n, {})) for n, changes in found.items())


def get_study(variant: str = "") -> Study:
    """The study; variant "tiny"."""
    tiny = is_tiny(variant)
    given = tiny_study() if tiny else {"samples": 5000, "seeds": 3, "sampling_seeds": 1}
    return Study(
        "Figure 4",
        "Which prior term, and how much of it?",
        "c2i_xxl:tiny" if tiny else "c2i_xxl",
        arms((0.1,) if tiny else (0.01, 0.1, 1.0)),
        draws={PLAIN: Draw()},
        against="CE, β = 0.1",
        files=None if tiny else class_files("weights/c2i_xxl"),
        published=fidelity((14.36, 86.55)),
        **given,
    )
