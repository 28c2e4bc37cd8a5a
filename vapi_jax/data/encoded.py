"""Images that are cropped and encoded to tokens once, and read back as often as a run likes.

`python -m vapi_jax.encode dataset` writes them. One folder a split: images.npy (uint8 [N, H, W, 3]),
tokens.npy (int32 [N, T]), labels.npy (int32 [N]), and encoded.json, written last. What a recipe says
of crops and flips was applied when the images were encoded, and is not applied again.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from vapi_jax.common.progress import ProgressBar
from vapi_jax.data.config import DataConfig, DataError
from vapi_jax.data.sources import Encoder, Source

ARRAYS = {"images": np.uint8, "tokens": np.int32, "labels": np.int32}
FACTS = "encoded.json"
COMMAND = "python -m vapi_jax.encode dataset"


def write_encoded(
    folder: pathlib.Path,
    batches: Iterable[Mapping[str, np.ndarray]],
    count: int,
    *,
    encoder: Encoder,
    class_names: tuple[str, ...],
    more: Mapping[str, Any],
) -> None:
    """Writes a split.

    Args:
        folder: to make; its name is the split's.
        batches: of {"image" float32 [B, H, W, 3] in [-1, 1], "condition" int32 [B], "tokens" int32
            [B, T]}, at least `count` images together.
        count: images to take.
        encoder: what made the tokens.
        class_names: by label.
        more: what else to note of where the images come from.
    """
    folder.mkdir(parents=True)
    arrays: dict[str, np.ndarray] = {}
    done = 0
    with ProgressBar(count, f"encode {folder.name}") as progress:
        for batch in batches:
            rows = {
                # Pixels were 8 bit before they were floats: this brings them back exactly.
                "images": np.rint((batch["image"] + 1.0) * 127.5),
                "tokens": batch["tokens"],
                "labels": batch["condition"],
            }
            taken = min(len(rows["labels"]), count - done)
            for name, values in rows.items():
                if name not in arrays:
                    arrays[name] = np.lib.format.open_memmap(
                        folder / f"{name}.npy", "w+", ARRAYS[name], (count, *values.shape[1:])
                    )
                arrays[name][done : done + taken] = values[:taken]
            done += taken
            progress.update(done, taken)
            if done == count:
                break
    for array in arrays.values():
        array.flush()  # type: ignore[attr-defined]
    facts = {
        **more,
        "split": folder.name,
        "count": count,
        "image_size": arrays["images"].shape[1],
        "class_names": class_names,
        "tokenizer": encoder.digest,
        "encoder_dtype": encoder.dtype,
    }
    text = json.dumps(facts, indent=2, sort_keys=True)
    (folder / FACTS).write_text(f"{text}\n", encoding="utf-8")


def read_facts(folder: pathlib.Path) -> dict[str, Any]:
    """What encoded.json of a split's folder says.

    Raises:
        DataError: there is none, or it says too little.
    """
    try:
        facts = json.loads((folder / FACTS).read_bytes())
        return {
            "class_names": tuple(map(str, facts["class_names"])),
            "count": int(facts["count"]),
            "image_size": int(facts["image_size"]),
            "encoder": Encoder(str(facts["tokenizer"]), str(facts["encoder_dtype"])),
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"data.path: {folder} holds no encoded images ({error!r}). {COMMAND} --config=RECIPE "
            "--out=DIR makes them"
        ) from error


class EncodedSource(Source):
    """One split of an encoded data set, mapped into memory and read image by image.

    Held-out images lie in the order in which the recipe that they were encoded for draws its own.

    Raises:
        DataError: files are missing, of another size than encoded.json says, or for images of another
            size than the configuration's.
    """

    brings_tokens = True

    @classmethod
    def read_class_names(cls, config: DataConfig) -> tuple[str, ...]:
        return read_facts(pathlib.Path(config.path) / "train")["class_names"]

    @classmethod
    def read_encoder(cls, config: DataConfig) -> Encoder:
        return read_facts(pathlib.Path(config.path) / "train")["encoder"]

    def __init__(self, config: DataConfig, split: str) -> None:
        super().__init__(config, split)
        folder = pathlib.Path(config.path) / split
        facts = read_facts(folder)
        self.class_names = facts["class_names"]
        self.mixed = split != "train"
        if facts["encoder"] != (other := self.read_encoder(config)):
            raise DataError(
                f"{folder} was encoded with {facts['encoder']}, the training images with {other}. "
                f"Make them again together, with {COMMAND}"
            )
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
        return f"encoded image {index}"

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
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
