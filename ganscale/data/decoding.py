"""From the bytes of an image file to uint8 pixels of a fixed size.

JPEG, PNG, WebP and NumPy arrays are told apart by their first bytes, never by a file name. Nothing
here runs code found in a file: of an array, nothing but plain uint8 values is read.

JPEG is decoded by simplejpeg where it is installed (twice as fast as Pillow, and without Python's
lock), else by Pillow. Both use libjpeg-turbo with the same settings and give the same pixels; they
differ for *damaged* files only, of which simplejpeg notices more.
"""

import io
import math

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

try:
    import simplejpeg
except ImportError:  # no wheel for this platform: Pillow decodes everything
    simplejpeg = None

MAX_PIXELS = 64_000_000
"""Larger images are refused by their header: 100 megapixels in a 1 MB JPEG take 3 GB to decode."""

_JPEG, _PNG, _NPY = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"\x93NUMPY"
_EXIF_ORIENTATION = 0x0112
_EXIF_SEARCH_BYTES = 65_536  # Exif is the first segment of a JPEG that has it


class DecodeError(Exception):
    """The bytes are no image that can be used; the message says why."""


def decode(data: bytes, resolution: int | None, channels: int) -> np.ndarray:
    """The image in `data`, as (height, width, channels) uint8, C-contiguous, perhaps read-only.

    With a `resolution` (pixels), the largest centred square is resized to it with a Lanczos filter;
    an image that has this size already keeps its exact pixels. None keeps the image's own size.
    `channels` is 1 (luma, ITU-R 601) or 3 (RGB). Transparency is laid on white, Exif orientation is
    applied, 16 bits become 8, and an animation gives its first frame.

    Raises DecodeError for every failure, among them images of more than MAX_PIXELS pixels.
    """
    try:
        pixels = _decode_without_pillow(data, resolution, channels)
        if pixels is None:
            image = _open(data)
            if image.format == "JPEG":
                _draft(image, resolution, channels)
            if _orientation(image, data) != 1:
                image = ImageOps.exif_transpose(image)
        else:
            height, width = (resolution, resolution) if resolution else pixels.shape[:2]
            if pixels.shape == (height, width, channels):
                return pixels
            image = Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)
        pixels = np.asarray(_fit(_flatten(image, channels), resolution))
    except DecodeError:
        raise
    except UnidentifiedImageError as error:
        raise DecodeError("cannot be decoded: its format is none that is known") from error
    except Exception as error:
        # On damaged files Pillow raises almost anything: OSError, SyntaxError, struct.error, ...
        raise DecodeError(f"cannot be decoded: {error}") from error
    return np.ascontiguousarray(pixels.reshape(*pixels.shape[:2], channels))


def image_size(data: bytes) -> tuple[int, int]:
    """(height, width) in pixels as `decode(data, None, ...)` would give it, from the header alone.

    Raises DecodeError when there is no readable header.
    """
    try:
        if data.startswith(_NPY):
            height, width = _array_header(data)[0][:2]
            return height, width
        image = _open(data)
        width, height = image.size
        return (width, height) if _orientation(image, data) >= 5 else (height, width)
    except DecodeError:
        raise
    except UnidentifiedImageError as error:
        raise DecodeError("cannot be decoded: its format is none that is known") from error
    except Exception as error:
        raise DecodeError(f"has no readable header: {error}") from error


def image_extension(data: bytes) -> str:
    """The usual extension, without dot, for an image file that `decode` takes."""
    if data.startswith(_JPEG):
        return "jpg"
    if data.startswith(_PNG):
        return "png"
    return "npy" if data.startswith(_NPY) else "webp"


def _open(data: bytes) -> Image.Image:
    """The image with only its header read, refused when it is too large."""
    image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP"))
    _refuse_bomb(image.height, image.width)
    return image


def _refuse_bomb(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise DecodeError(f"has {height}x{width} pixels, more than the limit of {MAX_PIXELS:,}")


def _may_have_exif(data: bytes) -> bool:
    """Whether it is worth asking Pillow, which decodes a whole PNG to find its Exif."""
    if data.startswith(_JPEG):
        return b"Exif\0" in data[:_EXIF_SEARCH_BYTES]
    return b"eXIf" in data or b"EXIF" in data


def _orientation(image: Image.Image, data: bytes) -> int:
    """The Exif orientation, 1 (upright) to 8."""
    return image.getexif().get(_EXIF_ORIENTATION, 1) if _may_have_exif(data) else 1


def _decode_without_pillow(data: bytes, resolution: int | None, channels: int) -> np.ndarray | None:
    """(height, width, 1, 3 or 4) uint8 for arrays and plain JPEG; None for what Pillow must do."""
    if data.startswith(_NPY):
        return _load_array(data)
    if simplejpeg is None or not data.startswith(_JPEG) or _may_have_exif(data):
        return None
    try:
        header = simplejpeg.decode_jpeg_header(data)
    except ValueError:  # an uncommon subsampling, which Pillow can read
        return None
    height, width, colorspace = int(header[0]), int(header[1]), header[2]
    if colorspace not in ("Gray", "YCbCr"):
        return None
    _refuse_bomb(height, width)
    scale = _jpeg_scale(height, width, resolution)
    return simplejpeg.decode_jpeg(
        data,
        colorspace="GRAY" if channels == 1 else "RGB",
        min_height=-(-height // scale),
        min_width=-(-width // scale),
    )


def _draft(image: Image.Image, resolution: int | None, channels: int) -> None:
    """Makes Pillow decode a JPEG at the scale that `_decode_without_pillow` would take.

    Also with scale 1: a draft in mode L takes the luma as it is stored, as simplejpeg does.
    """
    scale = _jpeg_scale(image.height, image.width, resolution)
    size = (image.width // scale, image.height // scale)
    image.draft("L" if channels == 1 else None, size)


def _jpeg_scale(height: int, width: int, resolution: int | None) -> int:
    """8, 4, 2 or 1: the smallest decoded size, 1/scale, that still covers the resolution.

    The decoder then skips the high frequencies, which is most of its work, and does the averaging.
    """
    if resolution is None:
        return 1
    return next((s for s in (8, 4, 2) if min(height, width) // s >= resolution), 1)


def _array_header(data: bytes) -> tuple[tuple[int, ...], bool, int]:
    """Shape, whether it is in Fortran order, and where the values begin, of an .npy file."""
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    else:
        shape, is_fortran, dtype = np.lib.format.read_array_header_2_0(stream)
    has_image_shape = len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3, 4))
    if dtype != np.uint8 or not has_image_shape or 0 in shape:
        raise DecodeError(
            f"is an array of {dtype} {shape}; images are uint8, "
            "(height, width) or (height, width, 1, 3 or 4)"
        )
    _refuse_bomb(shape[0], shape[1])
    return shape, is_fortran, stream.tell()


def _load_array(data: bytes) -> np.ndarray:
    """(height, width, 1, 3 or 4) uint8, a view of `data`: only its header is ever interpreted."""
    shape, is_fortran, offset = _array_header(data)
    values = np.frombuffer(data, np.uint8, count=math.prod(shape), offset=offset)
    pixels = values.reshape(shape, order="F" if is_fortran else "C")
    return np.ascontiguousarray(pixels.reshape(*shape[:2], -1))


def _flatten(image: Image.Image, channels: int) -> Image.Image:
    """`image` opaque, in mode L or RGB."""
    if image.mode.startswith("I"):
        # 16-bit grey. Pillow's own conversion would clip at 255; the high byte is what it takes of
        # 16-bit colours.
        values = np.asarray(image).astype(np.int64).clip(0, 65535)
        image = Image.fromarray((values >> 8).astype(np.uint8))
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.new("RGBA", layer.size, "white")
        image.alpha_composite(layer)
    mode = "L" if channels == 1 else "RGB"
    if image.mode == mode:
        return image
    return image.convert("RGB").convert(mode) if image.mode == "CMYK" else image.convert(mode)


def _fit(image: Image.Image, resolution: int | None) -> Image.Image:
    """The largest centred square of `image`, resized to `resolution`.

    As if the whole image had been resized and then cropped: the filter reads beyond the square.
    """
    if resolution is None or image.size == (resolution, resolution):
        return image
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = (left, top, left + side, top + side)
    return image.resize((resolution, resolution), Image.Resampling.LANCZOS, box=square)
