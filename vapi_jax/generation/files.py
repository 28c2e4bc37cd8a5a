"""Thousands of samples on disk: written in chunks, so that a killed run goes on where it was.

A directory of samples holds

    recipe.json     where they come from; written first, and never for two recipes
    images/         000000.png, 000001.png, ..., in folders of 10,000 where there are more
    samples.npz     arr_0 uint8 [N, H, W, 3] and arr_1 int64 [N], as ADM's evaluator reads them
    labels.txt      the label of every sample, one a line
    chunks/         what is waiting to be put into samples.npz; gone when that is done

Every file appears under its name only when it is complete, so what is there is done and what is not
there is to be done. Nothing ever holds more than a chunk of images in memory; samples.npz takes its
size twice on the disk while it is put together.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import struct
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vapi_jax.common import locks
from vapi_jax.common.errors import ExpectedError
from vapi_jax.common.files import PARTIAL, new_file, read_json, write_atomically
from vapi_jax.common.npz import NpzError, array_names, npy_header, npy_member, open_array, open_npz

RECIPE = "recipe.json"
FORMATS = ("png", "npz", "both")
PER_FOLDER = 10_000

# What may differ when a run goes on: when, where and with what it is computed. All of it is noted.
_ENVIRONMENT = ("versions", "devices", "started", "resumed")
# Two roads to the same files are the same checkpoint: digests decide. Attention follows the devices.
_NO_DIFFERENCE = ("checkpoint.path", "checkpoint.policy.attention")
_PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"


class SampleFilesError(ExpectedError, ValueError):
    """A directory that these samples cannot go to, or a file that is not what it should be."""


# --- recipe ---------------------------------------------------------------------------------------


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """{"a.b": leaf} of nested objects."""
    if not isinstance(value, Mapping) or not value:
        return {name: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{name}.{key}" if name else str(key))
    return flat


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What two recipes disagree about, a line each; the environment does not count."""
    there, here = (
        _flat({key: value for key, value in recipe.items() if key not in _ENVIRONMENT})
        for recipe in (old, new)
    )
    return [
        f"{name}: {_show(there, name)} there, {_show(here, name)} asked for"
        for name in sorted(there.keys() | here.keys())
        if name not in _NO_DIFFERENCE and _show(there, name) != _show(here, name)
    ]


def _show(flat: Mapping[str, Any], name: str) -> str:
    return json.dumps(flat[name]) if name in flat else "nothing"


def settle_recipe(directory: Path, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Writes the recipe of a fresh directory, or checks that an old one agrees with it.

    Returns:
      The recipe that holds: the old one where there is one.

    Raises:
      SampleFilesError: if the directory holds samples of another recipe, or other people's files.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path, asked = directory / RECIPE, json.loads(json.dumps(recipe))
    if not path.exists():
        names = (p.name for p in directory.iterdir() if p.suffix != PARTIAL)
        if foreign := sorted(name for name in names if name != locks.LOCK):
            raise SampleFilesError(
                f"{directory} holds {', '.join(foreign[:5])} but no {RECIPE}, so these are no samples "
                "to go on with; give another --out"
            )
        write_recipe(directory, asked)
        return asked
    old = read_json(path, SampleFilesError)
    if lines := differences(old, asked):
        raise SampleFilesError(
            f"{directory} holds samples of another recipe; give another --out, or ask for the same:"
            + "".join(f"\n  {line}" for line in lines)
        )
    return old


def write_recipe(directory: Path, recipe: Mapping[str, Any]) -> None:
    """Writes recipe.json."""
    write_atomically(directory / RECIPE, json.dumps(recipe, indent=2) + "\n")


# --- arrays in zip files --------------------------------------------------------------------------


def npz_names(path: str | Path) -> set[str]:
    """Names of the arrays of an .npz.

    Raises:
      SampleFilesError: if the file is no such archive.
    """
    try:
        with open_npz(path) as archive:
            return array_names(archive)
    except NpzError as error:
        raise SampleFilesError(str(error)) from error


def map_npz_array(path: str | Path, name: str) -> np.ndarray:
    """An array of an uncompressed .npz as a read-only map of the file: nothing is read until used.

    Raises:
      SampleFilesError: if the file is no such archive, lacks the array, or is damaged.
    """
    path = Path(path)
    try:
        with open_npz(path) as archive, open_array(archive, name) as stream:
            info = archive.getinfo(f"{name}.npy")
            if info.compress_type != zipfile.ZIP_STORED:
                raise NpzError(f"{path}: {name!r} is compressed; write it with numpy.savez")
            with path.open("rb") as file:
                file.seek(info.header_offset + 26)
                start = info.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
            if not stream.nbytes:
                return np.zeros(stream.shape, stream.dtype)
            offset = start + info.file_size - stream.nbytes
            return np.memmap(path, stream.dtype, "r", offset, stream.shape)
    except (NpzError, OSError, ValueError) as error:
        raise SampleFilesError(str(error)) from error


# --- samples --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class SampleFiles:
    """The samples of one recipe in one directory.

    Attributes:
      directory: made if absent.
      count: samples in all, N.
      batch: samples of a chunk; the last one may hold fewer.
      size: side of the square images in pixels.
      format: of `FORMATS`.
    """

    directory: Path
    count: int
    batch: int
    size: int
    format: str = "png"

    @property
    def npz(self) -> Path:
        """samples.npz, where the format asks for it."""
        return self.directory / "samples.npz"

    @property
    def images(self) -> Path:
        """The folder of PNG files, where the format asks for them."""
        return self.directory / "images"

    @property
    def _chunks(self) -> Path:
        return self.directory / "chunks"

    def ids(self, chunk: int) -> range:
        """The samples of a chunk."""
        return range(chunk * self.batch, min(self.count, (chunk + 1) * self.batch))

    def png(self, sample: int) -> Path:
        """Where a sample's PNG is."""
        width = max(6, len(str(self.count - 1)))
        folder = self.images
        if self.count > PER_FOLDER:
            folders = (self.count - 1) // PER_FOLDER
            folder /= f"{sample // PER_FOLDER:0{max(2, len(str(folders)))}d}"
        return folder / f"{sample:0{width}d}.png"

    def _npy(self, chunk: int) -> Path:
        return self._chunks / f"{chunk:08d}.npy"

    def _npy_header(self, chunk: int) -> bytes:
        return npy_header(np.uint8, (len(self.ids(chunk)), self.size, self.size, 3))

    def locked(self) -> AbstractContextManager[None]:
        """No second process writes here meanwhile; the lock dies with the process.

        Raises:
          LockedError: if one does.
        """
        return locks.hold(self.directory, "--out")

    def todo(self) -> list[int]:
        """The chunks that are not complete, after removing what a killed run left half-written."""
        for left in self.directory.rglob(f"*{PARTIAL}"):
            left.unlink()
        return [chunk for chunk in range(-(-self.count // self.batch)) if not self._done(chunk)]

    def _done(self, chunk: int) -> bool:
        if self.format in ("npz", "both") and not self.npz.exists():
            path, pixels = self._npy(chunk), len(self.ids(chunk)) * self.size**2 * 3
            # A power cut may leave a renamed file without its end; its size tells.
            if not path.exists() or path.stat().st_size != len(self._npy_header(chunk)) + pixels:
                return False
        return self.format == "npz" or all(_is_whole(self.png(i)) for i in self.ids(chunk))

    def write(self, chunk: int, images: np.ndarray) -> None:
        """Writes the images of a chunk, uint8 [n, H, W, 3].

        Raises:
          ValueError: if they are not of the dtype and shape that this chunk has.
        """
        shape = (len(self.ids(chunk)), self.size, self.size, 3)
        if images.dtype != np.uint8 or images.shape != shape:
            raise ValueError(f"want uint8 {shape}, got {images.dtype} {images.shape}")
        if self.format in ("png", "both"):
            self.png(self.ids(chunk)[0]).parent.mkdir(parents=True, exist_ok=True)
            self.png(self.ids(chunk)[-1]).parent.mkdir(parents=True, exist_ok=True)
            for sample, image in zip(self.ids(chunk), images, strict=True):
                encoded = io.BytesIO()
                Image.fromarray(image).save(encoded, "PNG")
                write_atomically(self.png(sample), encoded.getvalue(), sync=False)
        if self.format in ("npz", "both") and not self.npz.exists():
            self._chunks.mkdir(parents=True, exist_ok=True)
            write_atomically(
                self._npy(chunk), self._npy_header(chunk) + images.tobytes(), sync=False
            )

    def finish(self, labels: np.ndarray | None) -> None:
        """Puts samples.npz together from the chunks, where asked for, and labels.txt.

        Args:
          labels: int64 [N], or None where samples have none.
        """
        if labels is not None:
            text = "".join(f"{label}\n" for label in labels)
            write_atomically(self.directory / "labels.txt", text)
        if self.format in ("npz", "both") and not self.npz.exists():
            with (
                new_file(self.npz) as partial,
                zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED, allowZip64=True) as archive,
            ):
                self._store_images(archive)
                if labels is not None:
                    with archive.open(npy_member("arr_1"), "w") as file:
                        file.write(npy_header(np.int64, labels.shape))
                        file.write(labels.astype("<i8").tobytes())
        if self._chunks.exists():
            shutil.rmtree(self._chunks)

    def _store_images(self, archive: zipfile.ZipFile) -> None:
        shape = (self.count, self.size, self.size, 3)
        with archive.open(npy_member("arr_0"), "w", force_zip64=True) as file:
            file.write(npy_header(np.uint8, shape))
            for chunk in range(-(-self.count // self.batch)):
                with self._npy(chunk).open("rb") as part:
                    part.seek(len(self._npy_header(chunk)))
                    shutil.copyfileobj(part, file, 1 << 20)

    def read(self, samples: Sequence[int]) -> np.ndarray:
        """Finished samples by number, uint8 [n, H, W, 3].

        Raises:
          SampleFilesError: if the file that holds them is damaged.
        """
        if self.format != "png":
            return np.asarray(map_npz_array(self.npz, "arr_0")[list(samples)])
        images = []
        for sample in samples:
            try:
                with Image.open(self.png(sample)) as image:
                    images.append(np.asarray(image.convert("RGB")))
            except (OSError, SyntaxError, ValueError) as error:
                raise SampleFilesError(f"{self.png(sample)} cannot be read: {error}") from error
        return np.stack(images)


def _is_whole(path: Path) -> bool:
    """Whether a PNG is there with its end, which a power cut may have taken."""
    try:
        with path.open("rb") as file:
            file.seek(-len(_PNG_END), os.SEEK_END)
            return file.read() == _PNG_END
    except OSError:  # absent, or shorter than that
        return False
