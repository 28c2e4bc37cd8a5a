"""Captions to token ids with the tokenizer of a T5 folder: `tokenizer.json`, or else `spiece.model`.

Both go through the `tokenizers` library, whose ids are those that LlamaGen's text features were made
of; sentencepiece itself splits some words otherwise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from vapi_jax.common.files import LARGEST_JSON, read_json
from vapi_jax.models.caption_text import EXTRA
from vapi_jax.weights.names import WeightsError

LIBRARIES = ("tokenizers",)
"""What ids depend on, for the record."""

UNKNOWN = "<unk>"
FAST, SENTENCEPIECE, SETTINGS = "tokenizer.json", "spiece.model", "tokenizer_config.json"

_EXTRA_IDS = 100  # sentinels that T5 puts behind the pieces of its model


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Token ids of captions.

    Attributes:
      ids: padded on the right, the end token included.
      mask: True where there is a token.
      cut: captions that were longer and lost their end.
      unknown: captions with something that the tokenizer has no token for.
    """

    ids: Int[np.ndarray, "B P"]
    mask: Bool[np.ndarray, "B P"]
    cut: Bool[np.ndarray, " B"]
    unknown: Bool[np.ndarray, " B"]


class T5Tokenizer:
    """The tokenizer of a T5 folder.

    Args:
      folder: with tokenizer.json or spiece.model.
      vocab: rows of the encoder's embedding.
      pad, end: ids of "<pad>" and "</s>".

    Raises:
      WeightsError: there is no such file, it is damaged, or it does not belong to the encoder.
    """

    def __init__(self, folder: Path, vocab: int, pad: int = 0, end: int = 1):
        found = [path for path in (folder / FAST, folder / SENTENCEPIECE) if path.is_file()]
        if not found:
            raise WeightsError(
                f"{folder} has neither {FAST} nor {SENTENCEPIECE}: copy one from where the encoder "
                "was published"
            )
        self.path, self._pad, self._end = found[0], pad, end
        self._tokenizer = open_tokenizer(self.path)
        self._unknown = self._tokenizer.token_to_id(UNKNOWN)
        marks = [self._tokenizer.token_to_id(token) for token in ("<pad>", "</s>")]
        largest = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        if marks != [pad, end] or largest >= vocab:
            raise WeightsError(
                f"{self.path} does not belong to the encoder beside it: <pad> and </s> are {marks} "
                f"there and {[pad, end]} in config.json, its largest id is {largest} and the encoder "
                f"has {vocab} rows. Take all files from one model"
            )

    def __call__(self, captions: Sequence[str], length: int) -> Tokens:
        """Ids of cleaned captions, at most `length` each."""
        found = self._tokenizer.encode_batch(list(captions), add_special_tokens=False)
        ids = np.full((len(captions), length), self._pad, np.int32)
        mask = np.zeros(ids.shape, bool)
        for row, seen, encoding in zip(ids, mask, found, strict=True):
            kept = [*encoding.ids[: length - 1], self._end]
            row[: len(kept)], seen[: len(kept)] = kept, True
        cut = np.array([len(e.ids) >= length for e in found], bool)
        unknown = np.array([self._unknown in e.ids for e in found], bool)
        return Tokens(ids, mask, cut, unknown)

    def kept(self, caption: str, length: int) -> str:
        """What the ids say of a cleaned caption: no end that is cut, `UNKNOWN` for what has no token."""
        found = self._tokenizer.encode(caption, add_special_tokens=False)
        text, at = "", 0
        for token, (start, end) in list(zip(found.ids, found.offsets, strict=True))[: length - 1]:
            text += caption[at:start] + (UNKNOWN if token == self._unknown else caption[start:end])
            at = end
        return text


def open_tokenizer(path: Path) -> Any:
    """A `tokenizers.Tokenizer` that neither cuts nor pads, of a `FAST` or `SENTENCEPIECE` file.

    Raises:
      WeightsError: the library is missing, or the file is damaged.
    """
    try:
        import tokenizers
    except ImportError as error:
        raise WeightsError(
            f"{path} is read by the library tokenizers ({error}): {EXTRA}"
        ) from error
    if path.stat().st_size > LARGEST_JSON:
        raise WeightsError(f"{path} has more than {LARGEST_JSON} bytes, as no tokenizer does")
    data = path.read_bytes()
    try:
        tokenizer = (
            tokenizers.Tokenizer.from_buffer(data)
            if path.name == FAST
            else _from_sentencepiece(data, path)
        )
        tokenizer.no_truncation()
        tokenizer.no_padding()
    except WeightsError:
        raise
    except BaseException as error:  # a panic of the library's Rust is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise WeightsError(f"{path} cannot be read as a tokenizer: {error}") from error
    return tokenizer


def _from_sentencepiece(data: bytes, path: Path) -> Any:
    """The tokenizer that Hugging Face's converter makes of T5's spiece.model."""
    pb: Any  # mypy finds nothing in modules that protobuf generates
    import tokenizers
    from tokenizers import models, normalizers, pre_tokenizers

    try:
        from sentencepiece import sentencepiece_model_pb2 as pb
    except ImportError as error:
        raise WeightsError(
            f"{path} is read by the library sentencepiece ({error}): {EXTRA}"
        ) from error
    proto = pb.ModelProto()
    proto.ParseFromString(data)
    if proto.trainer_spec.model_type != pb.TrainerSpec.UNIGRAM:
        raise WeightsError(f"{path} is no unigram model: it is not T5's")
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    extra = [f"<extra_id_{i}>" for i in reversed(range(_EXTRA_IDS))]
    vocabulary = pieces + [(token, 0.0) for token in extra]
    tokenizer = tokenizers.Tokenizer(models.Unigram(vocabulary, proto.trainer_spec.unk_id))
    kinds = pb.ModelProto.SentencePiece
    own = [p.piece for p in proto.pieces if p.type in (kinds.CONTROL, kinds.USER_DEFINED)]
    unknown = proto.trainer_spec.unk_piece
    tokenizer.add_special_tokens([
        tokenizers.AddedToken(token, normalized=False) for token in (*own, unknown, *extra)
    ])  # fmt: skip
    charsmap = proto.normalizer_spec.precompiled_charsmap
    tokenizer.normalizer = normalizers.Sequence([
        *([normalizers.Precompiled(charsmap)] if charsmap else []),
        normalizers.Strip(left=False, right=True),
        normalizers.Replace(tokenizers.Regex(" {2,}"), "▁"),
    ])  # fmt: skip
    # A folder that was saved by transformers says here what its tokenizer.json does.
    settings = path.with_name(SETTINGS)
    said = read_json(settings, WeightsError) if settings.is_file() else {}
    prefix = said.get("add_prefix_space", proto.normalizer_spec.add_dummy_prefix)
    every = "first" if said.get("legacy") is False else "always"
    scheme = every if prefix else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme)
    return tokenizer
