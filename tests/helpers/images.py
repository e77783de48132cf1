"""Image files as bytes."""

import io

import numpy as np
from PIL import Image


def encoded(image: Image.Image | np.ndarray, file_format: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    image.save(stream, file_format, **options)
    return stream.getvalue()


def noise(seed: int, height: int = 4, width: int | None = None) -> np.ndarray:
    """(height, width, 3) uint8; another image for every seed."""
    shape = (height, height if width is None else width, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def png(seed: int, height: int = 4, width: int | None = None) -> bytes:
    return encoded(noise(seed, height, width))


def jpeg(seed: int, height: int = 40, width: int | None = None) -> bytes:
    return encoded(noise(seed, height, width), "JPEG")


def numbered(number: int, size: int = 4) -> bytes:
    """A PNG in which the first channel of every pixel is `number`."""
    return encoded(Image.new("RGB", (size, size), (number, 255 - number, 7)))
