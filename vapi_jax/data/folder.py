"""Images in one folder per class."""

from __future__ import annotations

import functools
import os
import pathlib
from collections import Counter
from collections.abc import Iterable

import numpy as np

from vapi_jax.data.config import SPLITS, DataConfig, DataError
from vapi_jax.data.images import EXTENSIONS
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
def _class_folders(folder: pathlib.Path) -> tuple[pathlib.Path, ...]:
    try:
        with os.scandir(folder) as entries:
            names = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    except OSError as error:
        raise _refusal(error) from error
    if not names:
        raise DataError(f"{folder} has no class folders, it holds {_contents(folder)}: {_LAYOUT}")
    return tuple(folder / name for name in names)


@functools.cache
def _image_files(folder: pathlib.Path) -> tuple[str, ...]:
    """Files with an image's ending below a folder, sorted by their parts; hidden ones left out."""

    def refuse(error: OSError) -> None:
        raise _refusal(error) from error

    found = (
        os.path.join(parent, name)
        for parent, _, names in os.walk(folder, onerror=refuse)
        for name in names
        if os.path.splitext(name)[1].lower() in EXTENSIONS and not name.startswith(".")
    )
    return tuple(sorted(found, key=lambda path: path.split(os.sep)))


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

    Classes are the sorted folder names of the training split. Without folders for splits,
    `folder_holdout` of every class is set aside for val and test. No file is opened before its
    sample is wanted. Folders are listed once in a process, whatever is added to them later.

    Raises:
        DataError: no root, no folder for the split or no images in it, a class without training
            images, a class that the training split lacks, or a folder that cannot be listed.
    """

    @classmethod
    def read_class_names(cls, config: DataConfig) -> tuple[str, ...]:
        return tuple(folder.name for folder in _class_folders(_split_root(config, "train")[0]))

    def __init__(self, config: DataConfig, split: str) -> None:
        super().__init__(config, split)
        self.class_names = self.read_class_names(config)
        folder, whole = _split_root(config, split)
        labels = {name: label for label, name in enumerate(self.class_names)}
        self._files: list[str] = []
        counts = np.zeros(len(labels), int)
        empty = []
        folders = _class_folders(folder)
        for class_folder in folders:
            if class_folder.name not in labels:
                raise DataError(f"{class_folder} is a class that the training folder lacks")
            files = _image_files(class_folder)
            if not files:
                empty.append(class_folder)
            mine = [
                path
                for index, path in enumerate(files)
                if whole or _in_split(index, config.folder_holdout, split)
            ]
            self._files += mine
            counts[labels[class_folder.name]] = len(mine)
        # Folders come in the order of their names, as the labels do.
        self._labels = np.repeat(np.arange(len(labels), dtype=np.int32), counts)
        if not self._files:
            raise DataError(
                f"no images for split {split!r} in {folder} with {len(folders)} class folder(s), of "
                f"which {len(empty)} hold no image at all: {_LAYOUT}"
            )
        if empty and split == "train":
            found = _some(f"{entry.name} (holds {_contents(entry)})" for entry in empty)
            raise DataError(
                f"{len(empty)} of {len(folders)} class folders in {folder} have no images: {found}. "
                f"Remove or fill them; {_LAYOUT}"
            )

    def __len__(self) -> int:
        return len(self._files)

    def name(self, index: int) -> str:
        return self._files[index]

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        file, label = pathlib.Path(self._files[index]), int(self._labels[index])
        return read_sample(file, label, self.config, self.split, rng)
