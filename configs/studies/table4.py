"""Table 4: which parts of VA-π's reward and loss are needed, on LlamaGen-XXL without guidance.

    python -m vapi_jax.study --study=configs/studies/table4.py --workdir=studies/table4

Table 4 has neither the MSE alone nor the reward with a KL in the place of CE; both are here. Its full
method has a precision of 0.68 here and of 0.71 in Table 2. Needs what table2_xxl.py needs. ":tiny" runs all
arms on the shipped models in minutes. Not run yet.
"""

from vapi_jax.study.paper import PLAIN, class_files, fidelity, is_tiny, tiny_study
from vapi_jax.study.spec import Arm, Draw, Study

NO_PRIOR = {"vapi.ce_weight": 0.0}
LPIPS = ({"name": "lpips", "options": {"dtype": "bfloat16"}},)  # as in the recipe
ARMS = (
    Arm("VA-π", published=fidelity((7.65, 116.70, 0.68, 0.64))),
    Arm("MSE", {"rewards": "mse", **NO_PRIOR}),
    Arm("LPIPS", {"rewards": LPIPS, **NO_PRIOR}, published=fidelity((38.76, 49.78, 0.48, 0.46))),
    Arm("MSE + LPIPS", NO_PRIOR, published=fidelity((38.63, 48.14, 0.49, 0.46))),
    Arm("MSE + LPIPS + KL", {**NO_PRIOR, "vapi.kl_weight": 0.1}),
    Arm("CE", {"method": "sft", "sft.weight": 0.1}, published=fidelity((14.17, 88.78, 0.63, 0.69))),
)


def get_study(variant: str = "") -> Study:
    """The study; variant "tiny"."""
    tiny = is_tiny(variant)
    given = tiny_study() if tiny else {"samples": 5000, "seeds": 3, "sampling_seeds": 1}
    return Study(
        "Table 4",
        "Is the prior term needed, and both parts of the reward?",
        "c2i_xxl:tiny" if tiny else "c2i_xxl",
        ARMS,
        draws={PLAIN: Draw()},
        against="VA-π",
        files=None if tiny else class_files("weights/c2i_xxl"),
        published=fidelity((14.36, 86.55, 0.63, 0.69)),
        **given,
    )
