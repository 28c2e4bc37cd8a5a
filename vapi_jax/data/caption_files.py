"""Captions and prompts that people keep in text files."""

from __future__ import annotations

import json
from pathlib import Path

from vapi_jax.common.files import read_text
from vapi_jax.data.config import DataError

LONGEST = 20_000
"""Letters of a caption; what is longer is no caption, and cleaning takes the square of it in time."""


def fault_of(text: str) -> str:
    """What a text has that no caption has, or ""."""
    if len(text) > LONGEST:
        return f"more than {LONGEST} letters"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "half of a surrogate pair, which is no letter"
    return ""


def read_captions(path: Path) -> list[str]:
    """The captions of a file, one a line: as they are in `.txt`, or in `.jsonl` as JSON strings.

    An empty line is an empty caption, so that caption i is line i + 1.

    Raises:
      DataError: the file is of another kind, cannot be read, is no text, holds no caption or a line that
        is none.
    """
    kind = path.suffix.lower()
    if kind not in (".txt", ".jsonl"):
        raise DataError(
            f"{path}: captions are read from .txt, one a line, or .jsonl, a JSON string a line"
        )
    try:
        # Only line feeds end a line: a caption may hold any other separator.
        lines = read_text(path).split("\n")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text in UTF-8: {error}") from error
    if not lines[-1]:
        del lines[-1]
    captions = []
    for number, line in enumerate(lines, 1):
        caption = line.removesuffix("\r")
        if kind == ".jsonl":
            caption = _unquoted(line, f"{path}, line {number}")
        if len(caption) > LONGEST:
            raise DataError(f"{path}, line {number}: {len(caption)} letters are no caption")
        captions.append(caption)
    if not captions:
        raise DataError(f"{path} holds no captions")
    return captions


def _unquoted(line: str, where: str) -> str:
    try:
        text = json.loads(line)
        if isinstance(text, str):
            text.encode()  # half of a surrogate pair is no letter
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: {error}") from error
    if not isinstance(text, str):
        raise DataError(
            f'{where}: a {type(text).__name__}; wants a JSON string such as "a red cat"'
        )
    return text
