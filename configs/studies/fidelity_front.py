"""Fidelity against diversity over temperature and guidance, base and VA-π: does tuning move the front?

    python -m vapi_jax.study --study=configs/studies/fidelity_front.py --workdir=studies/front

Every table holds one or two points of a curve that any generator can be moved along: sharper draws raise IS
and precision and cost recall. If VA-π only moves along it, a temperature or a guidance of the base does the
same. Its page has FID, IS, precision and recall of both at every point. Needs what table2_xxl.py needs.
":tiny" draws two points of the shipped models. Not run yet.
"""

from vapi_jax.study.paper import class_files, is_tiny, tiny_study
from vapi_jax.study.spec import Arm, Draw, Study

TEMPERATURES, SCALES = (0.8, 0.85, 0.9, 0.95), (1.25, 1.5, 1.75, 2.0, 2.5)


def get_study(variant: str = "") -> Study:
    """The study; variant "tiny"."""
    tiny = is_tiny(variant)
    draws = {"T = 1": Draw()}
    draws |= {f"T = {t:g}": Draw(temperature=t) for t in TEMPERATURES[-1 if tiny else 0 :]}
    draws |= {} if tiny else {f"guidance {s:g}": Draw(cfg_scale=s) for s in SCALES}
    given = tiny_study() if tiny else {"samples": 5000, "seeds": 4, "sampling_seeds": 1}
    return Study(
        "fidelity front, LlamaGen-XXL",
        "Does VA-π move the front of fidelity and diversity, or along it?",
        "c2i_xxl:tiny" if tiny else "c2i_xxl",
        (Arm("VA-π"),),
        draws=draws,
        files=None if tiny else class_files("weights/c2i_xxl"),
        **given,
    )
