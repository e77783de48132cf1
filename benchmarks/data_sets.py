"""Images for `benchmarks.data`, written in the formats of all its readers."""

import io
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from ganscale.shards import bundled
from ganscale.shards.indexing import build_manifest

SHARDS = 8

Files = list[tuple[bytes, int]]
"""Image files and their labels."""


def natural_jpegs(count: int, size: int = 256) -> Files:
    """Substitutes for photographs: noise with a natural spectrum (amplitude 1/f^1.2, more in grey
    than in colours) and an emoji blended in, enlarged to at least a third of the side. Quality 90;
    about 27 KB at 256 pixels.
    """
    random = np.random.default_rng(0)
    emoji, labels, _ = bundled.load("emoji")
    fields = [_natural_noise(size, random) for _ in range(32)]
    files = []
    for _ in range(count):
        down, right = random.integers(0, size, 2).tolist()
        image = np.roll(fields[random.integers(len(fields))], (down, right), (0, 1))
        index, side = int(random.integers(len(emoji))), int(random.integers(size // 3, size))
        large = Image.fromarray(emoji[index]).resize((side, side), Image.Resampling.BICUBIC)
        top, left = random.integers(0, size - side, 2).tolist()
        image[top : top + side, left : left + side] *= 0.4
        image[top : top + side, left : left + side] += 0.6 * np.asarray(large)
        files.append((_encode(image.round().astype(np.uint8), "jpeg"), int(labels[index])))
    return files


def emoji_pngs() -> Files:
    """The 3,786 bundled emoji, 32 pixels, about 1.7 KB each."""
    emoji, labels, _ = bundled.load("emoji")
    pairs = zip(emoji, labels, strict=True)
    return [(_encode(image, "png"), int(label)) for image, label in pairs]


def _natural_noise(size: int, random: np.random.Generator) -> np.ndarray:
    """(size, size, 3) float64 in [0, 255]."""
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    frequency[0, 0] = np.inf
    white = np.fft.rfft2(random.standard_normal((3, size, size)))
    luma, first, second = np.fft.irfft2(white / frequency**1.2)
    luma, first, second = (plane / plane.std() for plane in (luma, first, second))
    colours = [luma + 0.3 * first, luma - 0.1 * first + 0.1 * second, luma - 0.3 * second]
    return np.clip(120 + 40 * np.stack(colours, axis=-1), 0, 255)


def _encode(image: np.ndarray, file_format: str) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, file_format, quality=90)
    return stream.getvalue()


def write_shards(folder: Path, files: Files, extension: str) -> None:
    """WebDataset tars and our manifest, for webdataset and for us."""
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:05}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for index in range(shard, len(files), SHARDS):
                image, label = files[index]
                for content, kind in ((image, extension), (str(label).encode(), "cls")):
                    member = tarfile.TarInfo(f"{index:06}.{kind}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    build_manifest(folder)


def write_loose(folder: Path, files: Files, extension: str) -> None:
    """A file for each image, named INDEX_LABEL."""
    for index, (image, label) in enumerate(files):
        (folder / f"{index:06}_{label}.{extension}").write_bytes(image)


def write_litdata(folder: Path, files: Files, extension: str) -> None:
    """litdata's chunks."""
    from litdata.streaming.writer import BinaryWriter  # pyright: ignore[reportMissingImports]

    writer = BinaryWriter(str(folder), chunk_size=-(-len(files) // SHARDS))
    for index, (image, label) in enumerate(files):
        writer[index] = {"image": image, "label": label}
    writer.done()
    writer.merge()


def write_mosaic(folder: Path, files: Files, extension: str) -> None:
    """mosaicml-streaming's MDS shards."""
    from streaming import MDSWriter  # pyright: ignore[reportMissingImports]

    size = sum(len(image) for image, _ in files) // SHARDS
    columns = {"image": "bytes", "label": "int"}
    with MDSWriter(out=str(folder), columns=columns, size_limit=size) as writer:
        for image, label in files:
            writer.write({"image": image, "label": label})


FORMATS: dict[str, Callable[[Path, Files, str], None]] = {
    "shards": write_shards,
    "loose": write_loose,
    "litdata": write_litdata,
    "mosaic": write_mosaic,
}


def write(root: Path, files: Files, extension: str, formats: Iterable[str]) -> dict[str, str]:
    """Writes `files` to root/FORMAT for each of `formats`; returns the errors, by format."""
    failures = {}
    for name in formats:
        folder = root / name
        folder.mkdir(parents=True)
        try:
            FORMATS[name](folder, files, extension)
        except Exception as error:  # a rival's package may raise anything
            failures[name] = f"{type(error).__name__}: {error}"
    return failures
