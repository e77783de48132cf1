"""Many images in one."""

import numpy as np
from PIL import Image


def image_grid(images: np.ndarray, columns: int) -> np.ndarray:
    """`images` row by row in a grid; the last row is filled with black.

    images: (count, height, width, channels) uint8, count >= 1
    returns: (rows * height, columns * width, channels) uint8, rows = ceil(count / columns)
    """
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    cells = np.zeros((rows * columns, height, width, channels), images.dtype)
    cells[:count] = images
    grid = cells.reshape(rows, columns, height, width, channels)
    return grid.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, channels)


def to_pil_image(image: np.ndarray) -> Image.Image:
    """(height, width, 1 or 3) uint8 as a grey or RGB image of Pillow's."""
    return Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image)
