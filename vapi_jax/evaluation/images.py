"""Sets of images to evaluate: a folder of files, or an .npz of the ADM layout, read lazily.

The digest of a set is that of its shape and pixels in order, so a folder of PNGs and the .npz of the
same images have the same one, whatever the compression.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from vapi_jax.common.errors import ExpectedError
from vapi_jax.common.image_files import EXTENSIONS, FORMATS, ImageFiles, find_images, in_words
from vapi_jax.common.npz import NpzError, array_names, open_array, open_npz
from vapi_jax.generation.files import is_grid

logger = logging.getLogger(__name__)

ARRAY = "arr_0"
"""The images of an ADM batch: uint8 [N, H, W, 3]."""
MAX_SIDE = 8192

# Modes whose pixels become 8-bit RGB without a loss of anything but alpha, which is dropped, and
# orientation tags are ignored: what other evaluators see as well.
_MODES = frozenset({"1", "L", "LA", "P", "RGB", "RGBA"})

_WANTED = f"a folder of {', '.join(sorted(EXTENSIONS))} files, or an .npz with uint8 {ARRAY!r}"

Batch = UInt8[np.ndarray, "N H W 3"]


class ImagesError(ExpectedError, ValueError):
    """A set of images that cannot be read, with the file that is to blame."""


@dataclass(frozen=True)
class ImageSet:
    """Images of one size, in a fixed order.

    Attributes:
      path: where they lie.
      count: how many.
      height, width: of every image, in pixels.
      names: their paths within the folder without extension; None for an .npz.
    """

    path: Path
    count: int
    height: int
    width: int
    names: tuple[str, ...] | None
    _read: Callable[[int], Iterator[Batch]]

    def __len__(self) -> int:
        return self.count

    def batches(self, size: int) -> Iterator[Batch]:
        """All images in order, `size` at a time, the last batch with what is left.

        At most two batches are held at once.

        Raises:
          ImagesError: an unreadable file, or an image of another size, by name.
        """
        if size < 1:
            raise ValueError(f"a batch of {size} images is not possible")
        return self._read(size)


class PixelDigest:
    """SHA-256 of "N H W 3" and all pixels in order, fed batch by batch."""

    def __init__(self, images: ImageSet):
        header = f"uint8 {images.count} {images.height} {images.width} 3\n"
        self._hash = hashlib.sha256(header.encode())

    def update(self, batch: Batch) -> None:
        self._hash.update(np.ascontiguousarray(batch).data)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def _side_problem(height: int, width: int) -> str | None:
    if min(height, width) < 1 or max(height, width) > MAX_SIDE:
        return f"{width}x{height} pixels; sides from 1 to {MAX_SIDE} are read"
    return None


def _open(path: Path, size: tuple[int, int] | None, first: Path) -> Image.Image:
    """A decoded file, whose (width, height) was compared with the first file's before decoding."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            if problem := _side_problem(image.height, image.width):
                raise ImagesError(f"{path} has {problem}")
            if size is not None and image.size != size:
                raise ImagesError(
                    f"all images must have one size: {path} has {image.width}x{image.height} pixels,"
                    f" {first} has {size[0]}x{size[1]}"
                )
            if image.mode not in _MODES:
                raise ImagesError(f"{path} has mode {image.mode}; 8-bit grey or RGB is needed")
            image.load()
            return image
    except ImagesError:
        raise
    except Exception as error:  # damaged bytes lead Pillow's decoders to nearly every exception
        reason = str(error) or type(error).__name__
        raise ImagesError(f"cannot read the image {path}: {reason}") from error


def find_samples(folder: Path) -> ImageFiles:
    """As `find_images`, without the grids that a sampler leaves beside its images.

    Raises:
      OSError: a folder that cannot be listed.
    """
    found = find_images(folder)
    files = tuple(path for path in found.files if not is_grid(Path(path)))
    grids = len(found.files) - len(files)
    return ImageFiles(files, {**found.left_out, **({"grid(s) of samples": grids} if grids else {})})


def _folder(folder: Path) -> ImageSet:
    try:
        found = find_samples(folder)
    except OSError as error:
        raise ImagesError(f"cannot list {error.filename}: {error.strerror}") from error
    files = list(map(Path, found.files))
    if not files:
        there = f", but {in_words(found.left_out)}" if found.left_out else ""
        raise ImagesError(f"{folder} holds no images{there}; wanted is {_WANTED}")
    if found.left_out:
        logger.warning("%s: left out: %s", folder, in_words(found.left_out))
    size = _open(files[0], None, files[0]).size
    names = tuple(path.relative_to(folder).with_suffix("").as_posix() for path in files)

    def pixels(path: Path) -> np.ndarray:
        return np.asarray(_open(path, size, files[0]).convert("RGB"))

    def read(batch: int) -> Iterator[Batch]:
        # Decoding releases the interpreter's lock, so threads help; one batch is decoded ahead.
        with ThreadPoolExecutor() as pool:
            pending = None
            for part in _batched(files, batch):
                found = [pool.submit(pixels, path) for path in part]
                if pending is not None:
                    yield np.stack([future.result() for future in pending])
                pending = found
            if pending is not None:
                yield np.stack([future.result() for future in pending])

    return ImageSet(folder, len(files), size[1], size[0], names, read)


def _batched(files: Sequence[Path], size: int) -> Iterator[Sequence[Path]]:
    return (files[start : start + size] for start in range(0, len(files), size))


def _npz(path: Path) -> ImageSet:
    try:
        with open_npz(path) as archive, open_array(archive, ARRAY) as stream:
            shape, dtype = stream.shape, stream.dtype
    except NpzError as error:
        raise ImagesError(f"{error} (wanted is {_WANTED})") from error
    if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or not shape[0]:
        raise ImagesError(
            f"{path}: array {ARRAY!r} is {dtype} {shape}, needed is uint8 [N, H, W, 3] with N > 0"
        )
    if problem := _side_problem(shape[1], shape[2]):
        raise ImagesError(f"{path}: array {ARRAY!r} has images of {problem}")

    def read(batch: int) -> Iterator[Batch]:
        try:
            with open_npz(path) as archive, open_array(archive, ARRAY) as stream:
                if stream.shape != shape:
                    raise NpzError("the file has changed since it was opened")
                for start in range(0, shape[0], batch):
                    yield stream.read(min(batch, shape[0] - start))
        except NpzError as error:
            raise ImagesError(str(error)) from error

    return ImageSet(path, shape[0], shape[1], shape[2], None, read)


def holds_images(path: Path) -> bool:
    """Whether an .npz file has the array of images of the ADM layout.

    Raises:
      NpzError: the file cannot be read as .npz.
    """
    with open_npz(path) as archive:
        return ARRAY in array_names(archive)


def open_images(path: str | Path) -> ImageSet:
    """The images at a path, whose count and size are known before any batch is read.

    Args:
      path: a folder, searched with its sub-folders and sorted by path (hidden ones and those that a
        file server made are left out), or an .npz file.

    Raises:
      ImagesError: nothing there, no images, or a first image or array that is not fit.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return _folder(path)
    if not path.exists():
        raise ImagesError(f"there is nothing at {path}; wanted is {_WANTED}")
    if path.suffix.lower() != ".npz":
        raise ImagesError(f"{path} is neither a folder nor an .npz file; wanted is {_WANTED}")
    return _npz(path)


def check_pairs(a: ImageSet, b: ImageSet) -> None:
    """Raises ImagesError unless image i of one set belongs to image i of the other.

    Both must hold equally many images of one size. Two folders must have the same names (but for the
    extension); where an .npz is involved the order alone decides.
    """
    if (a.height, a.width) != (b.height, b.width):
        raise ImagesError(
            f"pairs need one size: {a.path} has {a.width}x{a.height} pixels, {b.path} has"
            f" {b.width}x{b.height}"
        )
    if a.names is not None and b.names is not None:
        for one, other in itertools.zip_longest(a.names, b.names):
            if one != other:
                raise ImagesError(
                    f"pairs go by name: at the same place {a.path} has {one or 'nothing'} and {b.path}"
                    f" has {other or 'nothing'}"
                )
    if a.count != b.count:
        raise ImagesError(
            f"pairs need equally many images: {a.path} has {a.count}, {b.path} has {b.count}"
        )
