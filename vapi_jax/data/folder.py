"""Images in one folder per class."""

from __future__ import annotations

import os
import pathlib
from collections import Counter
from collections.abc import Iterable

import numpy as np

from vapi_jax.data.config import SPLITS, DataConfig, DataError, check_split
from vapi_jax.data.images import EXTENSIONS, read_rgb
from vapi_jax.data.transforms import image_to_sample

_LAYOUT = (
    "expected PATH/CLASS/IMAGE, or PATH/train/CLASS/IMAGE and PATH/val/CLASS/IMAGE, with images "
    f"ending in {', '.join(sorted(EXTENSIONS))}"
)
_NAMED = 5


def _root(config: DataConfig) -> pathlib.Path:
    if not config.path:
        raise DataError(f"image_folder needs `path`, the root folder: {_LAYOUT}")
    root = pathlib.Path(config.path).expanduser()
    if not root.is_dir():
        raise DataError(f"there is no folder {root}: {_LAYOUT}")
    return root


def _split_root(config: DataConfig, split: str) -> tuple[pathlib.Path, bool]:
    """The folder that holds the class folders of a split, and whether it holds this split alone."""
    root = _root(config)
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


def _class_folders(folder: pathlib.Path) -> list[pathlib.Path]:
    folders = sorted(
        entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")
    )
    if not folders:
        raise DataError(f"{folder} has no class folders, it holds {_contents(folder)}: {_LAYOUT}")
    return folders


def folder_class_names(config: DataConfig) -> tuple[str, ...]:
    """The class folders of the training split, sorted by name."""
    return tuple(folder.name for folder in _class_folders(_split_root(config, "train")[0]))


def _image_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Files with an image's ending below a folder, sorted; hidden ones left out."""

    def refuse(error: OSError) -> None:
        raise DataError(f"cannot list {error.filename}: {error.strerror}") from error

    return sorted(
        pathlib.Path(parent, name)
        for parent, _, names in os.walk(folder, onerror=refuse)
        for name in names
        if os.path.splitext(name)[1].lower() in EXTENSIONS and not name.startswith(".")
    )


def _in_split(index: int, holdout: float, split: str) -> bool:
    """Whether the index-th image of a class belongs to a split, where folders do not tell.

    Held-out images are spread evenly over the sorted names, because an end of the list may be
    special, and go to val and test in turn.
    """
    before, after = int(index * holdout), int((index + 1) * holdout)
    if after == before:
        return split == "train"
    return split == ("val" if after % 2 else "test")


class FolderSource:
    """Images under root/CLASS, or root/SPLIT/CLASS where the folder of a split exists.

    Classes are the sorted folder names of the training split. Without folders for splits,
    `folder_holdout` of every class is set aside for val and test. No file is opened before its
    sample is wanted.

    Raises:
        DataError: no path given, no such folder or no images in it (says what was found instead), a
            folder that cannot be listed, a class without images in training, or one that training
            does not know.
    """

    def __init__(self, config: DataConfig, split: str) -> None:
        self.class_names = folder_class_names(config)
        self._config = config
        self._split = check_split(split)
        folder, whole = _split_root(config, split)
        labels = {name: label for label, name in enumerate(self.class_names)}
        self._files: list[tuple[pathlib.Path, int]] = []
        empty = []
        folders = _class_folders(folder)
        for class_folder in folders:
            if class_folder.name not in labels:
                raise DataError(f"{class_folder} is a class that the training folder lacks")
            files = _image_files(class_folder)
            if not files:
                empty.append(class_folder)
            self._files += [
                (path, labels[class_folder.name])
                for index, path in enumerate(files)
                if whole or _in_split(index, config.folder_holdout, split)
            ]
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

    def __getitem__(self, index: int) -> tuple[pathlib.Path, int]:
        """The file and the label of an image."""
        return self._files[index]

    def name(self, index: int) -> str:
        return str(self._files[index][0])

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Reads and crops one file: {"image": float32 [H, W, 3] in [-1, 1], "condition": int32}."""
        path, label = self._files[index]
        training, size = self._split == "train", self._config.image_size
        return image_to_sample(
            read_rgb(path, self._config.max_image_pixels, size),
            label,
            rng,
            size=size,
            crop=self._config.crop if training else "center",
            flip=self._config.flip and training,
        )
