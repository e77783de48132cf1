"""A good picture is not lost to odd metadata, and 16-bit PNGs are read as they are meant."""

import logging
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ganscale.data.images import decoding
from ganscale.data.images.decoding import decode, decode_into, image_size
from ganscale.shards.shard_index import pixel_size
from tests.helpers.images import encoded, noise

ORIENTATION = 0x0112
SHORT, ASCII, RATIONAL, DOUBLE = 3, 2, 5, 12


def exif(tag_type: int, count: int, value: bytes, tag: int = ORIENTATION) -> bytes:
    """Exif data with one tag, written by hand: no library writes wrong types."""
    entry = struct.pack("<HHI", tag, tag_type, count) + value.ljust(4, b"\0")[:4]
    directory = struct.pack("<H", 1) + entry + bytes(4)
    return b"Exif\0\0" + b"II*\0" + struct.pack("<I", 8) + directory + b"\0" * 32


metadata_warnings = pytest.mark.filterwarnings(
    "ignore:Corrupt EXIF data", "ignore:Truncated File Read", "ignore:Metadata Warning"
)
"""Pillow warns of what it cannot read; in tests, warnings are errors."""

ODD = {
    "orientation 99": exif(SHORT, 1, struct.pack("<H", 99)),
    "orientation 0": exif(SHORT, 1, struct.pack("<H", 0)),
    "text": exif(ASCII, 2, b"6\0"),
    "long text": exif(ASCII, 4, b"abc\0"),
    "a fraction by zero": exif(RATIONAL, 1, struct.pack("<I", 200)),
    "a number far away": exif(DOUBLE, 1, struct.pack("<I", 1 << 30)),
    "no values": exif(SHORT, 0, b""),
    "an unknown type": exif(200, 1, b"\6"),
    "garbage": b"Exif\0\0" + bytes(range(64)),
    "nothing": b"Exif\0\0",
    "a header only": b"Exif\0\0II*\0\xff\xff\xff\xff",
    "another tag of text": exif(ASCII, 2, b"x\0", tag=0x011A),
    "a sub-directory that is not one": exif(ASCII, 4, b"abc\0", tag=0x8769),
}


def with_exif(file_format: str, content: bytes) -> bytes:
    image = Image.fromarray(noise(0, 12, 20))
    options = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}.get(file_format, {})
    return encoded(image, file_format, exif=content, **options)


@metadata_warnings
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("content", ODD.values(), ids=ODD)
def test_a_picture_with_odd_exif_is_upright(file_format: str, content: bytes):
    plain = decode(with_exif(file_format, b""), None, 3)
    data = with_exif(file_format, content)
    assert np.array_equal(decode(data, None, 3), plain)
    assert image_size(data) == pixel_size(data) == (12, 20)


@metadata_warnings
@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=80))
def test_whatever_bytes_exif_holds_the_picture_is_read(content: bytes):
    size = decode(with_exif("JPEG", b"Exif\0\0II*\0\x08\0\0\0\x01\0" + content), None, 3).shape
    assert size in ((12, 20, 3), (20, 12, 3))


def png_16(values: np.ndarray, transparent: tuple[int, ...] = ()) -> bytes:
    """A PNG of (height, width, channels) uint16, written by hand: Pillow writes only grey ones."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    height, width, channels = values.shape
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    data = b"\x89PNG\r\n\x1a\n"
    data += chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0))
    if transparent:
        data += chunk(b"tRNS", np.array(transparent, ">u2").tobytes())
    return data + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def values_16(channels: int, limit: int = 65536) -> np.ndarray:
    return np.random.default_rng(0).integers(0, limit, (6, 5, channels), dtype=np.uint16)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_transparent_colour_of_a_16_bit_png_is_white_and_its_neighbours_are_not(channels: int):
    """The low byte counts, which 8 bits do not hold."""
    values = values_16(channels)
    values[2, 3] = (0x1234, 0x5678, 0x9ABC)[:channels]
    values[4, 4] = values[2, 3] + 1  # the same in 8 bits
    data = png_16(values, tuple(values[2, 3].tolist()))
    expected = (values >> 8).astype(np.uint8)
    expected[2, 3] = 255
    assert np.array_equal(decode(data, None, channels), expected)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_16_bits_become_their_high_byte(channels: int):
    values = values_16(channels)
    if channels in (2, 4):
        values[:, :, -1] = 65535  # opaque
    colours = 1 if channels < 3 else 3
    assert np.array_equal(decode(png_16(values), None, colours), (values >> 8)[:, :, :colours])


@pytest.mark.parametrize(
    ("data", "is_dark"),
    [
        (png_16(values_16(1, 4096)), True),
        (png_16(values_16(1, 256)), True),
        (png_16(values_16(3, 4096)), True),
        (png_16(values_16(3, 256)), True),
        (png_16(values_16(1)), False),
        (png_16(values_16(3)), False),
        (png_16(values_16(1, 1)), False),
        (encoded(Image.new("L", (5, 6), 3)), False),
    ],
    ids=["12 bits", "8 bits", "12 RGB", "8 RGB", "16 bits", "16 RGB", "black", "8-bit PNG"],
)  # fmt: skip
def test_16_bit_pngs_that_hold_fewer_bits_are_reported_once(caplog, data: bytes, is_dark: bool):
    decoding._warn_of_few_bits.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            decode_into(data, np.empty((5, 5, 3), np.uint8))
    messages = [record.message for record in caplog.records]
    assert len(messages) == is_dark
    assert all("16-bit PNG with values below 4,096, so it is nearly black" in m for m in messages)
