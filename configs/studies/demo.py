"""Does VA-π give more than sharpening, on the demo's photographs?

    python -m vapi_jax.study --study=configs/studies/demo.py --workdir=studies/demo

Four trainings an arm; the base beside them as it is, sharpened, and at each arm's entropy. ":tiny" shows in
a minute or two that it works.
"""

from vapi_jax.study.spec import Arm, Draw, Study

ARMS = (
    Arm("VA-π"),
    Arm("CE only", {"method": "sft", "sft.weight": 0.1}),
    Arm("shuffled advantages", {"vapi.shuffle_advantages": True}),
    Arm("base, T=0.9", draw=Draw(temperature=0.9), trained=False),
)


def get_study(variant: str = "") -> Study:
    """The study; variant "tiny"."""
    if variant not in ("", "tiny"):
        raise ValueError(f"configs/studies/demo.py:{variant}: known variants are '', 'tiny'")
    question = "Does VA-π give more than sharpening, on the demo's photographs?"
    if variant == "tiny":
        return Study(
            "demo, tiny", question, "c2i_demo:tiny", ARMS[:1] + ARMS[-1:], seeds=2, sampling_seeds=1,
            samples=32, features=("vgg_relu4_3",),
        )  # fmt: skip
    return Study("demo", question, "c2i_demo", ARMS, samples=2048)
