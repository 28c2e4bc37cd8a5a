"""The table in docs/reliability.md: what the tests did to a run, and what they saw happen.

`observe` compares a row with the committed table, in which only numbers may differ; with
VAPI_WRITE_DOCS=1 it writes the row there instead. So the table is what the tests have seen, and a
sentence that is no longer true fails.
"""

import os
import re

from tests.helpers.paths import ROOT

DOC = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- rows: written by the tests -->", "<!-- end of rows -->"
HEADER = "| fault | what happened |\n|---|---|"


def read_rows():
    """{fault: what happened} of the committed table, in its order."""
    text = DOC.read_text(encoding="utf-8")
    inside = text.partition(BEGIN)[2].partition(END)[0]
    rows = [line.strip("| ").split(" | ") for line in inside.splitlines() if line.startswith("| ")]
    return dict(rows[1:])


def observe(fault, happened):
    """A row of the table."""
    rows = read_rows()
    if os.environ.get("VAPI_WRITE_DOCS"):
        rows[fault] = happened
        lines = [HEADER] + [f"| {fault} | {rows[fault]} |" for fault in sorted(rows)]
        text = DOC.read_text(encoding="utf-8")
        before, after = text.partition(BEGIN)[0], text.partition(END)[2]
        DOC.write_text("\n".join([before + BEGIN, *lines, END]) + after, encoding="utf-8")
        return
    assert fault in rows, f"{DOC} lacks {fault!r}: run the test with VAPI_WRITE_DOCS=1"
    assert _without_numbers(rows[fault]) == _without_numbers(happened), rows[fault]


def _without_numbers(text):
    return re.sub(r"\d+(\.\d+)?", "#", text)
