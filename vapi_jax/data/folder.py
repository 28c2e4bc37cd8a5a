"""Images in one folder per class."""

from __future__ import annotations

import functools
import os
import pathlib
from collections import Counter
from collections.abc import Iterable

import numpy as np

from vapi_jax.common.image_files import (
    EXTENSIONS,
    ImageFiles,
    find_images,
    in_words,
    kind_of_file,
    kind_of_folder,
)
from vapi_jax.data.classes import SORTED, is_number
from vapi_jax.data.config import SPLITS, DataConfig, DataError
from vapi_jax.data.sources import Source
from vapi_jax.data.transforms import read_sample

_LAYOUT = (
    "expected PATH/CLASS/IMAGE, or PATH/train/CLASS/IMAGE and PATH/val/CLASS/IMAGE, with images "
    f"ending in {', '.join(sorted(EXTENSIONS))}"
)
_NAMED = 5


# --- what is there --------------------------------------------------------------------------------

# Folders are listed once in a process: a million files on a network drive take minutes, and a run, its
# evaluations and its report must see the same images whatever is added meanwhile.


@functools.cache
def _class_folders(folder: pathlib.Path) -> tuple[tuple[pathlib.Path, ...], dict[str, int]]:
    """Folders of classes in order (numbers as numbers), and how much of each other kind is beside them."""
    names, left_out = [], Counter[str]()
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.is_dir():
                    left_out[kind_of_file(entry.name) or "image(s) beside the class folders"] += 1
                elif kind := kind_of_folder(entry.name):
                    left_out[kind] += 1
                else:
                    names.append(entry.name)
    except OSError as error:
        raise _refusal(error) from error
    if not names:
        raise DataError(f"{folder} has no class folders, it holds {_contents(folder)}: {_LAYOUT}")
    names.sort()
    if all(map(is_number, names)):
        names.sort(key=int)
    return tuple(folder / name for name in names), left_out


@functools.cache
def _image_files(folder: pathlib.Path) -> ImageFiles:
    try:
        return find_images(folder)
    except OSError as error:
        raise _refusal(error) from error


def _refusal(error: OSError) -> DataError:
    return DataError(f"cannot list {error.filename}: {error.strerror}")


def _contents(folder: pathlib.Path) -> str:
    """What a folder holds, in a few words for an error message."""
    entries = sorted(folder.iterdir())
    folders = [entry.name for entry in entries if entry.is_dir()]
    endings = Counter(entry.suffix or "no ending" for entry in entries if not entry.is_dir())
    found = []
    if folders:
        found.append(f"{len(folders)} folder(s): {_some(folders)}")
    if endings:
        kinds = _some(f"{count} with {ending}" for ending, count in sorted(endings.items()))
        found.append(f"{endings.total()} file(s): {kinds}")
    return ", ".join(found) or "nothing"


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:_NAMED]) + (" ..." if len(names) > _NAMED else "")


# --- whose it is ----------------------------------------------------------------------------------


def _split_root(config: DataConfig, split: str) -> tuple[pathlib.Path, bool]:
    """The folder that holds the class folders of a split, and whether it holds this split alone."""
    if not config.path:
        raise DataError(f"image_folder needs `path`, the root folder: {_LAYOUT}")
    root = pathlib.Path(config.path).expanduser().absolute()
    if not root.is_dir():
        raise DataError(f"there is no folder {root}: {_LAYOUT}")
    # The source's usual names of the splits are ours.
    folders = {name: root / config.source_split(name, name) for name in SPLITS}
    if folders[split].is_dir():
        return folders[split], True
    existing = [name for name, folder in folders.items() if folder.is_dir()]
    if existing or getattr(config, f"{split}_split"):
        raise DataError(
            f"there is no folder {folders[split]} for split {split!r}; {root} holds "
            f"{_contents(root)}. Set `{split}_split` to the sub-folder to read"
        )
    return root, False


def _in_split(index: int, holdout: float, split: str) -> bool:
    """Whether the index-th image of a class belongs to a split, where folders do not tell.

    Held-out images are spread evenly over the sorted names, because an end of the list may be
    special, and go to val and test in turn.
    """
    before, after = int(index * holdout), int((index + 1) * holdout)
    if after == before:
        return split == "train"
    return split == ("val" if after % 2 else "test")


class FolderSource(Source):
    """Images under root/CLASS, or root/SPLIT/CLASS where the folder of a split exists.

    Classes are the sorted folder names of the training split, numbers as numbers. Without folders for splits,
    `folder_holdout` of every class is set aside for val and test. No file is opened before its
    sample is wanted. Folders are listed once in a process, whatever is added to them later.

    Raises:
        DataError: no root, no folder for the split or no images in it, a class that the training split
            lacks or, where `classes` does not fix the labels, has no images of, or a folder that cannot be
            listed.
    """

    @classmethod
    def read_class_names(cls, config: DataConfig) -> tuple[str, ...]:
        return tuple(folder.name for folder in _class_folders(_split_root(config, "train")[0])[0])

    def __init__(self, config: DataConfig, split: str) -> None:
        super().__init__(config, split)
        self.class_names = self.read_class_names(config)
        folder, whole = _split_root(config, split)
        labels = {name: label for label, name in enumerate(self.class_names)}
        self._files: list[str] = []
        numbers, counts = [], []
        empty = []
        folders, beside = _class_folders(folder)
        left_out = Counter(beside)
        for class_folder in folders:
            if class_folder.name not in labels:
                raise DataError(f"{class_folder} is a class that the training folder lacks")
            found = _image_files(class_folder)
            left_out.update(found.left_out)
            if not found.files:
                empty.append(class_folder)
            mine = [
                path
                for index, path in enumerate(found.files)
                if whole or _in_split(index, config.folder_holdout, split)
            ]
            self._files += mine
            numbers.append(labels[class_folder.name])
            counts.append(len(mine))
        self._labels = np.repeat(np.asarray(numbers, np.int32), counts)
        if not self._files:
            raise DataError(
                f"no images for split {split!r} in {folder} with {len(folders)} class folder(s), of "
                f"which {len(empty)} hold no image at all: {_LAYOUT}"
            )
        if empty and config.classes not in ("", SORTED):  # labels are fixed whatever is missing
            left_out[f"class folder(s) without images ({_some(e.name for e in empty)})"] = len(
                empty
            )
        elif empty and split == "train":
            listed = _some(f"{entry.name} (holds {_contents(entry)})" for entry in empty)
            raise DataError(
                f"{len(empty)} of {len(folders)} class folders in {folder} have no images: {listed}. "
                f"Remove or fill them; {_LAYOUT}"
            )
        self.left_out = in_words(left_out)

    def __len__(self) -> int:
        return len(self._files)

    def name(self, index: int) -> str:
        return self._files[index]

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        file, label = pathlib.Path(self._files[index]), int(self._labels[index])
        return read_sample(file, label, self.config, self.split, rng)
