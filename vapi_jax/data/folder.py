"""Images in one folder per class."""

from __future__ import annotations

import pathlib

import numpy as np
from PIL import Image

from vapi_jax.data.config import DataConfig, check_split
from vapi_jax.data.transforms import image_to_sample

EXTENSIONS = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
_LAYOUT = (
    "expected PATH/CLASS/IMAGE, or PATH/train/CLASS/IMAGE and PATH/val/CLASS/IMAGE, with images "
    f"ending in {', '.join(sorted(EXTENSIONS))}"
)
_USUAL_SPLITS = {"train": "train", "val": "val", "test": "test"}


def _root(config: DataConfig) -> pathlib.Path:
    if not config.path:
        raise ValueError(f"image_folder needs `path`, the root folder: {_LAYOUT}")
    root = pathlib.Path(config.path).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}: {_LAYOUT}")
    return root


def _split_root(config: DataConfig, split: str) -> tuple[pathlib.Path, bool]:
    """The folder that holds the class folders of a split, and whether it holds this split alone."""
    root = _root(config)
    folder = root / config.source_split(split, _USUAL_SPLITS[split])
    if folder.is_dir():
        return folder, True
    if (root / config.source_split("train", "train")).is_dir():
        raise FileNotFoundError(
            f"{root} has a training folder but there is no folder {folder} for split {split!r}; "
            f"set `{split}_split` to the sub-folder to read"
        )
    return root, False


def _class_folders(folder: pathlib.Path) -> list[pathlib.Path]:
    folders = sorted(
        entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")
    )
    if not folders:
        raise FileNotFoundError(f"{folder} has no class folders: {_LAYOUT}")
    return folders


def folder_class_names(config: DataConfig) -> tuple[str, ...]:
    """The class folders of the training split, sorted by name."""
    return tuple(folder.name for folder in _class_folders(_split_root(config, "train")[0]))


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
    `folder_holdout` of every class is set aside for val and test. EXIF orientation is ignored.

    Raises:
        FileNotFoundError: no such folder, or no images in it.
        ValueError: no path given, a class folder that training does not know, or (when a sample is
            read) an unreadable file, which is named.
    """

    def __init__(self, config: DataConfig, split: str) -> None:
        self.class_names = folder_class_names(config)
        self._config = config
        self._split = check_split(split)
        folder, whole = _split_root(config, split)
        labels = {name: label for label, name in enumerate(self.class_names)}
        self._files: list[tuple[pathlib.Path, int]] = []
        for class_folder in _class_folders(folder):
            if class_folder.name not in labels:
                raise ValueError(f"{class_folder} is a class that the training folder lacks")
            files = sorted(
                path for path in class_folder.rglob("*") if path.suffix.lower() in EXTENSIONS
            )
            self._files += [
                (path, labels[class_folder.name])
                for index, path in enumerate(files)
                if whole or _in_split(index, config.folder_holdout, split)
            ]
        if not self._files:
            raise FileNotFoundError(f"no images for split {split!r} in {folder}: {_LAYOUT}")

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[pathlib.Path, int]:
        return self._files[index]

    def sample(
        self, record: tuple[pathlib.Path, int], rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """Reads and crops one file: {"image": float32 [H, W, 3] in [-1, 1], "condition": int32}."""
        path, label = record
        training = self._split == "train"
        try:
            with Image.open(path) as image:
                # Broken files raise SyntaxError (PNG) or ValueError as well as OSError, and only
                # when the pixels are decoded.
                image.load()
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"cannot read the image {path}: {error}") from error
        return image_to_sample(
            image,
            label,
            rng,
            size=self._config.image_size,
            crop=self._config.crop if training else "center",
            flip=self._config.flip and training,
        )
