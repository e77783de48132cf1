"""Two real image sets bundled with the package, so that a first run needs no download.

`mnist`: 5,000 handwritten digits, 500 of each, 32x32 grey, white on black.
`emoji`: 3,786 emoji on white, 32x32 RGB, labelled by their Unicode category.

A set is a lossless WebP sheet of tiles, row by row, and a JSON file with the tile size in pixels,
the columns of the sheet, the labels and the class names. `NAME.LICENSE.txt` has its origin and
licence; `tools/build_bundled.py` makes the files.
"""

import json
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ganscale.errors import UserError

NAMES = ("emoji", "mnist")
RESOLUTION = 32
"""Height and width of every bundled image, in pixels: a power of two, for strided convolutions."""


class BundledSet(NamedTuple):
    """images: (count, 32, 32, channels) uint8; labels: (count,) int32, into `class_names`."""

    images: np.ndarray
    labels: np.ndarray
    class_names: list[str]


@lru_cache(maxsize=1)
def load(name: str) -> BundledSet:
    """The bundled set `name`. Raises UserError for a name that is not in NAMES."""
    if name not in NAMES:
        raise UserError(f"unknown bundled set '{name}': choose from {', '.join(NAMES)}")
    folder = Path(__file__).parent
    about = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    labels = np.array(about["labels"], np.int32)
    with Image.open(folder / f"{name}.webp") as image:
        sheet = np.asarray(image.convert("L" if about["channels"] == 1 else "RGB"))
    tile = about["tile"]
    cells = sheet.reshape(-1, tile, about["columns"], tile, about["channels"])
    images = cells.transpose(0, 2, 1, 3, 4).reshape(-1, tile, tile, about["channels"])
    # MNIST's 28 pixels get the usual black border, since resizing would blur them.
    border = (RESOLUTION - tile) // 2
    margins = ((0, 0), (border, border), (border, border), (0, 0))
    return BundledSet(np.pad(images[: len(labels)], margins), labels, about["class_names"])
