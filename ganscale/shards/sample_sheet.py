"""A grid of samples from all over a data set, to look at it."""

from pathlib import Path

import numpy as np
from PIL import Image

from ganscale.data.bad_samples import BadSampleError
from ganscale.data.images.decoding import decode
from ganscale.data.images.grid import image_grid
from ganscale.data.manifest import Manifest
from ganscale.data.shard_reader import ShardReader
from ganscale.schema import DataConfig

_LONGEST_SIDE = 128  # the sheet should fit on a screen


def write_sheet(manifest: Manifest, path: Path, count: int) -> int:
    """Writes `count` evenly spaced samples as a PNG; returns how many are bad, and left black."""
    images, bad_samples = read_samples(manifest, count)
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = int(np.ceil(np.sqrt(len(images))))
    Image.fromarray(image_grid(images, columns)).save(path, "PNG")
    return bad_samples


def read_samples(manifest: Manifest, count: int) -> tuple[np.ndarray, int]:
    """`count` evenly spaced samples, or all if there are fewer, as (count, height, width, 3) uint8;
    and how many of them are bad, and left black."""
    count = min(count, len(manifest.samples))
    size = manifest.resolution or (_LONGEST_SIDE, _LONGEST_SIDE)
    shrink = min(1.0, _LONGEST_SIDE / max(size))
    height, width = (max(1, round(side * shrink)) for side in size)
    images = np.zeros((count, height, width, 3), np.uint8)
    reader = ShardReader(manifest, DataConfig(path=manifest.source))
    bad_samples = 0
    for cell, sample in enumerate(np.linspace(0, len(manifest.samples) - 1, count).astype(int)):
        try:
            images[cell] = decode(reader.read(int(sample)), [height, width], 3)
        except BadSampleError:
            bad_samples += 1
    return images, bad_samples
