"""Captions to the prompts that Janus-Pro draws images from, with the tokenizer of its folder.

A prompt is `<|User|>: CAPTION`, an empty line, `<|Assistant|>:` and at once the token that begins an
image; no system prompt. The roles "User" and "Assistant" of the older Janus are no option: with them the
1B draws the right two objects in 70 % of GenEval's prompts and not in 82 %.
"""

from __future__ import annotations

import bisect
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from vapi_jax.common.files import read_json
from vapi_jax.models.text_tokens import FAST, SETTINGS, open_tokenizer
from vapi_jax.weights.names import WeightsError

logger = logging.getLogger(__name__)

PROCESSOR, SPECIAL = "processor_config.json", "special_tokens_map.json"

_BEFORE, _AFTER = "<|User|>: ", "\n\n<|Assistant|>:"
_BOS, _PAD, _BOI = "<｜begin▁of▁sentence｜>", "<｜▁pad▁｜>", "<begin_of_image>"


class PromptTokenizer:
    """The tokenizer of a folder of Janus, published or converted.

    Attributes:
      path: of its tokenizer.json.
      bos_id, boi_id: first and last token of every prompt.
      pad_id: stands for the caption of an unconditional prompt; other models have it elsewhere.

    Args:
      folder: with tokenizer.json, and files that name its tokens.
      vocab: rows of the embedding.

    Raises:
      WeightsError: there is no such file, it is damaged, or it does not belong to the model.
    """

    def __init__(self, folder: Path, vocab: int):
        self.path = folder / FAST
        if not self.path.is_file():
            raise WeightsError(
                f"{folder} has no {FAST}: copy it, and {SETTINGS}, from where the model was published"
            )
        self._tokenizer = open_tokenizer(self.path)
        said = _settings(folder)
        self.bos_id = self._id(said.get("bos_token"), _BOS)
        # DeepSeek's processor pads with a token of its own; pad_token may well be the end of a text.
        own = said.get("pad_tag", _PAD)
        known = isinstance(own, str) and self._tokenizer.token_to_id(own) is not None
        self.pad_id = self._id(own if known else said.get("pad_token"), _PAD)
        self.boi_id = self._id(said.get("image_start_tag"), _BOI)
        self._begin = self._tokenizer.id_to_token(self.boi_id)
        self._end = self._tokenizer.encode(_AFTER + self._begin, add_special_tokens=False).ids
        largest = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        if largest >= vocab:
            raise WeightsError(
                f"{self.path} does not belong to the model: its largest id is {largest} and the model has "
                f"{vocab} rows. Take all files from one model"
            )

    def _id(self, asked: Any, usual: str) -> int:
        """The id of a token that a setting names, as text or as an object with its content."""
        token = asked.get("content") if isinstance(asked, dict) else asked
        token = token if isinstance(token, str) else usual
        if (found := self._tokenizer.token_to_id(token)) is None:
            raise WeightsError(
                f"{self.path} has no token {token!r}: it is no tokenizer of Janus-Pro"
            )
        return found

    def ids(self, captions: Sequence[str]) -> list[list[int]]:
        """The tokens of each prompt; captions are stripped and otherwise as they are.

        Raises:
          WeightsError: the token that begins an image is not the last, as it has to be.
        """
        texts = [f"{_BEFORE}{caption.strip()}{_AFTER}{self._begin}" for caption in captions]
        # The first token comes from here and not from the file's post-processor: there are files that
        # add none, and then guidance has nothing in common with its other half.
        found = [
            [self.bos_id, *encoding.ids]
            for encoding in self._tokenizer.encode_batch(texts, add_special_tokens=False)
        ]
        for caption, ids in zip(captions, found, strict=True):
            if ids[-1] != self.boi_id or ids[1] == self.bos_id:
                raise WeightsError(
                    f"{self.path}: the prompt of {caption[:80]!r} begins with {ids[:2]} and ends with "
                    f"{ids[-1]}; once {self.bos_id} and then {self.boi_id} are wanted"
                )
        return found

    def kept(self, caption: str, lengths: Sequence[int]) -> str:
        """What is left of a caption in a prompt of at most the longest of these."""
        text = f"{_BEFORE}{caption.strip()}"
        found = self._tokenizer.encode(f"{text}{_AFTER}{self._begin}", add_special_tokens=False)
        if len(found.ids) < max(lengths):
            return caption.strip()
        last = max(lengths) - len(self._end) - 2  # the first token is none of the text's
        return text[len(_BEFORE) : found.offsets[last][1]]

    def __call__(
        self,
        captions: Sequence[str],
        lengths: Sequence[int],
        static: bool = False,
        side: str = "left",
    ) -> tuple[Int[np.ndarray, "B P"], Bool[np.ndarray, "B P"], Bool[np.ndarray, " B"]]:
        """Prompts of one length, padded with `pad_id`.

        Args:
          captions: of a batch.
          lengths: the shortest of these that has room for all is P. A prompt longer than the longest
            loses the end of its caption, never its frame.
          static: take the longest whatever the captions are.
          side: "left" or "right", of the padding.

        Returns:
          Tokens, their mask (True where there is one), and whose caption was cut.

        Raises:
          WeightsError: no length has room for a caption; see `ids`.
        """
        sizes, found = sorted(lengths), self.ids(captions)
        longest, frame = max(sizes, default=0), len(self.ids([""])[0])
        if longest <= frame:
            raise WeightsError(
                f"condition.options.lengths={tuple(lengths)}: a prompt has {frame} tokens around its "
                "caption, so a longer one is wanted"
            )
        cut = np.array([len(ids) > longest for ids in found], bool)
        found = [
            ids if len(ids) <= longest else [*ids[: longest - len(self._end)], *self._end]
            for ids in found
        ]
        needed = max(map(len, found), default=0)
        width = longest if static else sizes[bisect.bisect_left(sizes, needed)]
        tokens = np.full((len(found), width), self.pad_id, np.int32)
        mask = np.zeros(tokens.shape, bool)
        for row, seen, ids in zip(tokens, mask, found, strict=True):
            place = slice(width - len(ids), None) if side == "left" else slice(len(ids))
            row[place], seen[place] = ids, True
        return tokens, mask, cut


def _settings(folder: Path) -> dict[str, Any]:
    """What the files beside a tokenizer call its tokens; DeepSeek's processor has the last word."""
    said: dict[str, Any] = {}
    for name in (SPECIAL, SETTINGS, PROCESSOR):
        if (folder / name).is_file():
            found = read_json(folder / name, WeightsError)
            said |= {key: value for key, value in found.items() if value is not None}
    return said
