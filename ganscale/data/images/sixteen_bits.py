"""PNGs of 16 bits per channel. Pillow drops their low bytes, and with them the exact colour that is
transparent."""

import io

import numpy as np
from PIL import Image, ImageFile

_PNG = b"\x89PNG\r\n\x1a\n"
_DEPTH = 24  # where a PNG has its bits per channel
_FEW_BITS = 1 << 12


def is_16_bit_png(data: bytes) -> bool:
    return data.startswith(_PNG) and data[_DEPTH : _DEPTH + 1] == b"\x10"


def has_few_bits(data: bytes, pixels: np.ndarray) -> bool:
    """Whether a 16-bit PNG holds values of 12 bits at most, as scanners and microscopes write them:
    then its decoded `pixels` are nearly black."""
    if not is_16_bit_png(data) or pixels.max() >= _FEW_BITS >> 8:
        return False
    return 0 < int(_values(data).max()) < _FEW_BITS


def eight_bits(image: Image.Image, data: bytes) -> Image.Image:
    """The high bytes of a 16-bit PNG that Pillow has opened, a transparent colour as white."""
    transparent = image.info.get("transparency")
    if transparent is None and image.mode != "I;16":
        return image
    values = _values(data)
    high = (values >> 8).astype(np.uint8)
    if transparent is not None:
        high[(values == transparent).all(axis=2)] = 255
    return Image.fromarray(high.squeeze(2) if high.shape[2] == 1 else high)


def _open(data: bytes) -> ImageFile.ImageFile:
    return Image.open(io.BytesIO(data), formats=("PNG",))


def _values(data: bytes) -> np.ndarray:
    """(height, width, channels) uint16, without an alpha channel."""
    image = _open(data)
    if image.mode == "I;16":
        return np.asarray(image).astype(np.uint16)[:, :, None]
    high = np.asarray(image)[:, :, :3].astype(np.uint16)
    if image.mode != "RGB":  # with an alpha channel, the high bytes are all that is needed
        return high << 8
    image = _open(data)
    image.tile = [tile._replace(args="RGB;16L") for tile in image.tile]  # big-endian: the low bytes
    return high << 8 | np.asarray(image)
