"""Where generated images go: one picture, a folder, or WebDataset shards."""

import io
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from torch import Tensor

from ganscale.data.images.grid import image_grid, to_pil_image
from ganscale.data.manifest import Manifest
from ganscale.errors import UserError
from ganscale.shards.indexing import build_manifest

SHARD_SAMPLES = 10_000

Chunks = Iterable[UInt8[Tensor, "chunk height width channels"]]


def write_grid(chunks: Chunks, path: Path, columns: int) -> None:
    """All images as one picture, row by row, in the format that the name's ending says."""
    grid = image_grid(np.stack(list(_each(chunks))), columns)
    path.parent.mkdir(parents=True, exist_ok=True)
    to_pil_image(grid).save(path)


def write_folder(chunks: Chunks, folder: Path) -> int:
    """One `000000123.png` an image; returns how many.

    Raises UserError for a folder that holds images already.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.glob("*.png")):
        raise UserError(f"{folder} holds images already; write into another folder")
    count = 0
    for image in _each(chunks):
        to_pil_image(image).save(folder / f"{count:09d}.png")
        count += 1
    return count


def write_shards(chunks: Chunks, folder: Path, labels: Tensor | None) -> Manifest:
    """Shards of PNGs (and classes) with their manifest, as `ganscale shards write` makes them.

    Raises UserError for a folder that holds shards already.
    """
    from webdataset.writer import ShardWriter

    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.glob("*.tar")):
        raise UserError(f"{folder} holds shards already; write into another folder")
    pattern = str(folder / "shard-%06d.tar")
    with ShardWriter(pattern, maxcount=SHARD_SAMPLES, encoder=False, verbose=0, mtime=0) as shards:
        for index, image in enumerate(_each(chunks)):
            stream = io.BytesIO()
            to_pil_image(image).save(stream, "PNG")
            sample = {"__key__": f"{index:09d}", "png": stream.getvalue()}
            if labels is not None:
                sample["cls"] = str(int(labels[index])).encode()
            shards.write(sample)
    return build_manifest(folder)


def _each(chunks: Chunks) -> Iterator[np.ndarray]:
    for chunk in chunks:
        yield from chunk.numpy()
