"""Tables for a terminal."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any


def cell(value: Any) -> str:
    """A value in a few letters: four digits of a float, None as "-"."""
    if value is None:
        return "-"
    if isinstance(value, str | bool):
        return str(value)
    if isinstance(value, numbers.Integral):
        return str(value)
    return f"{float(value):.4g}"


def format_table(rows: Sequence[Sequence[Any]], headers: Sequence[str]) -> str:
    """Plain aligned text: the first column to the left, the others to the right, None as '-'.

    Raises:
      ValueError: a row has another number of cells than the header.
    """
    for row in rows:
        if len(row) != len(headers):
            raise ValueError(f"row {list(row)} has {len(row)} cells, the header {len(headers)}")
    texts = [list(headers)] + [[cell(value) for value in row] for row in rows]
    widths = [max(len(row[i]) for row in texts) for i in range(len(headers))]

    def line(cells: Sequence[str]) -> str:
        rest = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return "  ".join([cells[0].ljust(widths[0]), *rest]).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([line(texts[0]), rule, *map(line, texts[1:])])
