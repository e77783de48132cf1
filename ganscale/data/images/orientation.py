"""Turns photographs upright, as their Exif data demands. Odd Exif data means upright."""

from PIL import Image

_TAG = 0x0112
_UNDO = {  # Exif 2.32, 4.6.4
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def orientation(image: Image.Image) -> int:
    """1 (upright) to 8, of an image that Pillow has opened; of a PNG, the pixels are decoded."""
    if image.format == "PNG":
        image.load()  # Exif data may follow the pixels, whose errors must not be lost here
    try:
        value = image.getexif().get(_TAG)
    except Exception:  # on garbage Pillow raises almost anything
        return 1
    return value if type(value) is int and value in _UNDO else 1


def turned_upright(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(_UNDO[orientation]) if orientation in _UNDO else image
