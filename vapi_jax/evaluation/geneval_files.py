"""Files that GenEval's scores are made from: metadata, detections, results. Any of them may be anyone's."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vapi_jax.common.files import read_json, read_text
from vapi_jax.rewards.geneval import (
    COLORS,
    GenevalError,
    Objects,
    Prompt,
    Rules,
    Verdict,
    judge,
    parse_prompt,
)

PUBLISHED = "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"
"""SHA-256 of evaluation_metadata.jsonl."""

PROMPTS, SAMPLES = 553, 4

# COCO's names of three classes, which GenEval's metadata call otherwise.
_RENAMED = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}
_PLACE = re.compile(r"(?:^|/)([0-9]{1,9})/samples/([0-9]{1,9})\.png$")
_MOST_BOXES = 10_000  # of a class in an image
_ROUNDED = 1e-6  # what a softmax in float32 may exceed 1 by


@dataclasses.dataclass(frozen=True)
class Image:
    """One image's verdict.

    Attributes:
      prompt, sample: which it is.
      file: its name in the file that was read.
      verdict: of it.
      given: the verdict that the file itself holds; None where it holds none.
    """

    prompt: int
    sample: int
    file: str
    verdict: Verdict
    given: bool | None = None


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no number")


def lines_of(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, JSON object) of every line."""
    try:
        lines = read_text(path).split("\n")
    except OSError as error:
        raise GenevalError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise GenevalError(f"{path} is no text in UTF-8: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        yield where, _object(line, where)


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise GenevalError(f"{where}: {error}") from error
    if not isinstance(value, dict):
        raise GenevalError(f"{where}: a JSON object is wanted, not a {type(value).__name__}")
    return value


# --- metadata -------------------------------------------------------------------------------------


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file such as GenEval's evaluation_metadata.jsonl.

    Raises:
      GenevalError: it cannot be read, or a line is none of GenEval's.
    """
    prompts = [parse_prompt(value, where) for where, value in lines_of(path)]
    if not prompts:
        raise GenevalError(
            f"{path} holds no prompts; GenEval's evaluation_metadata.jsonl is wanted"
        )
    return prompts


# --- detections -----------------------------------------------------------------------------------


def parse_objects(value: Any) -> dict[str, Objects]:
    """What a detector found in an image: {class: {"boxes": [...], "colors": [...]}} or {class: [...]}.

    Raises:
      GenevalError: it is something else.
    """
    if not isinstance(value, dict):
        raise GenevalError(f"detections are {{class: boxes}}, not a {type(value).__name__}")
    if old := sorted(value.keys() & _RENAMED.keys()):
        told = ", ".join(f"{name!r} is {_RENAMED[name]!r}" for name in old)
        raise GenevalError(f"these are COCO's names; in GenEval {told}")
    return {name: _found(found, f"{name!r:.40}") for name, found in value.items()}


def _found(value: Any, where: str) -> Objects:
    boxes, colors = value, None
    if isinstance(value, dict):
        boxes, colors = value.get("boxes"), value.get("colors")
    if not isinstance(boxes, list) or len(boxes) > _MOST_BOXES:
        raise GenevalError(f"{where}: boxes are a list of at most {_MOST_BOXES}")
    for box in boxes:
        if not isinstance(box, list) or len(box) != 5 or not all(map(_is_number, box)):
            raise GenevalError(f"{where}: a box is [x0, y0, x1, y1, score], not {box!r:.80}")
        if abs(box[4] - 0.5) > 0.5 + _ROUNDED:
            raise GenevalError(f"{where}: a score is a confidence from 0 to 1, not {box[4]!r:.20}")
    if colors is not None:
        if not isinstance(colors, list) or len(colors) != len(boxes):
            raise GenevalError(f"{where}: colors are a list, one for each of {len(boxes)} boxes")
        if unknown := [color for color in colors if color not in COLORS]:
            raise GenevalError(f"{where}: {unknown[0]!r:.40} is none of {', '.join(COLORS)}")
        colors = tuple(colors)
    return Objects(np.array(boxes, np.float64).reshape(-1, 5), colors)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e9 and math.isfinite(value)


# --- images ---------------------------------------------------------------------------------------


def place_of(value: Mapping[str, Any], where: str) -> tuple[str, int, int]:
    """File, number of the prompt, number of the sample."""
    name = value.get("filename")
    found = _PLACE.search(name.replace("\\", "/")) if isinstance(name, str) else None
    if not isinstance(name, str) or found is None:
        raise GenevalError(
            f"{where}: filename {name!r:.80}; wants PROMPT/samples/SAMPLE.png, such as "
            "00000/samples/0000.png"
        )
    return name, int(found[1]), int(found[2])


def judge_file(path: Path, prompts: list[Prompt], rules: Rules) -> list[Image]:
    """Verdicts of a file with one JSON object an image, in order of prompt and sample.

    Args:
      path: detections, {"filename", "detections": {class: {"boxes", "colors"}}}; or results of the
        original evaluator, whose boxes are judged again, or of this command. Results keep no colours:
        for prompts that ask for one, and for lines without details, the file's own verdict holds.
      prompts: of the metadata.
      rules: thresholds.

    Raises:
      GenevalError: the file or a line of it cannot be used, it is of other prompts, or its verdicts hold and
        are by other rules, as the record beside it says.
    """
    seen: dict[tuple[int, int], Image] = {}
    held = False
    for where, value in lines_of(path):
        file, number, sample = place_of(value, where)
        if number >= len(prompts):
            raise GenevalError(
                f"{where}: prompt {number}, but the metadata have {len(prompts)}: files of two sets"
            )
        if (number, sample) in seen:
            raise GenevalError(f"{where}: {file} is there twice")
        judged = _detected if "detections" in value else _resulted
        held |= judged is _resulted and not isinstance(value.get("details"), str)
        try:
            verdict, given = judged(value, prompts[number], rules)
        except GenevalError as error:
            raise GenevalError(f"{where}: {error}") from error
        seen[number, sample] = Image(number, sample, file, verdict, given)
    if not seen:
        raise GenevalError(f"{path} holds no images")
    if held:
        _check_rules(path, rules)
    return [seen[key] for key in sorted(seen)]


def _check_rules(path: Path, rules: Rules) -> None:
    """Compares rules with those of `vapi_jax.score`'s own record beside its verdicts."""
    record = path.with_suffix(".json")
    theirs = read_json(record, GenevalError).get("rules") if record.is_file() else None
    if not isinstance(theirs, dict):
        return
    for name, ours in dataclasses.asdict(rules).items():
        if theirs.get(name, ours) != ours:
            raise GenevalError(
                f"{path}: its verdicts were made with --{name}={theirs[name]}, as {record.name} says, "
                f"and here it is {ours}: give the same, or the detections in place of verdicts"
            )


def _detected(value: Mapping[str, Any], prompt: Prompt, rules: Rules) -> tuple[Verdict, None]:
    return judge(prompt, parse_objects(value["detections"]), rules), None


def _resulted(value: Mapping[str, Any], prompt: Prompt, rules: Rules) -> tuple[Verdict, bool]:
    given, text, details = (value.get(name) for name in ("correct", "prompt", "details"))
    if not isinstance(given, bool) or text != prompt.text:
        raise GenevalError(
            f"neither detections, nor a result (true or false in correct) for the prompt "
            f"{prompt.text!r}; correct is {given!r:.20}, the prompt {text!r:.80}"
        )
    if not isinstance(details, str) or any(clause.color for clause in prompt.include):
        return Verdict(given, str(value.get("reason", ""))), given
    return judge(prompt, parse_objects(_object(details, "details")), rules), given
