"""From the bytes of an image file to uint8 pixels of a fixed size.

JPEG, PNG, WebP and NumPy arrays are told apart by their first bytes, never by a file name. Nothing
here runs code from a file: of an array, only plain uint8 values are read.

Common files are decoded on fast paths, all others by Pillow:

- JPEGs by simplejpeg if it is installed (twice as fast as Pillow), straight into a batch. Both use
  libjpeg-turbo with the same settings and give the same pixels, except that simplejpeg rejects more
  of the *damaged* files.
- Plain PNGs by imagecodecs if it is installed (in two thirds of Pillow's time). Else Pillow gets
  only the compressed pixels: for an image of 32 pixels, its own parsing of the file costs more.
- Resizing is torch's, in 8 bits: a Lanczos filter like Pillow's (no value differs by more than
  two), in a fifth of the time. Older torch has no such filter: there, it is Pillow's.
"""

import io
import logging
import math
import struct
import zlib
from functools import cache

import numpy as np
from PIL import Image, UnidentifiedImageError

from ganscale.data.bad_samples import BadSampleError
from ganscale.data.images.orientation import orientation, turned_upright
from ganscale.data.images.sixteen_bits import eight_bits, has_few_bits, is_16_bit_png
from ganscale.errors import is_out_of_memory
from ganscale.resolution import Resolution, height_and_width

try:
    import simplejpeg
except ImportError:  # no wheel for this platform: Pillow decodes everything
    simplejpeg = None
try:
    from imagecodecs import png_decode  # pyright: ignore[reportMissingImports]
except ImportError:  # large, and not a dependency of ours
    png_decode = None

logger = logging.getLogger(__name__)

MAX_PIXELS = 64_000_000
"""Larger images are refused by their header: a JPEG of 1 MB and 100 megapixels takes 3 GB."""

_JPEG, _PNG, _NPY = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"\x93NUMPY"
_PNG_CHUNK = struct.Struct(">I4s")  # bytes of its body, kind
_PNG_HEADER = struct.Struct(">IIBBBBB")  # width, height, depth, colour, two constants, interlaced
_PNG_MODES = {0: "L", 2: "RGB", 4: "LA", 6: "RGBA"}  # a letter per channel
_GRAY_MODES = frozenset(("1", "L", "LA", "I", "I;16", "F"))
_PNG_PLAIN_CHUNKS = frozenset(
    b"IHDR IDAT IEND bKGD cHRM gAMA iCCP pHYs sBIT sRGB tEXt tIME".split()
)
"""Chunks of a PNG that do not change its pixels, as palettes, transparency and animations do."""


class DecodeError(BadSampleError):
    """The bytes are not an image that can be used."""


Size = tuple[int, int]
"""Height and width in pixels."""


def decode(data: bytes, resolution: Resolution | None, channels: int) -> np.ndarray:
    """The image in `data`, as (height, width, channels) uint8, C-contiguous, perhaps read-only.

    With a `resolution`, the largest centred part with this ratio of its sides is resized to it with
    a Lanczos filter; an image of this size keeps its exact pixels. None keeps the image's own size.
    `channels` is 1 (luma, ITU-R 601) or 3 (RGB). Transparent pixels are blended with white, Exif
    orientation is applied where it is valid, 16 bits become 8, and an animation gives its first
    frame.

    Raises DecodeError for every failure, also for images of more than MAX_PIXELS pixels.
    """
    size = None if resolution is None else height_and_width(resolution)
    return np.ascontiguousarray(_decode(data, size, channels, None))


def decode_into(data: bytes, out: np.ndarray) -> None:
    """Fills `out`, (height, width, channels) uint8, with what `decode` would return. Raises
    DecodeError as `decode` does; `out` may then be half filled. Warns once of an image that
    `has_few_bits`."""
    height, width, channels = out.shape
    pixels = _decode(data, (height, width), channels, out)
    if has_few_bits(data, pixels):
        _warn_of_few_bits()
    if pixels is not out:
        out[...] = pixels


@cache
def _warn_of_few_bits() -> None:
    logger.warning(
        "an image is a 16-bit PNG with values below 4,096, so it is nearly black; scale such "
        "images to the whole range before training"
    )


def _decode(data: bytes, size: Size | None, channels: int, out: np.ndarray | None) -> np.ndarray:
    """What `decode` returns, in any layout; `out` itself where it was decoded in place."""
    try:
        pixels = None
        if data.startswith(_JPEG):
            pixels = _decode_jpeg(data, size, channels, out)
        elif data.startswith(_PNG):
            pixels = _decode_plain_png(data, out)
        elif data.startswith(_NPY):
            pixels = _load_array(data)
        if pixels is None:
            pixels = _opaque(_open_upright(data, size, channels), channels)
        elif pixels.shape[2] != channels:
            image = Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)
            pixels = _opaque(image, channels)
        return pixels if size is None else _fit(pixels, size)
    except DecodeError:
        raise
    except Exception as error:
        # On damaged files Pillow raises almost anything: OSError, SyntaxError, struct.error, ...
        raise _decode_error("cannot be decoded", error) from error


def _decode_error(problem: str, error: Exception) -> DecodeError:
    """Raises `error` if memory ran out: the image may be fine."""
    if is_out_of_memory(error):
        raise error
    if isinstance(error, UnidentifiedImageError):
        return DecodeError("cannot be decoded: unknown image format", "no image")
    return DecodeError(f"{problem}: {error}")


def image_size(data: bytes) -> tuple[int, int]:
    """(height, width) of what `decode(data, None, ...)` would return, from the header alone. Raises
    DecodeError without a readable one."""
    try:
        if data.startswith(_NPY):
            height, width = _array_header(data)[0][:2]
            return height, width
        image = _open(data)
        width, height = image.size
        is_turned = may_have_exif(data) and orientation(image) >= 5
        return (width, height) if is_turned else (height, width)
    except DecodeError:
        raise
    except Exception as error:
        raise _decode_error("has no readable header", error) from error


def is_gray(data: bytes) -> bool:
    """Whether an image is stored without colors, from the header alone. Raises DecodeError without
    a readable one."""
    try:
        if data.startswith(_NPY):
            return _array_header(data)[0][2:] in ((), (1,))
        return _open(data).mode in _GRAY_MODES
    except DecodeError:
        raise
    except Exception as error:
        raise _decode_error("has no readable header", error) from error


def image_extension(data: bytes) -> str:
    """The usual extension, without dot, of an image file that `decode` can read."""
    extensions = {_JPEG: "jpg", _PNG: "png", _NPY: "npy"}
    return next((name for magic, name in extensions.items() if data.startswith(magic)), "webp")


def _open(data: bytes) -> Image.Image:
    """By Pillow, with only its header read. Raises DecodeError when it is too large."""
    image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP"))
    _refuse_bomb(image.height, image.width)
    return image


def _refuse_bomb(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        detail = f"has {height}x{width} pixels, more than the limit of {MAX_PIXELS:,}"
        raise DecodeError(detail, "too large")


def may_have_exif(data: bytes) -> bool:
    """Whether to ask Pillow, which decodes a whole PNG to find its Exif data."""
    if not data.startswith(_JPEG):
        return any(name in data for name in (b"eXIf", b"EXIF", b"Raw profile type exif"))
    # Exif data is in one of a JPEG's first segments, those of applications (0xE0 to 0xEF).
    position = 2
    while data[position : position + 1] == b"\xff" and data[position + 1] & 0xF0 == 0xE0:
        if data.startswith(b"Exif\0", position + 4):
            return True
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return False


def _open_upright(data: bytes, size: Size | None, channels: int) -> Image.Image:
    image = _open(data)
    turn = orientation(image) if may_have_exif(data) else 1
    if image.format == "JPEG":
        stored = (size[1], size[0]) if size and turn >= 5 else size  # some lie on their side
        scale = _jpeg_scale(image.height, image.width, stored)
        # Also with scale 1: a draft in mode L takes the luma as it is stored, as simplejpeg does.
        image.draft("L" if channels == 1 else None, (image.width // scale, image.height // scale))
    if is_16_bit_png(data):
        image = eight_bits(image, data)
    return turned_upright(image, turn)


def _decode_jpeg(
    data: bytes, size: Size | None, channels: int, out: np.ndarray | None
) -> np.ndarray | None:
    """(height, width, channels) uint8 of a plain JPEG, in `out` if that has this shape; None for
    one that Pillow must decode."""
    if simplejpeg is None or may_have_exif(data):
        return None
    try:
        header = simplejpeg.decode_jpeg_header(data)
    except ValueError:  # an uncommon subsampling, which Pillow can read
        return None
    height, width, colorspace = int(header[0]), int(header[1]), header[2]
    if colorspace not in ("Gray", "YCbCr"):
        return None
    _refuse_bomb(height, width)
    scale = _jpeg_scale(height, width, size)
    height, width = -(-height // scale), -(-width // scale)
    pixels = _memory(out, (height, width, channels))
    colorspace = "GRAY" if channels == 1 else "RGB"
    simplejpeg.decode_jpeg(data, colorspace, min_height=height, min_width=width, buffer=pixels)
    return pixels


def _memory(out: np.ndarray | None, shape: tuple[int, int, int]) -> np.ndarray:
    """`out` if a decoder can write an image of this shape into it, else new memory."""
    if out is not None and out.shape == shape and out.flags.c_contiguous:
        return out
    return np.empty(shape, np.uint8)


def _decode_plain_png(data: bytes, out: np.ndarray | None) -> np.ndarray | None:
    """(height, width, 1 to 4) uint8 of an 8-bit PNG without a palette, in `out` if that has this
    shape; None for others. Raises DecodeError for a damaged chunk: Pillow ignores the checksums of
    the pixels."""
    kinds, bodies, position = set(), [], len(_PNG)
    while len(data) - position >= _PNG_CHUNK.size and b"IEND" not in kinds:
        length, kind = _PNG_CHUNK.unpack_from(data, position)
        end = position + _PNG_CHUNK.size + length
        if zlib.crc32(data[position + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            raise DecodeError(f"cannot be decoded: its {kind.decode('latin-1')} chunk is damaged")
        if kind == b"IDAT":
            bodies.append(data[position + _PNG_CHUNK.size : end])
        kinds.add(kind)
        position = end + 4
    width, height, depth, colour, *_, is_interlaced = _PNG_HEADER.unpack_from(data, 16)
    _refuse_bomb(height, width)
    mode = _PNG_MODES.get(colour)
    is_plain = depth == 8 and not is_interlaced and kinds <= _PNG_PLAIN_CHUNKS
    has_exif_text = b"tEXt" in kinds and may_have_exif(data)
    is_valid = data[12:16] == b"IHDR" and 0 not in (height, width)
    if mode is None or not is_plain or has_exif_text or not is_valid:
        return None
    shape = height, width, len(mode)
    if png_decode is None:
        image = Image.frombytes(mode, (width, height), b"".join(bodies), "zip", mode, 0)
        return np.asarray(image).reshape(shape)
    pixels = _memory(out, shape)
    png_decode(data, out=pixels.squeeze(2) if mode == "L" else pixels)
    return pixels


def _jpeg_scale(height: int, width: int, size: Size | None) -> int:
    """8, 4, 2 or 1: the largest divisor of the image's size with which its centre still covers
    `size`. The decoder then skips the high frequencies, most of its work."""
    if size is None:
        return 1
    rows, columns = _centre(height, width, size)
    scales = (s for s in (8, 4, 2) if rows // s >= size[0] and columns // s >= size[1])
    return next(scales, 1)


def _centre(height: int, width: int, size: Size) -> Size:
    """Height and width of the largest part of an image with the ratio of the sides of `size`, to
    the nearest pixel."""
    rows, columns = size
    if height * columns > width * rows:
        return max(1, (2 * width * rows + columns) // (2 * columns)), width
    return height, max(1, (2 * height * columns + rows) // (2 * rows))


def _array_header(data: bytes) -> tuple[tuple[int, ...], bool, int]:
    """Of an .npy file: its shape, whether it is in Fortran order, and where the values begin."""
    stream = io.BytesIO(data)
    npy = np.lib.format
    is_first = npy.read_magic(stream) == (1, 0)
    read_header = npy.read_array_header_1_0 if is_first else npy.read_array_header_2_0
    shape, is_fortran, dtype = read_header(stream)
    has_image_shape = len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3, 4))
    if dtype != np.uint8 or not has_image_shape or 0 in shape:
        raise DecodeError(
            f"is an array of {dtype} {shape}; images are uint8, "
            "(height, width) or (height, width, 1, 3 or 4)"
        )
    _refuse_bomb(shape[0], shape[1])
    return shape, is_fortran, stream.tell()


def _load_array(data: bytes) -> np.ndarray:
    """(height, width, 1, 3 or 4) uint8, a view of `data`: only its header is interpreted."""
    shape, is_fortran, offset = _array_header(data)
    values = np.frombuffer(data, np.uint8, count=math.prod(shape), offset=offset)
    pixels = values.reshape(shape, order="F" if is_fortran else "C")
    return np.ascontiguousarray(pixels.reshape(*shape[:2], -1))


def _opaque(image: Image.Image, channels: int) -> np.ndarray:
    """(height, width, channels) uint8, transparent pixels blended with white."""
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.new("RGBA", layer.size, "white")
        image.alpha_composite(layer)
    mode = "L" if channels == 1 else "RGB"
    if image.mode == "CMYK":  # to grey by way of RGB
        image = image.convert("RGB")
    if image.mode != mode:
        image = image.convert(mode)
    return np.asarray(image).reshape(image.height, image.width, channels)


def _fit(pixels: np.ndarray, size: Size) -> np.ndarray:
    """The centre of `pixels`, resized to (*size, channels); `pixels` itself if it has this size."""
    if pixels.shape[:2] == size:
        return pixels
    height, width = pixels.shape[:2]
    rows, columns = _centre(height, width, size)
    top, left = (height - rows) // 2, (width - columns) // 2
    pixels = pixels[top : top + rows, left : left + columns]
    if (rows, columns) == size:
        return pixels
    if not _torch_has_lanczos():
        image = Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)
        small = image.resize((size[1], size[0]), Image.Resampling.LANCZOS)
        return np.asarray(small).reshape(*size, -1)
    import torch  # takes a second, and is not needed to list and index shards
    from torch.nn.functional import interpolate

    if not (pixels.flags.c_contiguous and pixels.flags.writeable):  # torch warns of the latter
        pixels = pixels.copy()
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    resized = interpolate(image, size, mode="lanczos", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


@cache
def _torch_has_lanczos() -> bool:
    import torch
    from torch.nn.functional import interpolate

    image = torch.zeros(1, 1, 2, 2, dtype=torch.uint8)
    try:
        interpolate(image, (1, 1), mode="lanczos", antialias=True)
    except (NotImplementedError, ValueError):
        return False
    return True
