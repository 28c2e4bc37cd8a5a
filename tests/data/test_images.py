"""Decoding: what is in the file, as RGB; and what cannot be decoded, refused with its reason."""

import contextlib
import errno
import io
import struct
import time
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from vapi_jax.data.images import PILLOW_PIXELS, UnreadableImage, read_rgb

LIMIT = PILLOW_PIXELS
RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def encode(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decode(data, limit=LIMIT, side=1):
    image = read_rgb(io.BytesIO(data), limit, side)
    assert image.mode == "RGB"
    return np.asarray(image)


def noise(height=20, width=26, channels=3):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8)
    return Image.fromarray(pixels)


def png(width, height, depth, colour, rows, *more):
    """A PNG written by hand: Pillow cannot write all of the kinds that it reads."""

    def chunk(kind, content):
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        [
            chunk(b"IHDR", header),
            *[chunk(kind, content) for kind, content in more],
            chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))),
            chunk(b"IEND", b""),
        ]
    )


# What decodes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "BMP", "PPM", "TIFF"])
def test_plain_pixels_come_back_as_they_were(kind):
    image = noise()
    np.testing.assert_array_equal(decode(encode(image, kind)), np.asarray(image))


def test_the_bytes_count_and_not_the_ending(tmp_path):
    path = tmp_path / "photo.jpg"
    path.write_bytes(encode(Image.new("RGB", (3, 2), GREEN), "PNG"))
    assert read_rgb(path, LIMIT).getpixel((2, 1)) == GREEN


@pytest.mark.parametrize(
    ("ink", "rgb"),
    [
        ((0, 255, 255, 0), RED),
        ((255, 0, 255, 0), GREEN),
        ((255, 255, 0, 0), BLUE),
        ((0, 0, 0, 0), (255, 255, 255)),
        ((0, 0, 0, 255), (0, 0, 0)),
        ((0, 0, 0, 55), (200, 200, 200)),
    ],
)
def test_cmyk_becomes_the_colour_on_paper(ink, rgb):
    page = Image.new("CMYK", (16, 16), ink)
    np.testing.assert_array_equal(decode(encode(page, "TIFF"))[8, 8], rgb)
    # JPEG stores CMYK inverted and loses a little.
    np.testing.assert_allclose(decode(encode(page, "JPEG", quality=95))[8, 8], rgb, atol=3)


SIXTEEN = np.array([[0, 255, 256, 257], [32767, 32768, 65279, 65535]], np.uint16)
UPPER_BYTES = [[0, 0, 1, 1], [127, 128, 254, 255]]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_grey_keeps_its_upper_byte(kind):
    pixels = decode(encode(Image.fromarray(SIXTEEN), kind))
    np.testing.assert_array_equal(pixels, np.stack([UPPER_BYTES] * 3, -1))


def test_big_endian_sixteen_bit_grey_too():
    image = Image.frombytes("I;16B", (4, 2), SIXTEEN.astype(">u2").tobytes())
    np.testing.assert_array_equal(decode(encode(image, "TIFF"))[..., 0], UPPER_BYTES)


def test_sixteen_bit_colour_keeps_its_upper_byte():
    pixels = np.stack([SIXTEEN, SIXTEEN[::-1], SIXTEEN[:, ::-1]], -1)
    rows = [row.astype(">u2").tobytes() for row in pixels]
    np.testing.assert_array_equal(decode(png(4, 2, 16, 2, rows)), pixels >> 8)


def over_white(colour, alpha):
    return np.asarray(colour) * (alpha / 255) + 255 * (1 - alpha / 255)


@pytest.mark.parametrize("alpha", [0, 1, 128, 254, 255])
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_transparency_is_laid_over_white(alpha, kind):
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    image = Image.new("RGBA", (5, 4), (200, 100, 0, alpha))
    pixels = decode(encode(image, kind, **options))
    np.testing.assert_allclose(pixels[2, 2], over_white((200, 100, 0), alpha), atol=1)


def test_grey_with_transparency_is_laid_over_white():
    pixels = decode(encode(Image.new("LA", (3, 3), (40, 51)), "PNG"))
    np.testing.assert_allclose(pixels[1, 1], over_white((40, 40, 40), 51), atol=1)


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_a_palette_is_looked_up_and_its_transparent_entry_is_white(kind):
    image = Image.new("P", (3, 1))
    image.putpalette([*RED, *GREEN, *BLUE])
    image.putdata([0, 1, 2])
    np.testing.assert_array_equal(decode(encode(image, kind)), [[RED, GREEN, BLUE]])
    seen = decode(encode(image, kind, transparency=1))
    np.testing.assert_array_equal(seen, [[RED, (255, 255, 255), BLUE]])


def test_a_palette_of_several_opacities_and_a_transparent_colour():
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *GREEN])
    image.putdata([0, 1])
    pixels = decode(encode(image, "PNG", transparency=bytes([51, 255])))
    np.testing.assert_allclose(pixels, [[over_white(RED, 51), GREEN]], atol=1)
    rows = [bytes([*RED, *GREEN])]
    keyed = png(2, 1, 8, 2, rows, (b"tRNS", struct.pack(">HHH", *RED)))
    np.testing.assert_array_equal(decode(keyed), [[(255, 255, 255), GREEN]])


def test_black_and_white_and_grey_are_repeated():
    bits = Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1")
    np.testing.assert_array_equal(decode(encode(bits, "PNG")), [[(0, 0, 0), (255, 255, 255)]])
    grey = Image.fromarray(np.array([[7, 200]], np.uint8))
    np.testing.assert_array_equal(decode(encode(grey, "PNG")), [[(7, 7, 7), (200, 200, 200)]])


# An image and, for each EXIF orientation, how it lies in the file.
UPRIGHT = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
STORED = {
    1: UPRIGHT,
    2: UPRIGHT[:, ::-1],
    3: UPRIGHT[::-1, ::-1],
    4: UPRIGHT[::-1],
    5: UPRIGHT.T,
    6: np.rot90(UPRIGHT),  # has to be turned clockwise
    7: UPRIGHT[::-1, ::-1].T,
    8: np.rot90(UPRIGHT, -1),
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_an_image_is_turned_as_its_exif_says(orientation, kind):
    stored = np.stack([np.ascontiguousarray(STORED[orientation])] * 3, -1)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(Image.fromarray(stored), kind, exif=exif, **options)
    np.testing.assert_array_equal(decode(data)[..., 0], UPRIGHT)
    turned = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(decode(data), np.asarray(turned.convert("RGB")))


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_turns_nothing(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = noise()
    np.testing.assert_array_equal(decode(encode(image, "PNG", exif=exif)), np.asarray(image))


@pytest.mark.parametrize("exif", [b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0nonsense", b"\0"])
def test_damaged_metadata_costs_no_image(exif):
    image = noise()
    np.testing.assert_array_equal(decode(encode(image, "PNG", exif=exif)), np.asarray(image))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_frame_of_several_is_read(kind):
    frames = [Image.new("RGB", (6, 5), colour) for colour in (RED, GREEN, BLUE)]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    np.testing.assert_array_equal(decode(data), np.broadcast_to(RED, (5, 6, 3)))


def test_a_single_pixel_is_an_image():
    np.testing.assert_array_equal(decode(encode(Image.new("RGB", (1, 1), BLUE), "PNG")), [[BLUE]])


# What does not -----------------------------------------------------------------------------------


def reason(file, limit=LIMIT, side=1):
    file = io.BytesIO(file) if isinstance(file, bytes) else file
    with pytest.raises(UnreadableImage) as error:
        read_rgb(file, limit, side)
    return str(error.value)


def test_every_refusal_says_why(tmp_path):
    assert reason(b"") == "this is no image, or of a format that is not read"
    assert reason(b"not an image") == "this is no image, or of a format that is not read"
    assert reason(tmp_path / "absent.jpg") == "No such file or directory"
    (tmp_path / "folder.jpg").mkdir()
    assert reason(tmp_path / "folder.jpg") == "Is a directory"
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "absent.jpg")
    assert reason(tmp_path / "dangling.jpg") == "No such file or directory"
    (tmp_path / "circle.jpg").symlink_to(tmp_path / "circle.jpg")
    assert reason(tmp_path / "circle.jpg") == "Too many levels of symbolic links"
    assert "truncated" in reason(encode(noise(), "JPEG")[:-200])
    floats = Image.fromarray(np.zeros((2, 2), np.float32))
    assert reason(encode(floats, "TIFF")) == "pixels of mode 'F' have no range that is known"
    integers = Image.fromarray(np.zeros((2, 2), np.int32))
    assert reason(encode(integers, "TIFF")) == "pixels of mode 'I' have no range that is known"


def test_formats_whose_readers_start_programs_are_not_read():
    data = encode(noise(), "EPS")
    assert Image.open(io.BytesIO(data)).format == "EPS"
    assert reason(data) == "this is no image, or of a format that is not read"


def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded():
    # The header promises 3.6 billion pixels; the file has none.
    start = time.perf_counter()
    assert "decompression bomb" in reason(png(60_000, 60_000, 8, 2, [b""]))
    at_limit = png(9459, 9459, 8, 2, [b""])
    assert f"9459x9459 pixels are more than data.max_image_pixels={10**7}" in reason(
        at_limit, 10**7
    )
    assert time.perf_counter() - start < 1.0


@pytest.mark.parametrize(("width", "fits"), [(10, True), (11, False)])
def test_the_limit_is_the_last_size_that_is_read(width, fits):
    data = encode(noise(10, width), "PNG")
    if fits:
        assert decode(data, limit=100).shape == (10, 10, 3)
    else:
        assert reason(data, 100) == "11x10 pixels are more than data.max_image_pixels=100"


def test_a_long_thin_image_is_refused_where_resizing_would_fill_the_memory():
    thin = encode(Image.new("L", (1, 30_000)), "PNG")
    assert decode(thin, limit=10**6, side=5).shape == (30_000, 1, 3)
    assert reason(thin, 10**6, side=6) == (
        "1x30000 pixels, resized to 6 on the short side, are more than "
        "data.max_image_pixels=1000000"
    )


KINDS = [
    ("PNG", {}),
    ("JPEG", {}),
    ("JPEG", {"progressive": True}),
    ("GIF", {}),
    ("WEBP", {}),
    ("WEBP", {"lossless": True}),
    ("TIFF", {}),
    ("TIFF", {"compression": "tiff_lzw"}),
    ("BMP", {}),
    ("PPM", {}),
]


@pytest.mark.parametrize(("kind", "options"), KINDS, ids=str)
def test_a_file_cut_off_anywhere_is_refused_or_whole(kind, options):
    """Never half an image with the rest in black or grey."""
    data = encode(noise(), kind, **options)
    whole, refused = decode(data), 0
    for length in range(0, len(data), max(1, len(data) // 300)):
        try:
            pixels = decode(data[:length])
        except UnreadableImage:
            refused += 1
        else:
            np.testing.assert_array_equal(pixels, whole)
            assert length > 0.9 * len(data)  # what was cut off is a trailer
    assert refused > 200


@settings(max_examples=300)
@given(
    kind=st.sampled_from([kind for kind in KINDS if kind[0] != "TIFF"]),
    damage=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=20),
)
def test_flipped_bytes_give_an_image_or_a_reason_and_nothing_else(kind, damage):
    data = bytearray(encode(noise(), kind[0], **kind[1]))
    for place, value in damage:
        data[int(place * (len(data) - 1))] = value
    with contextlib.suppress(UnreadableImage):
        assert decode(bytes(data), limit=10**6).size <= 3 * 10**6


@pytest.mark.parametrize(
    "error", [OSError(errno.EMFILE, "Too many open files"), MemoryError()], ids=repr
)
def test_what_the_process_lacks_is_not_blamed_on_the_image(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(type(error)) as raised:
        read_rgb(io.BytesIO(b""), LIMIT)
    assert raised.value is error
