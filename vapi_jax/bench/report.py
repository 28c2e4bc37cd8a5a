"""What a benchmark says to a person: tables for the terminal, Markdown and a plot for a document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vapi_jax.bench.scaling import H100
from vapi_jax.common.tables import format_table

_PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def quantity(value: float | None, unit: str) -> str:
    """1.2e12, "FLOP" -> "1.20 TFLOP"."""
    if value is None:
        return "unknown"
    for scale, prefix in _PREFIXES:
        if abs(value) >= scale:
            return f"{value / scale:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def _range(result: Mapping[str, Any], name: str) -> str:
    low, high = result[f"{name}_quartiles"]
    return f"{result[f'{name}_per_step']:.3f} s (quartiles {low:.3f} to {high:.3f})"


def collective_rows(result: Mapping[str, Any]) -> list[list[Any]]:
    """kind, executions, bytes put in and bytes sent by one device in one step."""
    return [
        [
            f"{kind} of {', '.join(total['dtypes'])}",
            total["executions"],
            quantity(total["operand_bytes"], "B"),
            quantity(total["sent_bytes"], "B"),
        ]
        for kind, total in result["collectives_per_device"].items()
    ]


def _counts(result: Mapping[str, Any]) -> list[str]:
    compiled = quantity(result["compiled_flops"], "FLOP")
    if not result["compiled_flops_exact"]:
        compiled += " at least, for some loops are of unknown length"
    if calls := result["compiled_flops_uncounted_calls"]:
        compiled += f"; library calls not counted: {', '.join(sorted(calls))}"
    return [
        f"model        {quantity(result['model_flops'], 'FLOP')} a step, counted from the configuration",
        f"compiled     {compiled}, matrix products and convolutions of the executable",
        f"XLA          {quantity(result['cost_analysis_flops'], 'FLOP')} by its cost analysis, "
        "which counts the body of a loop once",
        f"compile      {result['compile_seconds']:.1f} s, tracing included",
        f"memory       {quantity(result['peak_memory_bytes'], 'B')} a device, "
        f"{result['peak_memory_source']}",
    ]


def text_report(result: Mapping[str, Any]) -> str:
    """Everything that was measured, for a terminal."""
    device = result["device"]
    lines = [
        f"{result['name']} on {device['count']} x {device['kind']} ({device['platform']}), mesh "
        f"{device['mesh']}, jax {result['versions']['jax']}",
        *(f"{subject:<12} {note}" for subject, note in result["notes"].items()),
    ]
    if "seconds_per_step" in result:
        lines += [
            f"step         {_range(result, 'seconds')}, {result['images_per_second']:.3g} images/s",
            f"speed        {quantity(result['achieved_flops_per_second'], 'FLOP/s')}, "
            f"{100 * result['peak_share']:.1f} % of "
            f"{quantity(result['peak_flops_per_second'], 'FLOP/s')} ({result['peak_source']})",
        ]
        if result["ratio"] is not None:
            low, high = result["ratio_quartiles"]
            lines += [
                f"plain step   {_range(result, 'plain_seconds')}",
                f"ratio        {result['ratio']:.2f} (quartiles of pairs {low:.2f} to {high:.2f}); "
                f"in processor time {result['ratio_of_processor_seconds']:.2f}",
            ]
        wait = result["input_wait_seconds"]
        lines.append(
            "input        the recipe's data are not here: not measured"
            if wait is None
            else f"input        a step waits {wait:.4f} s for its batch"
        )
    lines += _counts(result)
    if result.get("phases"):
        whole = result["seconds_per_step"]
        rows = [
            [name, f"{seconds:.4f}", f"{100 * seconds / whole:.0f} %"]
            for name, seconds in result["phases"].items()
        ]
        rows.append(["sum", f"{result['phases_sum']:.4f}", ""])
        rows.append(["whole step", f"{whole:.4f}", ""])
        lines += ["", format_table(rows, ["phase alone", "seconds", "of the step"])]
    if rows := collective_rows(result):
        headers = ["collective", "executions", "put in", "sent"]
        lines += ["", "One device in one step:", format_table(rows, headers)]
    if predictions := result.get("scaling"):
        lines += [
            "",
            f"Seconds a step by arithmetic, not measured ({H100.name}; {100 * H100.utilisation:.0f} % of "
            f"the peak, {100 * H100.achieved:.0f} % of the links):",
            format_table(scaling_rows(predictions), SCALING_HEADERS),
        ]
    return "\n".join(lines)


def scaling_rows(predictions: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """A row for each prediction: seconds by part, and the step hidden and exposed."""
    parts = ("compute", "gathers", "reduction", "hidden", "exposed")
    return [
        [found["devices"], found["images"], *(f"{found[part]:.3f}" for part in parts)]
        for found in predictions
    ]


SCALING_HEADERS = (
    "devices", "images", "compute", "gathers", "reduction", "gathers hidden", "nothing hidden",
)  # fmt: skip


def markdown(rows: Sequence[Sequence[Any]], headers: Sequence[str]) -> str:
    """A Markdown table."""
    lines = [list(headers), ["---"] * len(headers), *([str(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def replace_block(text: str, name: str, content: str) -> str:
    """The text with what stands between the marks of a block replaced; appended if there are none."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    block = f"{begin}\n{content}\n{end}"
    if begin in text and end in text:
        head, _, rest = text.partition(begin)
        return f"{head}{block}{rest.partition(end)[2]}"
    return f"{text.rstrip()}\n\n{block}\n".lstrip()
