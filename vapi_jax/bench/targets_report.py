"""What a target's compiler says, for people: the command, its table, and the tables of docs/targets.md."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from vapi_jax.bench import fitting, targets
from vapi_jax.bench.report import markdown, quantity, replace_block
from vapi_jax.bench.targets import PALLAS, SAMPLES, Figures
from vapi_jax.common.errors import exit_status
from vapi_jax.common.tables import format_table
from vapi_jax.methods.config import TrainConfig
from vapi_jax.methods.resolve import resolve
from vapi_jax.parallel.targets import Target, parse

PARTS = (*targets.TOLD, "temporary")

_ADVICE = {
    "sampling": f"draw fewer than {SAMPLES} images at once (`vapi_jax.sample --batch`)",
    "decoding": "decode fewer images at once (config.decode_chunk)",
    "evaluation": "judge fewer images (config.eval.images)",
}


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A recipe on a target.

    Attributes:
      target: its name.
      figures: of the recipe as it is.
      proposal: the fastest setting whose step fits, and that step's figures; None where nobody looked for
        it, or none was found.
    """

    target: str
    figures: list[Figures]
    proposal: tuple[fitting.Setting, Figures] | None

    @property
    def fits(self) -> bool:
        return all(one.fits for one in self.figures)


def judge(
    config: TrainConfig,
    target: Target,
    programs: Sequence[str] = tuple(targets.PROGRAMS),
    fastest: bool = False,
) -> Verdict:
    """Compiles a recipe for a target, and looks for the fastest setting where its step does not fit.

    Args:
      config: the recipe.
      target: the devices.
      programs: those of `targets.PROGRAMS` to compile.
      fastest: look for it where the step does fit, too.

    Raises:
      ConfigError, TargetError: as `targets.examine`.
    """
    found, proposal = targets.examine(config, target, programs), None
    if any(one.program == "step" and (fastest or not one.fits) for one in found):
        proposal = fitting.fastest(config, target)
    return Verdict(target.name, found, proposal)


def check(raw: Any, name: str, as_json: bool) -> int:
    """`vapi_jax.main --check --target=NAME`: prints the verdict on a recipe.

    Returns:
      The exit status: 0 where everything fits.
    """

    def work() -> int:
        # What is attached to this machine stays free: it is not what is compiled for.
        jax.config.update("jax_platforms", "cpu")
        verdict = judge(resolve(raw), parse(name))
        print(json.dumps(to_json(verdict), indent=2) if as_json else render(verdict))
        return 0 if verdict.fits else 1

    return exit_status(work)


def to_json(verdict: Verdict) -> dict[str, Any]:
    """All figures; what is not known is null."""

    def clean(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: clean(one) for key, one in value.items()}
        if isinstance(value, list | tuple):
            return [clean(one) for one in value]
        return None if isinstance(value, float) and math.isnan(value) else value

    found: dict[str, Any] = clean(dataclasses.asdict(verdict) | {"fits": verdict.fits})
    return found


# --- words ----------------------------------------------------------------------------------------


def _bytes(value: float | None) -> str:
    return "-" if value is None else f"{value / 1e9:.2f} GB"


def _flops(found: Figures) -> str:
    if math.isnan(found.flops):
        return "-"
    text = quantity(found.flops, "FLOP")
    text = text if found.exact else f"at least {text}"
    return f"{text} and Pallas" if PALLAS in found.uncounted else text


def _cells(found: Figures) -> dict[str, str]:
    """What a table says of a program, by heading."""
    return {
        "fits": "yes" if found.fits else "NO",
        "peak memory": _bytes(found.peak),
        **{name: _bytes(found.parts.get(name)) for name in PARTS},
        "FLOP": _flops(found),
        "sent": _bytes(found.sent),
        "attention": found.attention or "-",
        "at float32's speed": f"{100 * found.float32:.1f} %",
        "compiled in": f"{found.seconds:.0f} s",
    }


def render(verdict: Verdict) -> str:
    """The verdict for a terminal."""
    cells = {found.program: _cells(found) for found in verdict.figures}
    rows = [[name, *(one[name] for one in cells.values())] for name in next(iter(cells.values()))]
    lines = [format_table(rows, [f"a device of {verdict.target}", *cells])]
    collectives = [
        [f"{found.program}: {kind} of {', '.join(total.dtypes)}", total.executions,
         quantity(total.operand_bytes, "B"), quantity(total.sent_bytes, "B")]
        for found in verdict.figures for kind, total in found.collectives.items()
    ]  # fmt: skip
    if collectives:
        lines += ["", format_table(collectives, ["collective", "executions", "put in", "sent"])]
    slow = [
        [f"{found.program}: {place}", shapes, f"{100 * share:.2f} %"]
        for found in verdict.figures
        for place, shapes, share in found.largest
    ]
    if slow:
        headers = ["largest at float32's speed", "operands", "of all FLOP"]
        lines += ["", format_table(slow, headers)]
    return "\n".join([*lines, *(f"\n{line}" for line in advice(verdict))])


def advice(verdict: Verdict) -> list[str]:
    """A line for everything that does not fit, with what to change, and for the fastest setting."""
    lines = []
    for found in verdict.figures:
        if not found.fits:
            change = _ADVICE.get(found.program)
            lines.append(f"the {found.program} does not fit{f': {change}' if change else ''}")
    if verdict.proposal is not None:
        setting, found = verdict.proposal
        lines.append(
            f"the fastest step that fits, by prediction, with {_bytes(found.peak)}:\n  {setting}"
        )
    elif any(one.program == "step" and not one.fits for one in verdict.figures):
        lines.append(
            "no setting of microbatch_size, remat and decode_chunk that was tried fits: take more devices, "
            "with config.mesh.fsdp=-1"
        )
    return lines


# --- docs/targets.md ------------------------------------------------------------------------------


def settings_text(config: TrainConfig) -> str:
    """The options that decide over memory, in a few words."""
    micro, remat = config.microbatch_size or config.batch_size, config.policy.get("remat", "none")
    chunk = config.decode_chunk or "auto"
    return f"microbatch {micro}, remat {remat}, chunk {chunk}"


def doc_rows(verdict: Verdict, config: TrainConfig) -> list[list[str]]:
    """The verdict's rows of the document: a program each, and the proposal's step."""
    rows = [
        [f"{verdict.target} {found.program}", settings_text(config), *_cells(found).values()]
        for found in verdict.figures
    ]
    if verdict.proposal is not None:
        setting, found = verdict.proposal
        rows.append(
            [f"{verdict.target} step, as proposed", settings_text(setting.of(config)),
             *_cells(found).values()]
        )  # fmt: skip
    return rows


def write_docs(verdicts: Sequence[Verdict], config: TrainConfig, page: Path) -> None:
    """Puts the verdicts into the recipe's table; rows of other targets and programs stay."""
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    name = f"targets of {config.name}"
    rows: dict[str, list[list[str]]] = {}
    inside = text.partition(f"<!-- {name} -->")[2].partition(f"<!-- end of {name} -->")[0]
    for line in inside.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if ":" in cells[0]:  # or it is of the header
            rows.setdefault(cells[0].split()[0], []).append(cells)
    headers = ["", "setting", *_cells(verdicts[0].figures[0])]
    for verdict in verdicts:
        # A program's rows, whatever follows its name: "h100:8 step" and "h100:8 step, as proposed".
        new = doc_rows(verdict, config)
        written = {row[0].partition(",")[0] for row in new}
        old = rows.get(verdict.target, [])
        rows[verdict.target] = [row for row in old if row[0].partition(",")[0] not in written] + new
    ordered = [row for target in sorted(rows) for row in rows[target]]
    page.write_text(replace_block(text, name, markdown(ordered, headers)), encoding="utf-8")
