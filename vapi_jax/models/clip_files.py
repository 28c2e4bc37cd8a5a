"""CLIP's files: which sizes they mean, their weights, and the tokenizer beside them.

A folder of Hugging Face (config.json, and weights with transformers' names or open_clip_config.json, and
open_clip's), or a file of either names alone, such as HPS_v2.1_compressed.pt. Nothing in them is executed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from vapi_jax.common.digests import digest_of
from vapi_jax.common.files import LARGEST_JSON, read_json
from vapi_jax.common.trees import flatten, unflatten
from vapi_jax.models.caption_text import EXTRA
from vapi_jax.models.clip import IGNORED_NAMES, NAME_RULES, CLIPConfig, Names, Tower, shapes
from vapi_jax.models.loading import reference_weights
from vapi_jax.models.text_encoder import WEIGHTS
from vapi_jax.models.text_tokens import FAST
from vapi_jax.weights.names import WeightsError, check_finite
from vapi_jax.weights.tensors import LazyTensor, open_tensors

TRANSFORMERS_CONFIG, OPEN_CLIP_CONFIG = "config.json", "open_clip_config.json"
OPEN_CLIP_WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
)
"""Names of open_clip's weights in a folder; a folder with transformers' too is read as theirs."""

VOCABULARY, MERGES, OPENAI_MERGES = "vocab.json", "merges.txt", "bpe_simple_vocab_16e6.txt.gz"
START, END = "<|startoftext|>", "<|endoftext|>"

# Heads by width, of a file without a configuration: OpenAI's and LAION's models.
_VISION_HEADS = {768: 12, 1024: 16, 1280: 16}
_TEXT_HEADS = {512: 8, 768: 12, 1024: 16}
_HUGE = 1280  # width of H/14, of which OpenAI has none


@dataclasses.dataclass(frozen=True)
class CLIPFile:
    """Weights of a CLIP that can be read.

    Attributes:
      paths: the files they are in.
      config: what they are of.
      names: whose names they have.
      tensors: theirs.
    """

    paths: tuple[Path, ...]
    config: CLIPConfig
    names: Names
    tensors: Mapping[str, LazyTensor]

    def check(self) -> None:
        """Accounts for every tensor.

        Raises:
          WeightsError: see `vapi_jax.weights.names.check_reference`.
        """
        reference_weights(self.tensors, shapes(self.config), NAME_RULES[self.names], IGNORED_NAMES)

    def read(self, part: str, dtype: Any) -> dict[str, Any]:
        """Arrays of "vision", "text" or "logit_scale", in the layout of `shapes`.

        Raises:
          WeightsError: they do not fit, or are not finite.
        """
        target = shapes(self.config, dtype)
        rules = NAME_RULES[self.names]
        found = reference_weights(self.tensors, target, rules, IGNORED_NAMES)
        read = {}
        for path, leaf in flatten({part: target[part]}).items():
            array = np.asarray(found.read(path, ()), leaf.dtype)
            check_finite(array, f"{path} in {self.paths[0]}")
            read[path] = array
        return unflatten(read)


@contextlib.contextmanager
def open_clip(path: Path, activation: str = "auto") -> Iterator[CLIPFile]:
    """A CLIP, to be read inside the context.

    Args:
      path: a folder or a file.
      activation: "quick_gelu" or "gelu"; "auto" for what the configuration beside the weights says, and
        "gelu" for ViT-H/14 without one.

    Raises:
      WeightsError: there is no such model, or what it computes cannot be told.
    """
    file_path = _weights_in(path) if path.is_dir() else path
    with open_tensors(file_path) as file:
        if "visual.conv1.weight" in file.tensors:
            names: Names = "open_clip"
            tensors = _unfused(file.tensors)
        elif "vision_model.embeddings.class_embedding" in file.tensors:
            names, tensors = "transformers", dict(file.tensors)
        else:
            first = ", ".join(sorted(file.tensors)[:4])
            raise WeightsError(
                f"{file_path} is no CLIP: its tensors are {first} ..., and visual.conv1.weight (open_clip, "
                "OpenAI) or vision_model.embeddings.class_embedding (transformers) are wanted"
            )
        said = _said(path, names)
        config = _config(tensors, names, said, activation, file_path)
        yield CLIPFile(file.paths, config, names, tensors)


def _weights_in(folder: Path) -> Path:
    for name in (*WEIGHTS, *OPEN_CLIP_WEIGHTS):
        if (folder / name).is_file():
            return folder / name
    raise WeightsError(
        f"{folder} has no weights of a CLIP: one of {', '.join((*WEIGHTS, *OPEN_CLIP_WEIGHTS))} is wanted; "
        "or name the file itself"
    )


def _unfused(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """open_clip's projections to queries, keys and values, one tensor there, as three."""
    found = {}
    for name, tensor in tensors.items():
        fused = re.fullmatch(r"(.*\.attn\.in_proj_)(weight|bias)", name)
        if fused is None or not tensor.shape or tensor.shape[0] % 3:
            found[name] = tensor
            continue
        rows = tensor.shape[0] // 3
        for i, part in enumerate("qkv"):
            found[f"{fused[1]}{part}.{fused[2]}"] = LazyTensor(
                (rows, *tensor.shape[1:]), tensor.dtype, _third(tensor, i * rows, rows)
            )
    return found


def _third(tensor: LazyTensor, start: int, rows: int) -> Any:
    def fetch(index: tuple[slice, ...] | None) -> np.ndarray:
        part = tensor.read((slice(start, start + rows),))
        return part[index] if index else part

    return fetch


def _said(path: Path, names: Names) -> dict[str, Any]:
    """What a configuration says beside the sizes: heads of both towers, activation."""
    if not path.is_dir():
        return {}
    config = path / (TRANSFORMERS_CONFIG if names == "transformers" else OPEN_CLIP_CONFIG)
    if not config.is_file():
        return {}
    found = read_json(config, WeightsError)
    try:
        if names == "transformers":
            vision, text = (
                {**found.get(f"{part}_config", {}), **(found.get(f"{part}_config_dict") or {})}
                for part in ("vision", "text")
            )
            # transformers leaves out what is as it has it by default.
            kinds = {part.get("hidden_act", "quick_gelu") for part in (vision, text)}
            heads = vision.get("num_attention_heads", 12), text.get("num_attention_heads", 8)
        else:
            model = found.get("model_cfg", found)
            vision, text = model["vision_cfg"], model["text_cfg"]
            kinds = {"quick_gelu" if model.get("quick_gelu") else "gelu"}
            heads = int(vision["width"]) // int(vision.get("head_width", 64)), text.get("heads", 8)
        if len(kinds) != 1 or not kinds <= {"gelu", "quick_gelu"}:
            raise WeightsError(
                f"{config}: activation {kinds}; 'quick_gelu' or 'gelu' is known here"
            )
        return {"heads": tuple(map(int, heads)), "activation": kinds.pop()}
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise WeightsError(f"{config} is no configuration of a CLIP: {error!r}") from error


_SIZES: dict[Names, dict[str, str]] = {
    "open_clip": {
        "patches": "visual.conv1.weight",
        "positions": "visual.positional_embedding",
        "tokens": "token_embedding.weight",
        "context": "positional_embedding",
        "vision": "visual.transformer.resblocks.{}.mlp.c_fc.weight",
        "text": "transformer.resblocks.{}.mlp.c_fc.weight",
    },
    "transformers": {
        "patches": "vision_model.embeddings.patch_embedding.weight",
        "positions": "vision_model.embeddings.position_embedding.weight",
        "tokens": "text_model.embeddings.token_embedding.weight",
        "context": "text_model.embeddings.position_embedding.weight",
        "vision": "vision_model.encoder.layers.{}.mlp.fc1.weight",
        "text": "text_model.encoder.layers.{}.mlp.fc1.weight",
    },
}


def _config(
    tensors: Mapping[str, LazyTensor],
    names: Names,
    said: Mapping[str, Any],
    activation: str,
    path: Path,
) -> CLIPConfig:
    """Sizes by the tensors' shapes; how they fit together is checked with all of them, later."""
    where = _SIZES[names]

    def layers(tower: str) -> int:
        pattern = re.escape(where[tower]).replace(r"\{\}", r"(\d+)")
        found = [int(m[1]) for name in tensors if (m := re.fullmatch(pattern, name))]
        return max(found, default=-1) + 1

    try:
        width, _, patch, _ = tensors[where["patches"]].shape
        positions = tensors[where["positions"]].shape[0]
        vocab, text_width = tensors[where["tokens"]].shape
        context = tensors[where["context"]].shape[0]
        hidden = {tower: tensors[where[tower].format(0)].shape[0] for tower in ("vision", "text")}
        projection = "visual.proj" if names == "open_clip" else "visual_projection.weight"
        embed = tensors[projection].shape[1 if names == "open_clip" else 0]
    except (KeyError, ValueError, IndexError) as error:
        raise WeightsError(f"{path} lacks a tensor of a CLIP with both towers: {error}") from error
    grid = round((positions - 1) ** 0.5)
    if grid * grid != positions - 1 or not patch:
        raise WeightsError(f"{path} has {positions} positions of patches: no square and one more")
    heads = said.get("heads") or (_VISION_HEADS.get(width, 0), _TEXT_HEADS.get(text_width, 0))
    if min(heads) < 1 or width % heads[0] or text_width % heads[1]:
        raise WeightsError(
            f"{path}: towers of widths {width} and {text_width} have an unknown number of heads. "
            f"Name the folder that has {TRANSFORMERS_CONFIG} or {OPEN_CLIP_CONFIG} beside the weights"
        )
    if activation == "auto":
        activation = said.get("activation") or ("gelu" if width == _HUGE else "auto")
    if activation not in ("gelu", "quick_gelu"):
        raise WeightsError(
            f"{path} does not say which activation its network has: set activation to 'quick_gelu' for "
            f"OpenAI's weights, 'gelu' for LAION's; or name a folder with {TRANSFORMERS_CONFIG} or "
            f"{OPEN_CLIP_CONFIG}"
        )
    return CLIPConfig(
        vision=Tower(width, layers("vision"), heads[0], hidden["vision"]),
        text=Tower(text_width, layers("text"), heads[1], hidden["text"]),
        image=grid * patch,
        patch=patch,
        context=context,
        vocab=vocab,
        embed=embed,
        activation="gelu" if activation == "gelu" else "quick_gelu",
    )


# --- tokens -----------------------------------------------------------------------------------------


class CLIPTokenizer:
    """Byte-pair tokens of texts, by the library `tokenizers`.

    Texts become NFC, lower case, with single spaces. What open_clip does before, the repair of mojibake
    (ftfy) and HTML's entities, changes nothing in plain prompts and is not done.

    Args:
      path: a folder with tokenizer.json, vocab.json and merges.txt, or bpe_simple_vocab_16e6.txt.gz; or the
        first or the last by itself.
      context: tokens of a text, first and end token included.
      vocab: rows of the table of tokens.

    Raises:
      WeightsError: there is none, it is damaged, or it does not belong to these weights.
    """

    def __init__(self, path: Path, context: int, vocab: int):
        self.files = _tokenizer_files(path)
        self._tokenizer, self._context = _open_tokenizer(self.files), context
        marks = [self._tokenizer.token_to_id(mark) for mark in (START, END)]
        largest = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        if None in marks or marks[1] != largest or largest != vocab - 1:
            raise WeightsError(
                f"{self.files[0]} does not belong to these weights: {START} and {END} have the ids {marks}, "
                f"the largest is {largest}, and the network has {vocab} rows of tokens, the last the end's"
            )
        self._start, self._end = marks

    def __call__(self, texts: Sequence[str]) -> Int[np.ndarray, "N L"]:
        """Ids; a text that is too long loses its end, and keeps the end token."""
        ids = np.full((len(texts), self._context), self._end, np.int32)
        found = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        for row, encoding in zip(ids, found, strict=True):
            kept = [self._start, *encoding.ids[: self._context - 2]]
            row[: len(kept)] = kept
        return ids

    def cut(self, texts: Sequence[str]) -> int:
        """How many texts are too long."""
        found = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return sum(len(encoding.ids) > self._context - 2 for encoding in found)

    def describe(self) -> dict[str, str]:
        """Files and their digests."""
        return {path.name: digest_of(path) for path in self.files}


def _tokenizer_files(path: Path) -> tuple[Path, ...]:
    if path.is_file():
        return (path,)
    for names in ((FAST,), (VOCABULARY, MERGES), (OPENAI_MERGES,)):
        files = tuple(path / name for name in names)
        if all(file.is_file() for file in files):
            return files
    raise WeightsError(
        f"{path} has no tokenizer of a CLIP: {FAST}, {VOCABULARY} with {MERGES}, or {OPENAI_MERGES} is "
        "wanted; copy it there from where the weights were published, or name its place (tokenizer_path, "
        "--tokenizer)"
    )


def _open_tokenizer(files: tuple[Path, ...]) -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise WeightsError(
            f"{files[0]} is read by the library tokenizers ({error}): {EXTRA}"
        ) from error
    for path in files:
        if path.stat().st_size > LARGEST_JSON:
            raise WeightsError(f"{path} has more than {LARGEST_JSON} bytes, as no tokenizer does")
    try:
        if files[0].name.endswith(".gz"):
            return _from_openai(_unzipped(files[0]))
        if len(files) == 2:
            vocabulary = json.loads(files[0].read_bytes())
            lines = files[1].read_text(encoding="utf-8").splitlines()
            return _byte_pairs(vocabulary, _merges(lines))
        tokenizer = tokenizers.Tokenizer.from_buffer(files[0].read_bytes())
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer
    except BaseException as error:  # a panic of the library's Rust is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit | WeightsError):
            raise
        raise WeightsError(f"{files[0]} cannot be read as a tokenizer: {error}") from error


def _unzipped(path: Path) -> str:
    with gzip.open(path) as file:
        try:
            data = file.read(LARGEST_JSON + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise WeightsError(f"{path} is no whole gzip file: {error}") from error
    if len(data) > LARGEST_JSON:
        raise WeightsError(f"{path} holds more than {LARGEST_JSON} bytes, as no tokenizer does")
    return data.decode("utf-8")


def _merges(lines: Sequence[str]) -> list[tuple[str, str]]:
    pairs = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
    if any(len(pair) != 2 for pair in pairs):
        raise WeightsError("a line of the merges is no pair")
    return [(first, second) for first, second in pairs]


_OPENAI_MERGES = 49152 - 256 - 2
"""Merges of the file that OpenAI's tokenizer uses; there are more in it."""


def _from_openai(text: str) -> Any:
    """OpenAI's list of merges, from which its vocabulary follows."""
    merges = _merges(text.splitlines()[1 : _OPENAI_MERGES + 1])
    letters = _byte_letters()
    words = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(m) for m in merges)]
    return _byte_pairs({word: i for i, word in enumerate([*words, START, END])}, merges)


def _byte_letters() -> list[str]:
    """The letters that byte-level byte-pair encoding writes bytes with, in OpenAI's order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return [*map(chr, printable), *(chr(256 + i) for i in range(len(others)))]


def _byte_pairs(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token=END, end_of_word_suffix="</w>", fuse_unk=False)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(words, behavior="removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ])  # fmt: skip
    tokenizer.add_special_tokens([AddedToken(mark, normalized=False) for mark in (START, END)])
    return tokenizer
