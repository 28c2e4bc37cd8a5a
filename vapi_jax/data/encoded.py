"""Images that are cropped and encoded once, and read back as often as a run likes.

`python -m vapi_jax.encode dataset` writes them. One folder a split, in it numbered folders of as many images
each, and encoded.json, written last. A part holds images.npy (uint8 [N, H, W, 3]) and tokens.npy (int32
[N, T]) where tokens are wanted; labels.npy (int32 [N]), or of captioned images features.npy (bfloat16 by
their bits, uint16 [R, W]) of all captions one after the other, lengths.npy (int32 [N]) and captions.npy
(UTF-8, NUL between two). What a recipe says of crops and flips was applied when the images were encoded,
and is not applied again.
"""

from __future__ import annotations

import functools
import json
import pathlib
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from vapi_jax.common.files import new_folder, write_atomically
from vapi_jax.data.config import DataConfig, DataError
from vapi_jax.data.sources import Encoder, Source
from vapi_jax.models.conditions import CAPTION_FLAGS, stored_caption

FACTS = "encoded.json"
LISTED = "listed.jsonl"  # captions of a part that are flagged
COMMAND = "python -m vapi_jax.encode dataset"

_TYPES = {
    "images": (np.uint8, np.float32), "tokens": (np.int32,), "labels": (np.int32,),
    "features": (np.uint16,), "lengths": (np.int32,), "captions": (np.uint8,),
}  # fmt: skip
_LARGEST = {"length": 1 << 12, "width": 1 << 14, "letters": 1 << 20}  # of a caption's record
_OPEN = 64  # parts whose files are open at once


def part_folder(split: pathlib.Path, number: int) -> pathlib.Path:
    """Of part `number` of a split."""
    return split / f"{number:05d}"


def write_part(folder: pathlib.Path, batches: Iterable[Mapping[str, np.ndarray]]) -> None:
    """Writes a part; it appears when it is complete.

    Args:
        folder: to make.
        batches: of {"image" float32 [B, H, W, 3] in [-1, 1], "condition" int32 [B] or records of
            `vapi_jax.models.conditions.stored_caption`, perhaps "tokens" int32 [B, T]}.

    Raises:
        DataError: conditions are neither.
    """
    rows: dict[str, list[np.ndarray]] = {}
    found: Counter[str] = Counter()
    sizes = {"length": 0, "letters": 1}
    listed: list[str] = []
    count = 0
    for batch in batches:
        new = {"images": stored_images(batch["image"])}
        if "tokens" in batch:
            new["tokens"] = batch["tokens"]
        condition = batch["condition"]
        if condition.dtype.kind in "iu":
            new["labels"] = condition
        elif condition.dtype.names is None:
            raise DataError(
                f"the recipe's condition keeps {condition.dtype} of an image: {COMMAND} writes labels "
                "and encoded captions (condition.name='caption')"
            )
        else:
            sizes["length"] = length = condition["features"].shape[1]
            seen = np.arange(length) >= length - condition["length"][:, None]
            new |= {"features": condition["features"][seen], "lengths": condition["length"]}
            texts = [text.replace("\0", " ") for text in condition["caption"].tolist()]
            new["captions"] = np.frombuffer("".join(f"{t}\0" for t in texts).encode(), np.uint8)
            sizes["letters"] = max(sizes["letters"], *map(len, texts))
            found.update({flag: int(condition[flag].sum()) for flag in CAPTION_FLAGS})
            for row in np.flatnonzero(np.any([condition[flag] for flag in CAPTION_FLAGS], axis=0)):
                why = [flag for flag in CAPTION_FLAGS if condition[flag][row]]
                one = {"row": count + int(row), "why": why, "caption": texts[row]}
                listed.append(json.dumps(one, ensure_ascii=False))
        count += len(condition)
        for name, values in new.items():
            rows.setdefault(name, []).append(values)
    with new_folder(folder) as partial:
        for name, parts in rows.items():
            if len({part.dtype for part in parts}) > 1:
                parts = [_floats(part) for part in parts] if name == "images" else parts
            array = np.concatenate(parts)
            kept = array.dtype if array.dtype in _TYPES[name] else _TYPES[name][0]
            np.save(partial / f"{name}.npy", array.astype(kept, copy=False))
        if "lengths" in rows:
            text = json.dumps({**sizes, **found}, indent=2, sort_keys=True)
            (partial / FACTS).write_text(f"{text}\n", encoding="utf-8")
            (partial / LISTED).write_text("".join(f"{one}\n" for one in listed), encoding="utf-8")


def stored_images(images: np.ndarray) -> np.ndarray:
    """Images [B, H, W, 3] in [-1, 1] as a part keeps them.

    Levels of 8 bit where they were no more before they were floats, as in all files of images; else float32
    as they are, such as drawn scenes.
    """
    levels = (images + 1.0) * 127.5
    whole = np.rint(levels)
    return whole.astype(np.uint8) if np.abs(levels - whole).max() < 1e-3 else images


def _floats(images: np.ndarray) -> np.ndarray:
    """The images again, float32 in [-1, 1]."""
    if images.dtype != np.uint8:
        return images
    return images.astype(np.float32) / np.float32(127.5) - np.float32(1.0)


def finish_split(
    folder: pathlib.Path,
    parts: int,
    *,
    count: int,
    encoder: Encoder | None,
    class_names: tuple[str, ...],
    more: Mapping[str, Any],
) -> dict[str, int]:
    """Writes encoded.json of a split whose parts are there.

    Args:
        folder: the split's.
        parts: how many.
        count: of images.
        encoder: what made the tokens; None without them.
        class_names: by label.
        more: what else to note of where the images come from.

    Returns:
        How many captions are empty, were cut, and so on; nothing of images with labels.
    """
    first = part_folder(folder, 0)
    images = _map(first / "images.npy", "images")
    facts: dict[str, Any] = {
        **more,
        "split": folder.name,
        "count": count,
        "images_of_a_part": len(images),
        "image_size": images.shape[1],
        "class_names": class_names,
    }
    if encoder is not None:
        facts |= {"tokenizer": encoder.digest, "encoder_dtype": encoder.dtype}
        facts["encoder_patches"] = encoder.patches
    found: Counter[str] = Counter()
    if (first / "features.npy").exists():
        each = [_read_json(part_folder(folder, number) / FACTS) for number in range(parts)]
        for one in each:
            found.update({flag: one[flag] for flag in CAPTION_FLAGS})
        width = int(_map(first / "features.npy", "features").shape[1])
        letters = max(one["letters"] for one in each)
        sizes = {"length": each[0]["length"], "width": width, "letters": letters}
        facts["captions"] = {**sizes, **found}
    text = json.dumps(facts, indent=2, sort_keys=True)
    write_atomically(folder / FACTS, f"{text}\n")
    return dict(found)


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_bytes())
    return found


def read_facts(folder: pathlib.Path) -> dict[str, Any]:
    """What encoded.json of a split's folder says.

    Raises:
      DataError: there is none, or it says too little.
    """
    try:
        facts = _read_json(folder / FACTS)
        captions, encoder = facts.get("captions"), None
        if "tokenizer" in facts:
            patches = facts.get("encoder_patches") is True
            encoder = Encoder(str(facts["tokenizer"]), str(facts["encoder_dtype"]), patches)
        found: dict[str, Any] = {
            "class_names": tuple(map(str, facts["class_names"])),
            "count": int(facts["count"]),
            "images_of_a_part": int(facts["images_of_a_part"]),
            "image_size": int(facts["image_size"]),
            "encoder": encoder,
            "captions": captions and tuple(int(captions[name]) for name in _LARGEST),
        }
        if found["count"] < 1 or found["images_of_a_part"] < 1:
            raise ValueError("no images")
        for size, (name, most) in zip(found["captions"] or (), _LARGEST.items(), strict=False):
            if not 1 <= size <= most:
                raise ValueError(f"captions of {name} {size}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"data.path: {folder} holds no encoded images ({error!r}). {COMMAND} --config=RECIPE "
            "--out=DIR makes them"
        ) from error
    return found


class EncodedSource(Source):
    """One split of an encoded data set, mapped into memory and read image by image.

    Held-out images lie in the order in which the recipe that they were encoded for draws its own. The
    condition of a captioned image is a record of `vapi_jax.models.conditions.stored_caption`.

    Raises:
        DataError: files are missing, of another size than encoded.json says, or for images of another
            size than the configuration's.
    """

    brings_tokens = True

    @classmethod
    def read_class_names(cls, config: DataConfig) -> tuple[str, ...]:
        return read_facts(pathlib.Path(config.path) / "train")["class_names"]

    @classmethod
    def read_encoder(cls, config: DataConfig) -> Encoder | None:
        return read_facts(pathlib.Path(config.path) / "train")["encoder"]

    def __init__(self, config: DataConfig, split: str) -> None:
        super().__init__(config, split)
        self._folder = folder = pathlib.Path(config.path) / split
        self._facts = facts = read_facts(folder)
        self.class_names = facts["class_names"]
        self.mixed = split != "train"
        if facts["encoder"] != (other := self.read_encoder(config)):
            raise DataError(
                f"{folder} was encoded with {facts['encoder']}, the training images with {other}. "
                f"Make them again together, with {COMMAND}"
            )
        if facts["image_size"] != config.image_size:
            raise DataError(
                f"data.image_size={config.image_size}, but the images in {folder} have "
                f"{facts['image_size']} pixels"
            )
        self._record = None
        if facts["captions"] is not None:
            self._record = stored_caption(*facts["captions"])
        self._part = functools.lru_cache(_OPEN)(self._open)
        for number in {0, (facts["count"] - 1) // facts["images_of_a_part"]}:
            self._part(number)

    def __len__(self) -> int:
        return self._facts["count"]

    def name(self, index: int) -> str:
        return f"encoded image {index}"

    def _open(self, number: int) -> dict[str, Any]:
        """The arrays of a part, and of captions where each one's features and text begin."""
        facts, folder = self._facts, part_folder(self._folder, number)
        size, side = facts["images_of_a_part"], facts["image_size"]
        count = min(size, facts["count"] - number * size)
        names = ["images", *["tokens"] * (facts["encoder"] is not None)]
        names += ["labels"] if self._record is None else ["features", "lengths", "captions"]
        arrays: dict[str, Any] = {name: _map(folder / f"{name}.npy", name) for name in names}
        for name in set(names) - {"features", "captions"}:
            if len(arrays[name]) != count:
                raise _damaged(folder / f"{name}.npy", arrays[name], f"{count} rows")
        if arrays["images"].shape[1:] != (side, side, 3):
            raise _damaged(folder / "images.npy", arrays["images"], f"{side} pixels a side")
        if self._record is None:
            labels, classes = arrays["labels"], len(self.class_names)
            if labels.ndim != 1 or labels.min() < 0 or labels.max() >= classes:
                raise _damaged(folder / "labels.npy", labels, f"labels of {classes} classes")
            return arrays
        length, width = self._record["features"].shape
        ends = np.cumsum(arrays["lengths"], dtype=np.int64)
        texts = np.flatnonzero(arrays["captions"] == 0)
        lengths = arrays["lengths"]
        if arrays["features"].shape != (ends[-1], width) or not (
            lengths.min() >= 0 and lengths.max() <= length
        ):
            raise _damaged(
                folder / "features.npy", arrays["features"], f"those of {count} captions"
            )
        if len(texts) != count:
            raise _damaged(folder / "captions.npy", arrays["captions"], f"{count} texts")
        return {**arrays, "ends": ends, "texts": texts}

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        del rng
        number, row = divmod(index, self._facts["images_of_a_part"])
        part = self._part(number)
        found: dict[str, Any] = {"image": np.array(_floats(part["images"][row]))}
        if "tokens" in part:
            found["tokens"] = np.array(part["tokens"][row])
        if self._record is None:
            found["condition"] = np.int32(part["labels"][row])
            return found
        record, length = np.zeros((), self._record), int(part["lengths"][row])
        end, text = int(part["ends"][row]), int(part["texts"][row])
        if length:
            record["features"][-length:] = part["features"][end - length : end]
        start = int(part["texts"][row - 1]) + 1 if row else 0
        record["caption"] = part["captions"][start:text].tobytes().decode(errors="replace")
        record["length"] = length
        return {**found, "condition": record[()]}


def _map(path: pathlib.Path, name: str) -> np.ndarray:
    try:
        array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} cannot be read: {error}. Make it again with {COMMAND}") from error
    if array.dtype not in _TYPES[name] or not array.ndim or not array.size:
        wanted = " or ".join(kind.__name__ for kind in _TYPES[name])
        raise _damaged(path, array, f"numbers of {wanted}")
    return array


def _damaged(path: pathlib.Path, array: np.ndarray, wanted: str) -> DataError:
    return DataError(
        f"{path} holds {array.dtype} {array.shape}, and {FACTS} promises {wanted}. Make it again with "
        f"{COMMAND}"
    )
