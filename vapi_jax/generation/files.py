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

import concurrent.futures
import dataclasses
import io
import json
import os
import re
import shutil
import struct
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from vapi_jax.common import locks
from vapi_jax.common.errors import ExpectedError
from vapi_jax.common.files import PARTIAL, new_file, read_json, write_atomically
from vapi_jax.common.npz import NpzError, array_names, npy_header, npy_member, open_array, open_npz

RECIPE = "recipe.json"
GRIDS = "grids"
FORMATS = ("png", "npz", "both")
PER_FOLDER = 10_000

# What may differ when a run goes on: when, where and with what it is computed. All of it is noted.
_ENVIRONMENT = ("versions", "devices", "started", "resumed")
# Two roads to the same files are the same checkpoint: digests decide. Attention follows the devices, and
# no sample depends on the batch.
_NO_DIFFERENCE = ("checkpoint.path", "checkpoint.policy.attention", "batch")
_OF_ALL = ("count", "labels", "captions")  # what more samples of the same recipe change
_CHUNK = re.compile(r"(\d+)-(\d+)\.npy")
_ENDS = {".png": b"\x00\x00\x00\x00IEND\xaeB`\x82", ".jpg": b"\xff\xd9"}
_HOW: Mapping[str, Mapping[str, Any]] = {
    ".png": {"format": "PNG"},
    ".jpg": {"format": "JPEG", "quality": 95, "subsampling": 0},
}


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


def settle_recipe(
    directory: Path,
    recipe: Mapping[str, Any],
    fewer: Callable[[int], Mapping[str, Any]] | None = None,
    grow: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Writes the recipe of a fresh directory, or checks that an old one agrees with it.

    Args:
      directory: of the samples.
      recipe: what is asked for.
      fewer: the recipe of the first n of them; None where the old recipe must be for as many.
      grow: called where the old recipe is for fewer, before the directory's recipe says more.

    Returns:
      The recipe that holds: the old one where there is one, for as many samples as are asked for.

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
    count: Any = old.get("count")
    grown = fewer is not None and type(count) is int and 0 < count < recipe["count"]
    if lines := differences(old, fewer(count) if fewer and grown else asked):
        raise SampleFilesError(
            f"{directory} holds samples of another recipe; give another --out, or ask for the same:"
            + "".join(f"\n  {line}" for line in lines)
        )
    if grown:
        grow()
        old |= {name: asked[name] for name in _OF_ALL if name in asked}
        write_recipe(directory, old)
    return old


def write_recipe(directory: Path, recipe: Mapping[str, Any]) -> None:
    """Writes recipe.json."""
    write_atomically(directory / RECIPE, json.dumps(recipe, indent=2) + "\n")


def is_grid(path: Path) -> bool:
    """Whether a picture shows samples that lie beside it: what `--grid` writes, and GenEval's own scripts."""
    if path.name == "grid.png":
        return (path.parent / RECIPE).is_file() or (path.parent / "samples").is_dir()
    return path.parent.name == GRIDS and (path.parents[1] / RECIPE).is_file()


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

    def picture(self, sample: int) -> Path:
        """Where a sample's picture is."""
        width = max(6, len(str(self.count - 1)))
        folder = self.images
        if self.count > PER_FOLDER:
            folders = (self.count - 1) // PER_FOLDER
            folder /= f"{sample // PER_FOLDER:0{max(2, len(str(folders)))}d}"
        return folder / f"{sample:0{width}d}.png"

    def _npy(self, samples: range) -> Path:
        return self._chunks / f"{samples.start:08d}-{samples.stop:08d}.npy"

    def _npy_header(self, samples: range) -> bytes:
        return npy_header(np.uint8, (len(samples), self.size, self.size, 3))

    def _waiting(self) -> list[range]:
        """The samples of every complete file in chunks/, of this batch or another, in order."""
        found = []
        for path in self._chunks.glob("*.npy"):
            if match := _CHUNK.fullmatch(path.name):
                samples = range(int(match[1]), int(match[2]))
                wanted = len(self._npy_header(samples)) + len(samples) * self.size**2 * 3
                # A power cut may leave a renamed file without its end; its size tells.
                if path.stat().st_size == wanted:
                    found.append(samples)
        return sorted(found, key=lambda samples: (samples.start, samples.stop))

    def _held(self) -> int:
        """How many images are in samples.npz; 0 where it is absent or lost its end in a power cut."""
        try:
            return len(map_npz_array(self.npz, "arr_0"))
        except SampleFilesError:
            return 0

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
        there = np.full(self.count, self.format == "png" or self._held() == self.count)
        for samples in self._waiting():
            there[samples.start : samples.stop] = True
        if self.format != "npz":
            there &= [_is_whole(self.picture(sample)) for sample in range(self.count)]
        return [chunk for chunk in range(self.chunks) if not there[self.ids(chunk)].all()]

    @property
    def chunks(self) -> int:
        """How many chunks there are."""
        return -(-self.count // self.batch)

    def grow(self) -> None:
        """Makes room for more samples than an earlier run was asked for; killed, it can be repeated."""
        if 0 < self._held() < self.count:
            held = map_npz_array(self.npz, "arr_0")
            samples = range(len(held))
            self._chunks.mkdir(exist_ok=True)
            with new_file(self._npy(samples)) as partial, partial.open("wb") as file:
                file.write(self._npy_header(samples))
                for start in range(0, len(held), self.batch):
                    file.write(held[start : start + self.batch].tobytes())
                _sync(file)
            self.npz.unlink()
        for path in list(
            self.images.rglob("*.png")
        ):  # in folders, or in others, where many are wanted
            place = self.picture(int(path.stem))
            if path != place:
                place.parent.mkdir(parents=True, exist_ok=True)
                path.replace(place)

    def write(self, chunk: int, images: np.ndarray) -> None:
        """Writes the images of a chunk, uint8 [n, H, W, 3].

        Raises:
          ValueError: if they are not of the dtype and shape that this chunk has.
        """
        samples = self.ids(chunk)
        shape = (len(samples), self.size, self.size, 3)
        if images.dtype != np.uint8 or images.shape != shape:
            raise ValueError(f"want uint8 {shape}, got {images.dtype} {images.shape}")
        if self.format in ("png", "both"):
            for folder in {self.picture(sample).parent for sample in samples}:
                folder.mkdir(parents=True, exist_ok=True)
            with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
                list(pool.map(self._write_picture, samples, images))
        if self.format in ("npz", "both") and self._held() != self.count:
            self._chunks.mkdir(parents=True, exist_ok=True)
            write_atomically(
                self._npy(samples), self._npy_header(samples) + images.tobytes(), sync=False
            )

    def _write_picture(self, sample: int, image: UInt8[np.ndarray, "H W 3"]) -> None:
        path, encoded = self.picture(sample), io.BytesIO()
        Image.fromarray(image).save(encoded, **_HOW[path.suffix])
        write_atomically(path, encoded.getvalue(), sync=False)

    def await_all(self, patience: float = 60.0) -> None:
        """Waits until what other processes have written can be seen here: network disks take a while.

        Raises:
          SampleFilesError: it is not seen within `patience` seconds.
        """
        deadline = time.monotonic() + patience
        while missing := self.todo():
            if time.monotonic() > deadline:
                raise SampleFilesError(
                    f"{len(missing) * self.batch} samples that other processes have written are not in "
                    f"{self.directory}: put --out on a file system that all machines share"
                )
            time.sleep(1.0)

    def finish(self, labels: np.ndarray | None) -> None:
        """Puts samples.npz together from the chunks, where asked for, and labels.txt.

        Args:
          labels: int64 [N], or None where samples have none.
        """
        if labels is not None:
            text = "".join(f"{label}\n" for label in labels)
            write_atomically(self.directory / "labels.txt", text)
        if self.format in ("npz", "both") and self._held() != self.count:
            with new_file(self.npz) as partial, partial.open("wb") as whole:
                with zipfile.ZipFile(whole, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
                    self._store_images(archive)
                    if labels is not None:
                        with archive.open(npy_member("arr_1"), "w") as file:
                            file.write(npy_header(np.int64, labels.shape))
                            file.write(labels.astype("<i8").tobytes())
                _sync(whole)
        if self._chunks.exists():
            shutil.rmtree(self._chunks)

    def _store_images(self, archive: zipfile.ZipFile) -> None:
        shape = (self.count, self.size, self.size, 3)
        with archive.open(npy_member("arr_0"), "w", force_zip64=True) as file:
            file.write(npy_header(np.uint8, shape))
            done = 0
            for samples in self._waiting():  # those of another batch may overlap
                if samples.stop > done:
                    with self._npy(samples).open("rb") as part:
                        skipped = (done - samples.start) * self.size**2 * 3
                        part.seek(len(self._npy_header(samples)) + skipped)
                        shutil.copyfileobj(part, file, 1 << 20)
                    done = samples.stop

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
                with Image.open(self.picture(sample)) as image:
                    images.append(np.asarray(image.convert("RGB")))
            except (OSError, SyntaxError, ValueError) as error:
                raise SampleFilesError(f"{self.picture(sample)} cannot be read: {error}") from error
        return np.stack(images)


def _sync(file: BinaryIO) -> None:
    """Has a file on the disk before what it was made from goes."""
    file.flush()
    os.fsync(file.fileno())


def _is_whole(path: Path) -> bool:
    """Whether a picture is there with its end, which a power cut may have taken."""
    end = _ENDS[path.suffix]
    try:
        with path.open("rb") as file:
            file.seek(-len(end), os.SEEK_END)
            return file.read() == end
    except OSError:  # absent, or shorter than that
        return False
