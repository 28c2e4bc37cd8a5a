"""Rows of a list with tabs between its cells, as plain programs and as pandas and spreadsheets write them.

The latter put a cell that has quotes, tabs or line breaks into quotes and double those inside. The former
leave a caption that begins with a quote as it is, so cells are unquoted only where the whole row is quoted
by that rule.
"""

from __future__ import annotations

import collections
import csv
from collections.abc import Iterable, Iterator

_MOST_LINES = 100  # of a row


def rows(lines: Iterable[bytes]) -> Iterator[bytes]:
    """Rows as they are in the file: each a line, or the lines that a quoted cell goes on over."""
    left, waiting = iter(lines), collections.deque[bytes]()

    def following() -> bytes:
        return waiting.popleft() if waiting else next(left, b"")

    while line := following():
        taken = [line]
        while _open(b"".join(taken)) and len(taken) < _MOST_LINES and (more := following()):
            taken.append(more)
        if len(taken) > 1:
            found = _unquoted(b"".join(taken).decode(errors="replace"))
            # A quote that nothing closes takes in the next row, and with it a tab.
            if found is None or any("\t" in cell for cell in found):
                waiting.extendleft(reversed(taken[1:]))
                del taken[1:]
        yield b"".join(taken)


def cells(row: str) -> list[str]:
    """The cells of a row."""
    found = _unquoted(row)
    return row.rstrip("\r\n").split("\t") if found is None else found


def _open(row: bytes) -> bool:
    """Whether the last cell begins with a quote and has not ended."""
    last = row.rpartition(b"\t")[2]
    return last.startswith(b'"') and last.count(b'"') % 2 == 1


def _unquoted(row: str) -> list[str] | None:
    """The cells of a row that is quoted by the rule throughout, or needs no quotes; else None."""
    try:
        (found,) = csv.reader([row.rstrip("\r\n")], delimiter="\t", strict=True)
    except (csv.Error, ValueError):
        return None
    return found
