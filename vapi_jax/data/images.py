"""From the bytes of an image file to 8-bit RGB pixels, or to a sentence about why not.

What the bytes say counts, not the name's ending. The first frame or page is read, and turned as its
EXIF orientation says. Transparency is laid over white, as a page would show it. Grey is repeated, CMYK
converted without colour management, and of 16-bit samples the upper byte is kept.
"""

from __future__ import annotations

import errno
import pathlib
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image

from vapi_jax.common.image_files import FORMATS

PILLOW_PIXELS = 89_478_485
"""Above this many pixels Pillow warns of a decompression bomb; above twice as many it refuses."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# The process is short of something; the file is not to blame.
_NOT_THE_FILE = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})


class UnreadableImage(ValueError):
    """An image that cannot be decoded, or must not be for its size; the message says why."""


def read_rgb(file: pathlib.Path | BinaryIO, max_pixels: int, side: int = 1) -> Image.Image:
    """Decodes an image as RGB.

    Args:
        file: a path, or an open binary file.
        max_pixels: larger images are refused before their pixels are decoded.
        side: the short side that the image will be resized to; it must not exceed `max_pixels` then
            either, which keeps out images of one pixel by ten thousand.

    Returns:
        An image of mode "RGB", at least 1x1 pixel.

    Raises:
        UnreadableImage: missing, damaged, no image, of an unknown kind of pixels, or too large.
    """
    try:
        with Image.open(file, formats=FORMATS) as image:
            _check_size(*image.size, max_pixels, side)
            image.load()
            return _upright(_to_rgb(image), image)
    except UnreadableImage:
        raise
    except Exception as error:  # damaged bytes lead Pillow's decoders to nearly every exception
        own = isinstance(error, OSError) and error.errno in _NOT_THE_FILE
        if own or isinstance(error, MemoryError):
            raise
        raise UnreadableImage(_reason(error)) from error


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, Image.UnidentifiedImageError):
        return "this is no image, or of a format that is not read"
    return str(error) or type(error).__name__


def _check_size(width: int, height: int, max_pixels: int, side: int) -> None:
    short, long = sorted((width, height))
    if short < 1:
        raise UnreadableImage(f"it has {width}x{height} pixels")
    if width * height > max_pixels:
        raise UnreadableImage(
            f"{width}x{height} pixels are more than data.max_image_pixels={max_pixels}"
        )
    if side * side * long > max_pixels * short:
        raise UnreadableImage(
            f"{width}x{height} pixels, resized to {side} on the short side, are more than "
            f"data.max_image_pixels={max_pixels}"
        )


def _to_rgb(image: Image.Image) -> Image.Image:
    # Pillow itself clips 16-bit grey at 255. Mode "I" means 16 bits in a PPM, but in a TIFF anything.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise UnreadableImage(f"pixels of mode {image.mode!r} have no range that is known")
    if image.has_transparency_data:
        opaque = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), opaque).convert("RGB")
    return image.convert("RGB")


def _upright(pixels: Image.Image, image: Image.Image) -> Image.Image:
    """The pixels turned as the file's EXIF orientation says."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged metadata beside pixels that are whole: they count as upright
        return pixels
    turn = _TURNS.get(orientation) if isinstance(orientation, int) else None
    return pixels if turn is None else pixels.transpose(turn)
