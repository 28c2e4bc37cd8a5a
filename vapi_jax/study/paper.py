"""What the studies of the paper's tables share: its figures, its arms, and how ":tiny" shrinks them.

Figures are of arXiv 2512.19680 unless an arm says otherwise. CCA's are of arXiv 2410.09347, by the same
evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vapi_jax.study.spec import Arm, Draw, Figures, Files, StudyError

REFERENCE = "weights/VIRTUAL_imagenet256_labeled.npz"
INCEPTION = "weights/pt_inception-2015-12-05-6726825d.pth"
METADATA = "weights/evaluation_metadata.jsonl"

STE_STEPS = 14_000
"""In the published 381 minutes, at the throughput of the authors' code; the paper gives no number."""

ONE_DEVICE = {"cpu_devices": 1, "mesh.data": 1, "mesh.fsdp": 1}
"""Changes of a miniature: virtual devices slow sampling, and processes make more of cores."""

PLAIN, GUIDED = "plain", "guided"
_FIDELITY = ("fid", "is", "adm/precision", "adm/recall")
_GENEVAL = (
    "position", "colors", "color_attr", "counting", "single_object", "two_object", "overall",
)  # fmt: skip


def is_tiny(variant: str) -> bool:
    """Whether a study is asked for in its tiny form.

    Raises:
      StudyError: for another variant.
    """
    if variant not in ("", "tiny"):
        raise StudyError(f"variant {variant!r}: known variants are '' and 'tiny'")
    return variant == "tiny"


def fidelity(plain: Sequence[float] = (), guided: Sequence[float] = ()) -> Figures:
    """FID, IS, precision and recall without guidance, and with it; as far as they are published."""
    given = {PLAIN: plain, GUIDED: guided}
    return {draw: dict(zip(_FIDELITY, row, strict=False)) for draw, row in given.items() if row}


def geneval(*row: float) -> Figures:
    """Position, colours, attributes, counting, single object, two objects, overall."""
    named = zip(_GENEVAL, row, strict=True)
    return {GUIDED: {f"geneval/{task}": value for task, value in named}}


def tiny_study(classes: bool = True) -> dict[str, Any]:
    """Of a `Study` that shows in a minute or two that every arm works.

    Args:
      classes: whether the recipes' generator is the shipped one, of class labels.
    """
    changes = {"policy.dtype": "float32"} if classes else {}  # a CPU's bfloat16 is slow
    small = {"seeds": 1, "sampling_seeds": 1, "samples": 32, "features": ("vgg_relu4_3",)}
    return {"changes": changes, **small}


def class_files(checkpoint: str) -> Files:
    """FID and IS of Table 2."""
    return Files("adm50k", checkpoint, reference=REFERENCE, inception=INCEPTION)


def class_arms(size: str, tiny: bool, published: Mapping[str, Figures]) -> tuple[Arm, ...]:
    """The arms of Table 2, and CCA's, for a generator of LlamaGen's.

    Args:
      size: "XL" or "XXL".
      tiny: on the recipes' tiny forms.
      published: name of an arm -> its figures.
    """
    weights = f"weights/c2i_{size.lower()}"
    generator = {"policy.size": f"GPT-{size}", "init.gpt": weights, "init.vq": weights}
    more = {} if tiny else generator

    def arm(name: str, recipe: str, variant: str = "", longer: bool = False, **changes: Any) -> Arm:
        variant = "tiny" if tiny else variant
        where = f"{recipe}:{variant}" if variant else recipe
        own = {**changes, **({"steps": 3} if tiny and longer else {})}
        return Arm(name, {**more, **own}, recipe=where, published=published.get(name, {}))

    # Presets "reference" are of the released scripts, which made the figures that are published.
    return (
        arm("VA-π", f"c2i_{size.lower()}"),
        arm("STE", "xxl_ste"),
        arm("STE, longer", "xxl_ste", longer=True, steps=STE_STEPS),
        arm("tokenizer", "xxl_tokenizer_post", "short"),
        arm("tokenizer, longer", "xxl_tokenizer_post", "long", longer=True),
        arm("AR-GRPO", "xl_ar_grpo", preset="reference"),
        arm("CCA, equal budget", "xxl_cca", "equal"),
        arm("CCA", "xxl_cca", longer=True, preset="reference"),
    )


def class_draws(guidance: float) -> dict[str, Draw]:
    """Without guidance and with it."""
    return {PLAIN: Draw(), GUIDED: Draw(cfg_scale=guidance)}
