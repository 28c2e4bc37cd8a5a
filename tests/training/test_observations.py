"""The table in docs/reliability.md holds what the tests see, and nothing else."""

import ast
import re
from pathlib import Path

from tests.helpers.observations import read_rows


def observed_faults():
    """A pattern for every first argument of `observe(...)` in the tests."""
    for path in Path(__file__).parents[1].rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "observe":
                parts = getattr(node.args[0], "values", [node.args[0]])
                yield "".join(
                    re.escape(part.value) if isinstance(part, ast.Constant) else ".+"
                    for part in parts
                )


def test_every_row_is_of_a_test_that_still_exists():
    patterns = list(observed_faults())
    assert len(patterns) > 20
    rows = read_rows()
    stale = [fault for fault in rows if not any(re.fullmatch(p, fault) for p in patterns)]
    assert stale == []


def test_every_kind_of_fault_has_its_rows():
    patterns = list(observed_faults())
    rows = read_rows()
    assert [p for p in patterns if not any(re.fullmatch(p, fault) for fault in rows)] == []
