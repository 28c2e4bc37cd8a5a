"""Images with captions, `data.name="image_text"`: whatever a user's pairs lie in."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import re
import zlib
from collections import Counter
from pathlib import Path
from typing import Literal

import numpy as np

from vapi_jax.common.image_files import in_words
from vapi_jax.common.options import Errors, Natural, build
from vapi_jax.common.paths import PathText
from vapi_jax.data.config import SPLITS, DataConfig, DataError
from vapi_jax.data.image_text.captions import CaptionFields, Where, texts_in
from vapi_jax.data.image_text.index import Index, open_index
from vapi_jax.data.image_text.layouts import LAYOUTS, Layout, SideBySide
from vapi_jax.data.image_text.parquet import Parquet
from vapi_jax.data.images import UnreadableImage, read_rgb
from vapi_jax.data.sources import Source
from vapi_jax.data.transforms import cut


@dataclasses.dataclass(frozen=True)
class Options:
    """`data.options` of image_text.

    Attributes:
        layout: "tar" (img2dataset's webdataset shards), "jsonl" (a JSON object a line, with image_path or
            the like), "tsv" (a path and a caption, or columns with names), "parquet" (rows with an image,
            as on Hugging Face), "folder" (NAME.txt beside NAME.jpg); "auto" finds out, where there is one
            kind only. Lists in parquet of what lies in shards or beside them are no such kind.
        caption_field: "txt", "json:NAME", a column, "NAME[1]" of a list, LlamaGen's "blip", "llava" and
            "llava_first"; or several with shares, "blip:0.7,llava:0.3". Of those that are empty none is
            drawn. tar, jsonl and parquet want it said: what lies in .txt is often not the caption.
        where: comparisons of numbers in a record, "score>=6, punsafe<0.5"; others are left out.
        min_side: smaller images are left out; 0 is image_size.
        images: jsonl, tsv: folder that paths are relative to; empty is that of the list.
    """

    layout: Literal["auto", "tar", "jsonl", "tsv", "parquet", "folder"] = "auto"
    caption_field: str = ""
    where: str = ""
    min_side: Natural = 0
    images: PathText = ""


_SPLIT_WORDS = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
    "dev": "val", "test": "test", "testing": "test",
}  # fmt: skip
"""Words in names of files that tell a split."""


class ImageTextSource(Source):
    """Images and one caption each; the condition of a sample is its caption, an `np.str_`.

    Splits are sub-folders (or files) of `path`, where train, val or test is there (or what `train_split`
    and its fellows name); else `folder_holdout` of all images, chosen by their names, is set aside. What
    has no caption, or fails a filter, is counted and left out of the index; what cannot be decoded, or is
    too small, is found when it is read, and listed.

    Raises:
        DataError: nothing to read, options that make no sense, damaged files, or no captions.
    """

    mixed = False
    class_names = ()

    @classmethod
    def read_class_names(cls, config: DataConfig) -> tuple[str, ...]:
        del config
        return ()

    def __init__(self, config: DataConfig, split: str) -> None:
        super().__init__(config, split)
        errors = Errors()
        asked = build(Options, config.options, "data.options.", errors)
        if errors:
            raise DataError("\n".join(errors))
        if config.flip:
            raise DataError(
                'data.flip=True would turn "left of" in a caption into its opposite: image_text wants '
                "data.flip=False"
            )
        root, whole = _root(config, split)
        self._min_side = asked.min_side or config.image_size
        self._layout, self._index, self._fields = _open(root, asked, self._min_side)
        self._rows = np.arange(len(self._index))
        if not whole:
            _refuse_mixed(self._layout)
            self._rows = self._rows[_in_split(self._index, config.folder_holdout, split)]
        if not len(self._rows):
            raise DataError(
                f"{root} holds {len(self._index)} images with captions, none for {split!r}"
            )
        self.left_out = in_words(self._index.left_out)
        self.notes = tuple(f"a caption: {text}" for text in self._index.examples)

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, index: int) -> str:
        return self._index.name(int(self._rows[index]))

    def digest(self) -> str:
        return hashlib.sha256(f"{self._index.digest()} {len(self)}".encode()).hexdigest()

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        entry, side = self._index.entry(int(self._rows[index])), self.config.image_size
        image = read_rgb(self._layout.image(entry), self.config.max_image_pixels, side)
        if min(image.size) < self._min_side:
            raise UnreadableImage(
                f"{image.width}x{image.height} pixels are fewer than {self._min_side} on a side"
            )
        # Nothing is drawn before this: what stands in for an image must not depend on how often it failed.
        caption = self._fields.choose(self._layout.record(entry), rng)
        if not caption:
            raise UnreadableImage("its caption has become empty since it was indexed")
        pixels = cut(image, self.config, self.split, rng)
        return {"image": pixels, "condition": np.str_(caption)}  # type: ignore[dict-item]


def _root(config: DataConfig, split: str) -> tuple[Path, bool]:
    """What holds a split, and whether it holds nothing else."""
    if not config.path:
        raise DataError("image_text needs data.path: a folder, or a file of one")
    root = Path(config.path).absolute()
    places = {name: root / config.source_split(name, name) for name in SPLITS}
    if places[split].exists():
        return places[split], True
    if not root.exists():
        raise DataError(f"data.path: there is nothing at {root}")
    others = [name for name, place in places.items() if place.exists()]
    if others or getattr(config, f"{split}_split"):
        raise DataError(
            f"there is no {places[split]} for split {split!r}; name one with data.{split}_split"
        )
    return root, False


@functools.cache
def _open(root: Path, asked: Options, min_side: int) -> tuple[Layout, Index, CaptionFields]:
    """Once in a process: a run, its evaluation and its report see the same images."""
    where = Where.parse(asked.where)
    try:
        layout = _layout(root, asked)
    except OSError as error:
        raise DataError(f"cannot list {error.filename}: {error.strerror}") from error
    field = asked.caption_field or layout.caption
    if not field:
        raise DataError(
            "data.options.caption_field: which text is the caption is for you to say; the first image "
            f"has {_texts(layout)}"
        )
    fields = CaptionFields.parse(field)
    layout.only([*fields.names, *(test.field for test in where), "width", "height"])
    return layout, open_index(layout, fields, where, min_side), fields


def _layout(root: Path, asked: Options) -> Layout:
    def kind(name: str) -> Layout:
        made = Parquet if name == "parquet" else LAYOUTS[name]
        return made(root, Path(asked.images).absolute() if asked.images else None, Counter())

    if asked.layout != "auto":
        layout = kind(asked.layout)
    else:
        lists = {name: found for name in ("tar", "jsonl", "tsv") if (found := kind(name)).files}
        if len(lists) > 1:
            raise DataError(
                f"data.path: {root} holds files of {' and '.join(lists)}: choose with "
                "data.options.layout"
            )
        # Images may well lie beside the list of them, and img2dataset's own lists are in parquet.
        layout = next(iter(lists.values()), None) or kind("parquet")
        if isinstance(layout, Parquet) and not layout.has_images():
            layout = kind("folder")
    if not layout.files:
        there = sorted({path.suffix for path in root.rglob("*") if path.is_file()})
        raise DataError(
            f"data.path: {root} holds neither shards (.tar), nor lists (.jsonl, .tsv), nor rows with "
            "images (.parquet), nor images with .txt beside them, but files ending in "
            f"{', '.join(there[:8]) or 'nothing'}. Unpack .tgz"
        )
    return layout


def _refuse_mixed(layout: Layout) -> None:
    """Names of files tell splits, as on Hugging Face; drawn from all, test images would be trained on."""
    if isinstance(layout, SideBySide):  # there the names are those of images
        return
    found: dict[str, str] = {}
    for path in layout.files:
        words = re.split("[^a-z]+", path.name.lower())
        if word := next(filter(_SPLIT_WORDS.get, words), ""):
            found.setdefault(_SPLIT_WORDS[word], path.name)
    if len(found) > 1:
        raise DataError(
            f"data.path: {layout.root} holds files of several splits, such as {', '.join(found.values())}: "
            "name each split's own file or folder with data.train_split, data.val_split and data.test_split"
        )


def _texts(layout: Layout) -> str:
    """The texts of the first image, by the names that choose them."""
    for entry in itertools.islice(layout.scan(), 1):
        texts = texts_in(layout.record(entry))
        return (
            "; ".join(f"{name} = {text:.60}" for name, text in list(texts.items())[:12]) or "none"
        )
    return "none"


def _in_split(index: Index, holdout: float, split: str) -> np.ndarray:
    """Which entries belong to a split, by their names alone: none moves when others are added."""
    names, starts = memoryview(index.names.tobytes()), np.concatenate([[0], index.ends[:-1]])
    hashes = np.fromiter(
        (zlib.crc32(names[a:b]) for a, b in zip(starts, index.ends, strict=True)),
        np.uint32,
        len(index),
    )
    place = hashes / 2**32
    held = {"val": place < holdout / 2, "test": (place >= holdout / 2) & (place < holdout)}
    return held.get(split, place >= holdout)
