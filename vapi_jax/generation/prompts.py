"""Images for prompts: several of each, in the folders that a benchmark of text-to-image wants.

Sample s of prompt p is drawn with a key of its own, made of the seed, p and s: the same on any number
of devices, in any batch, and however many samples of a prompt are asked for.
"""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int
from PIL import Image

from vapi_jax.common.files import write_atomically
from vapi_jax.common.progress import announce
from vapi_jax.generation.captions import flagged
from vapi_jax.generation.files import GRIDS, SampleFiles
from vapi_jax.generation.generator import Generator
from vapi_jax.generation.prompt_lists import MOST_PROMPTS, PromptError, Prompts, read_prompts
from vapi_jax.generation.requests import Requests
from vapi_jax.models.conditions import Caption, Prompt, Tree
from vapi_jax.models.text_encoder import TextEncoder, folder_of

logger = logging.getLogger(__name__)

LAYOUTS = ("flat", "geneval", "hps")
MOST_SAMPLES = 1 << 12
LIST = "prompts.jsonl"
"""Beside the images: each prompt, and what the text encoder was given for it."""

_AT_ONCE = 1024


# --- conditions -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptRequests(Requests):
    """The condition of every sample, encoded when it is asked for.

    Attributes:
      prompts: `rows` are of these.
      per_prompt: samples of each.
      encode: the condition of these rows [B].
      fed: what is left of a prompt in its tokens.
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
      WeightsError: the encoder cannot be read, is of another width than the generator takes, or is the
        generator's own and has changed since it was trained.
    """
    condition, own = generator.condition, text_encoder is None
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
    encode, fed, encoder, odd = make(prompts.texts)
    if own:
        generator.refuse_changed(encoder)
    elif names := generator.changed(encoder):
        logger.warning(
            "--text_encoder %s is not the encoder that %s was trained with: %s differ",
            text_encoder, generator.facts["path"], names,
        )  # fmt: skip
    if odd:
        told = flagged(odd, prompts.texts, "prompt")
        announce(f"of {len(prompts.texts)} prompts ({LIST} says what is left of each)\n{told}")
    facts = {**prompts.facts, "per_prompt": per_prompt, "layout": layout, "encoder": encoder}
    rows = np.repeat(np.arange(len(prompts.texts)), per_prompt)
    return PromptRequests(
        False, rows, facts, prompts=prompts, per_prompt=per_prompt, encode=encode, fed=fed
    )


_Encoding = tuple[
    Callable[[Int[np.ndarray, " B"]], Tree],
    Callable[[str], str],
    dict[str, Any],
    dict[str, list[int]],
]
"""`PromptRequests.encode`, its `fed`, what encodes, for the recipe, and prompts by `CAPTION_FLAGS`."""


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

    # Few at a time: a list may be long, and all of its tokens at once are many.
    parts = [encoder.flags(texts[at : at + _AT_ONCE]) for at in range(0, len(texts), _AT_ONCE)]
    rows = {
        flag: np.flatnonzero(np.concatenate([part[flag] for part in parts])) for flag in parts[0]
    }
    odd = {flag: found.tolist() for flag, found in rows.items() if len(found)}
    return encode, encoder.kept, encoder.describe(), odd


def _by_tokens(condition: Prompt, texts: tuple[str, ...]) -> _Encoding:
    """Tokens, all of one length, so that no sample depends on which others are in its batch."""
    found = condition.prepare(np.array(texts))  # says which lose their end
    return (
        lambda rows: jax.tree.map(lambda leaf: leaf[rows], found),
        partial(condition.load().kept, lengths=condition.lengths), condition.describe(), {},
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
                path = self.directory / GRIDS / f"{prompt:05d}.png"
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
