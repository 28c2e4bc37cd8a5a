"""Images for prompts: several of each, in the folders that a benchmark of text-to-image wants.

Sample s of prompt p is drawn with a key of its own, made of the seed, p and s: the same on any number
of devices, in any batch, and however many samples of a prompt are asked for.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int
from PIL import Image

from vapi_jax.common.errors import ExpectedError
from vapi_jax.common.files import read_text, write_atomically
from vapi_jax.common.paths import is_local, local_path
from vapi_jax.data.caption_files import LONGEST
from vapi_jax.generation.files import SampleFiles
from vapi_jax.generation.loading import Generator
from vapi_jax.generation.requests import Requests
from vapi_jax.models.conditions import Caption, Prompt, Tree
from vapi_jax.models.text_encoder import TextEncoder, folder_of

LAYOUTS = ("flat", "geneval", "hps")
MOST_PROMPTS, MOST_SAMPLES = 1 << 20, 1 << 12
LIST = "prompts.jsonl"
"""Beside the images: each prompt, and what the text encoder was given for it."""

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


# --- reading --------------------------------------------------------------------------------------


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
        prompt, Prompt, text or caption; `.tsv` or `.csv` with such a column; `.json` with a list of
        texts; for "hps" one such file, whose name is the style, or a folder of them.
      layout: "geneval" wants the lines of GenEval's metadata.

    Raises:
      PromptError: there is no such file, or it holds something else.
    """
    lines: tuple[str, ...] = ()
    places: tuple[str, ...] = ()
    if isinstance(asked, str):
        if asked.endswith(_SUFFIXES) and not any(c.isspace() for c in asked):
            raise PromptError(f"--prompts: there is no file {asked}")
        rows, source = [asked], asked
    else:
        source = asked.name
        files = sorted(asked.glob("*.json")) if asked.is_dir() else [asked]
        if (asked.is_dir() and layout != "hps") or not files:
            raise PromptError(f"--prompts: {asked} is a folder; only hps takes one, of .json files")
        found = [_rows(file) for file in files]
        rows = [text for part in found for text, _ in part]
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
    if not 0 < len(rows) <= MOST_PROMPTS:
        raise PromptError(f"--prompts: {source} holds {len(rows)} prompts; 1 to {MOST_PROMPTS} do")
    return Prompts(tuple(rows), lines, places, source)


def _rows(path: Path) -> list[tuple[str, str]]:
    """(prompt, its line) of a file."""
    try:
        text = read_text(path)
        rows = list(_parsed(path, text))
    except OSError as error:
        raise PromptError(f"--prompts: {path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError, csv.Error) as error:
        raise PromptError(f"--prompts: {path}: {error}") from error
    for number, (prompt, _) in enumerate(rows, 1):
        if not isinstance(prompt, str):
            raise PromptError(
                f"--prompts: {path}, prompt {number} is no text: a string is wanted, or one of "
                f"{', '.join(_COLUMNS)}"
            )
        if len(prompt) > LONGEST:
            raise PromptError(f"--prompts: {path}, prompt {number} has {len(prompt)} letters")
    return rows


def _parsed(path: Path, text: str) -> Iterator[tuple[Any, str]]:
    if path.suffix in (".tsv", ".csv"):
        delimiter = "\t" if path.suffix == ".tsv" else ","
        for row in csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter):
            yield _prompt(row), ""
    elif path.suffix == ".json":
        if not isinstance(values := json.loads(text), list):
            raise ValueError(f"a list of prompts is wanted, not a {type(values).__name__}")
        for value in values:
            yield _prompt(value), ""
    else:
        # Only line feeds end a line, and the last one ends the file.
        for line in text.removesuffix("\n").split("\n"):
            line = line.removesuffix("\r")
            yield (_prompt(json.loads(line)) if path.suffix == ".jsonl" else line), line


def _prompt(value: Any) -> Any:
    if isinstance(value, dict):
        return next((value[name] for name in _COLUMNS if name in value), None)
    if isinstance(value, str):
        value.encode()  # half of a surrogate pair is no letter
    return value


# --- conditions -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptRequests(Requests):
    """The condition of every sample, encoded when it is asked for.

    Attributes:
      prompts: `rows` are of these.
      per_prompt: samples of each.
      encode: the condition of these rows [B].
      fed: what is left of a prompt when it is encoded.
    """

    prompts: Prompts
    per_prompt: int
    encode: Callable[[Int[np.ndarray, " B"]], Tree]
    fed: Callable[[str], str]

    def of(self, samples: Int[np.ndarray, " B"]) -> Tree:
        return self.encode(self.rows[samples])

    def name(self, row: int) -> str:
        return self.prompts.texts[row]

    def files(self, flat: SampleFiles, layout: str) -> PromptFiles:
        """Where the samples go, in the directory of `flat`."""
        return PromptFiles(
            flat.directory, flat.count, flat.batch, flat.size, flat.format,
            requests=self, layout=layout,
        )  # fmt: skip

    def numbers(self, samples: Int[np.ndarray, " B"]) -> Int[np.ndarray, " B"]:
        """What the key of a sample is made of, beside the seed."""
        prompt, sample = np.divmod(samples.astype(np.int64), self.per_prompt)
        return (sample * MOST_PROMPTS + prompt).astype(np.uint32)


def request_prompts(
    generator: Generator,
    asked: Path | str,
    per_prompt: int,
    layout: str,
    text_encoder: Path | None,
    **options: Any,
) -> PromptRequests:
    """The conditions of `per_prompt` samples of each prompt, those of a prompt together.

    Args:
      generator: takes captions or their tokens.
      asked, layout: see `read_prompts`.
      per_prompt: at most `MOST_SAMPLES`.
      text_encoder: the folder of the encoder; of a generator of tokens that of their tokenizer; None for
        the one that it brings.
      options: of `TextEncoder`, in place of the generator's own.

    Raises:
      PromptError: the generator takes no captions, or the prompts cannot be read.
      WeightsError: the encoder cannot be read, or is of another width than the generator takes.
    """
    condition = generator.condition
    if isinstance(condition, Prompt):
        if text_encoder is not None:
            condition = dataclasses.replace(condition, tokenizer=str(text_encoder))
        make = partial(_by_tokens, condition)
    elif isinstance(condition, Caption):
        if text_encoder is None:
            if not condition.encoder:
                raise PromptError(
                    "--prompts wants --text_encoder, the folder of the encoder of the checkpoint"
                )
            text_encoder = folder_of(condition.encoder)
        options = {"clean": condition.clean, "lower": condition.lower, **options}
        make = partial(_by_features, generator, condition, text_encoder, options)
    else:
        kind = generator.facts["policy"]["kind"]
        raise PromptError(
            f"--prompts: this checkpoint is a generator of kind {kind!r}: no captions"
        )
    prompts = read_prompts(asked, layout)
    encode, fed, encoder = make(prompts.texts)
    facts = {**prompts.facts, "per_prompt": per_prompt, "layout": layout, "encoder": encoder}
    rows = np.repeat(np.arange(len(prompts.texts)), per_prompt)
    return PromptRequests(
        False, rows, facts, prompts=prompts, per_prompt=per_prompt, encode=encode, fed=fed
    )


_Encoding = tuple[Callable[[Int[np.ndarray, " B"]], Tree], Callable[[str], str], dict[str, Any]]
"""`PromptRequests.encode`, its `fed`, and what encodes, for the recipe."""


def _by_features(
    generator: Generator,
    condition: Caption,
    folder: Path,
    options: Mapping[str, Any],
    texts: tuple[str, ...],
) -> _Encoding:
    """Features of a text encoder, of the prompts of a batch when they are drawn."""
    mesh = generator.pixels.mesh
    assert mesh is not None, "a loaded generator has devices"
    encoder = TextEncoder(folder, mesh, length=condition.length, width=condition.width, **options)

    def encode(wanted: Int[np.ndarray, " B"]) -> Tree:
        rows, place = np.unique(wanted, return_inverse=True)
        found = encoder([texts[row] for row in rows], rows=len(wanted))
        return {
            "features": found.features[place],
            "mask": found.left_mask[place],
            "dropped": np.zeros(len(wanted), bool),
        }

    return encode, encoder.clean, encoder.describe()


def _by_tokens(condition: Prompt, texts: tuple[str, ...]) -> _Encoding:
    """Tokens, all of one length, so that no sample depends on which others are in its batch."""
    found = condition.prepare(np.array(texts))
    return (
        lambda rows: jax.tree.map(lambda leaf: leaf[rows], found), str.strip, condition.describe()
    )  # fmt: skip


# --- files ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptFiles(SampleFiles):
    """Samples in the folders of a layout.

    - "flat": images/000000.png, ...; image i is of prompt i // per_prompt.
    - "geneval": 00000/metadata.jsonl and 00000/samples/0000.png, ...
    - "hps": STYLE/00000.jpg, ...

    Attributes:
      requests: what the samples are drawn for.
      layout: of these.
    """

    requests: PromptRequests
    layout: str

    def picture(self, sample: int) -> Path:
        prompt, index = divmod(sample, self.requests.per_prompt)
        if self.layout == "geneval":
            return self._folder(prompt) / "samples" / f"{index:04d}.png"
        if self.layout == "hps":
            return self.directory / f"{self.requests.prompts.places[prompt]}.jpg"
        return super().picture(sample)

    @property
    def images(self) -> Path:
        return super().images if self.layout == "flat" else self.directory

    def _folder(self, prompt: int) -> Path:
        return self.directory / f"{prompt:05d}"

    def describe(self) -> None:
        """Writes what the images are of: the prompts, what the encoder is given, GenEval's metadata."""
        fed = self.requests.fed
        lines = (
            json.dumps({"prompt": text, "fed": fed(text)}) for text in self.requests.prompts.texts
        )
        write_atomically(self.directory / LIST, "".join(f"{line}\n" for line in lines))
        for prompt, line in enumerate(self.requests.prompts.lines):
            self._folder(prompt).mkdir(exist_ok=True)
            write_atomically(self._folder(prompt) / "metadata.jsonl", f"{line}\n", sync=False)

    def grids(self) -> None:
        """A picture of each prompt's samples: 00000/grid.png, or grids/00000.png."""
        columns = math.ceil(math.sqrt(self.requests.per_prompt))
        for prompt in range(len(self.requests.prompts.texts)):
            path = self._folder(prompt) / "grid.png"
            if self.layout != "geneval":
                path = self.directory / "grids" / f"{prompt:05d}.png"
            if path.exists():
                continue
            first = prompt * self.requests.per_prompt
            images = self.read(range(first, first + self.requests.per_prompt))
            blank = np.full((-len(images) % columns, *images.shape[1:]), 255, np.uint8)
            rows = np.concatenate([images, blank]).reshape(-1, columns, *images.shape[1:])
            sheet = rows.swapaxes(1, 2).reshape(-1, columns * self.size, 3)
            encoded = io.BytesIO()
            Image.fromarray(sheet).save(encoded, "PNG")
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, encoded.getvalue(), sync=False)
