"""Writes generated images as one picture, a folder of PNGs or WebDataset shards."""

import io
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from ganscale.data.images.grid import image_grid, to_pil_image
from ganscale.errors import UserError
from ganscale.shards.indexing import build_manifest

Chunks = Iterable[UInt8[Tensor, "chunk height width channels"]]


def check_extension(path: Path) -> None:
    """Raises UserError if Pillow writes no pictures with such a name."""
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise UserError(f"{path} needs the extension of a picture, such as .png")


def write_grid(chunks: Chunks, path: Path, columns: int) -> None:
    """All images in one picture, row by row; the file name's extension selects the format.
    Raises UserError for a picture that is too large for it."""
    grid = image_grid(np.concatenate([chunk.numpy() for chunk in chunks]), columns)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        to_pil_image(grid).save(path)
    except ValueError as error:
        raise UserError(f"{path} cannot be written: {error}") from error


def write_folder(chunks: Chunks, folder: Path) -> None:
    """A file `000000123.png` for each image. Raises UserError if the folder contains PNGs."""
    _make_folder(folder, ".png")
    for index, image in enumerate(_images(chunks)):
        to_pil_image(image).save(folder / f"{index:09d}.png")


def write_shards(chunks: Chunks, folder: Path, labels: Tensor | None) -> None:
    """Shards of PNGs (and classes) with their manifest, like those of `ganscale shards write`.
    Raises UserError if the folder contains shards."""
    from webdataset.writer import ShardWriter

    _make_folder(folder, ".tar")
    pattern = str(folder / "shard-%06d.tar")
    with ShardWriter(pattern, maxcount=10_000, encoder=False, verbose=0, mtime=0) as shards:
        for index, image in enumerate(_images(chunks)):
            stream = io.BytesIO()
            to_pil_image(image).save(stream, "PNG")
            sample = {"__key__": f"{index:09d}", "png": stream.getvalue()}
            if labels is not None:
                sample["cls"] = str(int(labels[index])).encode()
            shards.write(sample)
    build_manifest(folder)


def _make_folder(folder: Path, extension: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.glob(f"*{extension}")):
        raise UserError(f"{folder} already contains {extension} files; write into another folder")


def _images(chunks: Chunks) -> Iterator[np.ndarray]:
    for chunk in chunks:
        yield from chunk.numpy()
