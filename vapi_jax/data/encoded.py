"""Images that are cropped and encoded to tokens once, and read back as often as a run likes.

`python -m vapi_jax.encode_dataset` writes them. One folder a split: images.npy (uint8 [N, H, W, 3]),
tokens.npy (int32 [N, T]), labels.npy (int32 [N]), and encoded.json, written last. What a recipe says
of crops and flips was applied when the images were encoded, and is not applied again.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np

from vapi_jax.data.config import DataConfig, DataError

ARRAYS = {"images": np.uint8, "tokens": np.int32, "labels": np.int32}
FACTS = "encoded.json"
COMMAND = "python -m vapi_jax.encode_dataset"


def read_facts(folder: pathlib.Path) -> dict[str, Any]:
    """What encoded.json of a split's folder says.

    Raises:
        DataError: there is none, or it says too little.
    """
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        return {
            "class_names": tuple(map(str, facts["class_names"])),
            "count": int(facts["count"]),
            "image_size": int(facts["image_size"]),
            "tokenizer": str(facts["tokenizer"]),
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"data.path: {folder} holds no encoded images ({error!r}). {COMMAND} --config=RECIPE "
            "--out=DIR makes them"
        ) from error


def encoded_class_names(config: DataConfig) -> tuple[str, ...]:
    """Names of the classes of the data that was encoded."""
    return read_facts(pathlib.Path(config.path) / "train")["class_names"]


class EncodedSource:
    """One split of an encoded data set, mapped into memory and read image by image.

    Raises:
        DataError: files are missing, of another size than encoded.json says, or for images of another
            size than the configuration's.
    """

    def __init__(self, config: DataConfig, split: str) -> None:
        folder = pathlib.Path(config.path) / split
        facts = read_facts(folder)
        self.class_names = facts["class_names"]
        side, count = facts["image_size"], facts["count"]
        if side != config.image_size:
            raise DataError(
                f"data.image_size={config.image_size}, but the images in {folder} have {side} pixels"
            )
        self._arrays = {name: _map(folder / f"{name}.npy", name, count) for name in ARRAYS}
        if self._arrays["images"].shape[1:] != (side, side, 3):
            raise DataError(f"{folder / 'images.npy'} has shape {self._arrays['images'].shape}")
        labels = self._arrays["labels"]
        if not count:
            raise DataError(f"{folder} holds no images. Make it again with {COMMAND}")
        if labels.ndim != 1 or labels.min() < 0 or labels.max() >= len(self.class_names):
            raise DataError(
                f"{folder / 'labels.npy'} has labels that are none of the {len(self.class_names)} "
                f"classes of {FACTS}. Make it again with {COMMAND}"
            )

    def __len__(self) -> int:
        return len(self._arrays["labels"])

    def name(self, index: int) -> str:
        """Its place."""
        return f"encoded image {index}"

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """An image in [-1, 1], its label and its tokens."""
        del rng
        image = self._arrays["images"][index].astype(np.float32)
        return {
            "image": image / np.float32(127.5) - np.float32(1.0),
            "condition": np.int32(self._arrays["labels"][index]),
            "tokens": np.array(self._arrays["tokens"][index]),
        }


def _map(path: pathlib.Path, name: str, count: int) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} cannot be read: {error}. Make it again with {COMMAND}") from error
    if array.dtype != ARRAYS[name] or len(array) != count:
        raise DataError(
            f"{path} holds {array.dtype} {array.shape}, {FACTS} says {count} of {ARRAYS[name].__name__}"
        )
    return array
