"""Tables 4 and 5 and figure 4 in miniature, on photographs: parts of the reward, prior terms, noise.

    python -m vapi_jax.study --study=configs/studies/mini_ablations.py --workdir=studies/mini_ablations

One study, because its arms share VA-π and because what is read together is to be corrected together. Four
trainings an arm on the shipped models, at VA-π's rate; run mini_rates.py first and write its rates down.
":tiny" shows in minutes that every arm works.
"""

from vapi_jax.common.recipes import load_recipe
from vapi_jax.study.paper import is_tiny
from vapi_jax.study.spec import Study

NO_PRIOR = {"vapi.ce_weight": 0.0}


def get_study(variant: str = "") -> Study:
    """The study; variant "tiny"."""
    tiny, mini = is_tiny(variant), load_recipe(__file__, "mini_rates")
    return Study(
        "Tables 4 and 5 and figure 4 in miniature",
        "Is the prior term needed, and which; what do contexts want?",
        mini.RECIPE,
        (
            mini.arm("VA-π"),
            mini.arm("LPIPS, no prior", rewards="lpips", **NO_PRIOR),
            mini.arm("MSE + LPIPS, no prior", **NO_PRIOR),
            mini.arm("CE only", "sft", **{"sft.weight": 0.1}),
            mini.arm("CE, β = 1", **{"vapi.ce_weight": 1.0}),
            mini.arm("KL, β = 0.1", **NO_PRIOR, **{"vapi.kl_weight": 0.1}),
            mini.arm("KL, β = 1", **NO_PRIOR, **{"vapi.kl_weight": 1.0}),
            mini.arm("ξ = 0.5", **{"vapi.noise_rate": 0.5}),
            mini.arm("ξ = 0.95", **{"vapi.noise_rate": 0.95}),
        ),
        against="VA-π",
        **mini.common(tiny),
    )
