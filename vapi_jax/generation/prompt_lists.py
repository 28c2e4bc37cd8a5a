"""Prompts in files of every kind, and in benchmarks' own."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vapi_jax.common.errors import ExpectedError
from vapi_jax.common.files import read_text
from vapi_jax.common.paths import is_local, local_path
from vapi_jax.data.caption_files import fault_of
from vapi_jax.data.tab_rows import cells, rows

MOST_PROMPTS = 1 << 20

_SUFFIXES = (".txt", ".jsonl", ".json", ".tsv", ".csv")
_COLUMNS = ("prompt", "Prompt", "Prompts", "text", "caption")
_GENEVAL = ("tag", "include", "prompt")


class PromptError(ExpectedError, ValueError):
    """Prompts that cannot be read, or that are none of the layout asked for."""


@dataclasses.dataclass(frozen=True)
class Prompts:
    """What images are wanted for.

    Attributes:
      texts: the prompts.
      lines: of GenEval's metadata, one a prompt, as they are in the file; empty in other layouts.
      places: for HPSv2, "STYLE/00000" of each prompt; empty in other layouts.
      source: name of the file, or the one text.
    """

    texts: tuple[str, ...]
    lines: tuple[str, ...]
    places: tuple[str, ...]
    source: str

    @property
    def facts(self) -> dict[str, Any]:
        """For the recipe."""
        text = json.dumps([self.texts, self.lines, self.places])
        digest = hashlib.sha256(text.encode()).hexdigest()
        return {"rule": self.source, "prompts": len(self.texts), "sha256": digest}


def prompts_at(text: str) -> Path | str:
    """What a user means: a file or folder that is there, or the prompt itself.

    Raises:
      PathError: a bucket.
    """
    if not is_local(text):
        return local_path(text)
    try:
        if (path := local_path(text)).exists():
            return path
    except (OSError, ValueError):  # longer than any name, or empty
        pass
    return text


def read_prompts(asked: Path | str, layout: str) -> Prompts:
    """The prompts of a file, or one that is given as a text.

    Args:
      asked: `.txt` with a prompt on each line; `.jsonl` with JSON strings, or objects that have a
        prompt, Prompt, Prompts, text or caption; `.tsv` or `.csv` with such a column; `.json` with a list of
        texts; for "hps" one such file, whose name is the style, or a folder of them.
      layout: "geneval" wants the lines of GenEval's metadata.

    Raises:
      PromptError: there is no such file, or it holds something else.
    """
    lines: tuple[str, ...] = ()
    places: tuple[str, ...] = ()
    if isinstance(asked, str):
        if asked.lower().endswith(_SUFFIXES) and not any(c.isspace() for c in asked):
            raise PromptError(f"--prompts: there is no file {asked}")
        prompts, source = [_checked(asked, "the text")], asked
    else:
        source = asked.name
        files = sorted(asked.glob("*.json")) if asked.is_dir() else [asked]
        if (asked.is_dir() and layout != "hps") or not files:
            raise PromptError(f"--prompts: {asked} is a folder; only hps takes one, of .json files")
        found = [_rows(file) for file in files]
        prompts = [text for part in found for text, _ in part]
        lines = tuple(line for part in found for _, line in part) if layout == "geneval" else ()
        if layout == "hps":
            places = tuple(
                f"{file.stem}/{index:05d}"
                for file, part in zip(files, found, strict=True)
                for index in range(len(part))
            )
    if layout == "geneval" and not lines:
        raise PromptError("--layout geneval wants GenEval's evaluation_metadata.jsonl as --prompts")
    if layout == "hps" and not places:
        raise PromptError("--layout hps wants a file of prompts, whose name is the style")
    for number, line in enumerate(lines, 1):
        if not all(name in line for name in _GENEVAL):
            raise PromptError(
                f"--prompts: {source}, line {number} has no {', '.join(_GENEVAL)}: --layout geneval "
                "wants GenEval's evaluation_metadata.jsonl"
            )
    if not 0 < len(prompts) <= MOST_PROMPTS:
        raise PromptError(
            f"--prompts: {source} holds {len(prompts)} prompts; 1 to {MOST_PROMPTS} do"
        )
    return Prompts(tuple(prompts), lines, places, source)


def _rows(path: Path) -> list[tuple[str, str]]:
    """(prompt, its line) of a file."""
    kind = path.suffix.lower()
    try:
        found = list(_parsed(kind, read_text(path)))
    except OSError as error:
        raise PromptError(f"--prompts: {path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError, csv.Error) as error:
        raise PromptError(f"--prompts: {path}: {error}") from error
    one = "prompt" if kind in (".json", ".tsv", ".csv") else "line"
    return [
        (_checked(value, f"{path}, {one} {number}"), line)
        for number, (value, line) in enumerate(found, 1)
    ]


def _checked(prompt: Any, where: str) -> str:
    if not isinstance(prompt, str):
        raise PromptError(
            f"--prompts: {where} is no text: a string is wanted, or one of {', '.join(_COLUMNS)}"
        )
    if not prompt.strip():
        raise PromptError(f"--prompts: {where} is empty: write a prompt there, or take it out")
    if fault := fault_of(prompt):
        raise PromptError(f"--prompts: {where} has {fault}")
    return prompt


def _parsed(kind: str, text: str) -> Iterator[tuple[Any, str]]:
    if kind == ".tsv":
        found = (cells(row.decode()) for row in rows(io.BytesIO(text.encode())))
        names = next(found, [])
        for row in filter(None, found):
            yield _prompt(dict(zip(names, row, strict=False))), ""
    elif kind == ".csv":
        for named in csv.DictReader(io.StringIO(text, newline="")):
            yield _prompt(named), ""
    elif kind == ".json":
        if not isinstance(values := json.loads(text), list):
            raise ValueError(f"a list of prompts is wanted, not a {type(values).__name__}")
        for value in values:
            yield _prompt(value), ""
    else:
        # Only line feeds end a line, and the last one ends the file.
        for number, line in enumerate(text.removesuffix("\n").split("\n"), 1):
            line = line.removesuffix("\r")
            yield (_unquoted(line, number) if kind == ".jsonl" and line.strip() else line), line


def _unquoted(line: str, number: int) -> Any:
    try:
        return _prompt(json.loads(line))
    except json.JSONDecodeError as error:
        raise ValueError(f"line {number}: {error.msg} at letter {error.colno}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"line {number}: {error}") from error


def _prompt(value: Any) -> Any:
    if isinstance(value, dict):
        return next((value[name] for name in _COLUMNS if name in value), None)
    return value
