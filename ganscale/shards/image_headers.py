"""Whether bytes are an image, and how large, from its header: quick, since indexing asks it of all.

The answers are those of `decoding.image_size`, which goes through Pillow: 20 to 60 us an image.
"""

import struct
import zlib
from functools import lru_cache

from ganscale.data.images.decoding import MAX_PIXELS, DecodeError, image_size

try:
    import simplejpeg
except ImportError:  # as in decoding
    simplejpeg = None

MAGIC_BYTES = 12
"""So many first bytes tell what kind of image it is."""

_JPEG, _PNG, _NPY = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"\x93NUMPY"
_PNG_HEADER = _PNG + b"\0\0\0\rIHDR"


def is_image(head: bytes) -> bool:
    """Whether a file that begins with `head`, MAGIC_BYTES or all of it, is of a kind that
    `decoding.decode` takes."""
    return head.startswith((_JPEG, _PNG, _NPY)) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


def pixel_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) of a whole image file as it will be decoded; None without a good header."""
    size = None
    if data.startswith(_PNG_HEADER):
        size = _png_size(data)
    elif data.startswith(_NPY) and data[6:8] == b"\x01\0":
        return _array_size(data[: 10 + int.from_bytes(data[8:10], "little")])
    elif data.startswith(_JPEG) and simplejpeg is not None and b"Exif\0" not in data[:65_536]:
        try:
            height, width = simplejpeg.decode_jpeg_header(data)[:2]
            size = (int(height), int(width))
        except ValueError:
            size = None
    if size is not None and 0 < size[0] * size[1] <= MAX_PIXELS:
        return size
    try:
        return image_size(data)
    except DecodeError:
        return None


def _png_size(data: bytes) -> tuple[int, int] | None:
    # Exif may say that the image lies on its side; in older files a text chunk says so.
    if b"eXIf" in data or b"EXIF" in data or len(data) < 33:
        return None
    if zlib.crc32(data[12:29]) != int.from_bytes(data[29:33], "big"):
        return None
    width, height = struct.unpack(">II", data[16:24])
    return height, width


@lru_cache(maxsize=64)
def _array_size(header: bytes) -> tuple[int, int] | None:
    try:
        return image_size(header)
    except DecodeError:
        return None
