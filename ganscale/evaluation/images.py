"""Images to judge, by their positions: made by a generator, or read from a data set or files."""

import hashlib
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Int64, UInt8
from torch import Tensor, nn

from ganscale.data.bad_samples import BadSampleError
from ganscale.data.images.decoding import DecodeError, decode, decode_into, is_gray
from ganscale.data.images.preprocessing import to_bytes
from ganscale.data.manifest import Manifest
from ganscale.data.order import Order
from ganscale.data.shard_reader import SampleLocation, ShardReader
from ganscale.data.thread_pool import DaemonThreadPool
from ganscale.errors import UserError
from ganscale.evaluation.sampling import sample_labels, sample_latents, sampling_draws
from ganscale.networks.batch_groups import check_whole_groups
from ganscale.networks.forward import in_evaluation
from ganscale.schema import DataConfig
from ganscale.shards.sources import Source, SourceImage, image_reader

_CLOSE_SECONDS = 5.0
_LOOKED_AT = 8  # images of a set


class ImageChunk(NamedTuple):
    """is_usable: False for an image that could not be read"""

    images: UInt8[Tensor, "chunk channels height width"]
    is_usable: Bool[Tensor, " chunk"]


@runtime_checkable
class Images(Protocol):
    """Any number of images of one size."""

    def __len__(self) -> int: ...

    def chunk(self, rows: range) -> ImageChunk:
        """On the CPU or a device. Raises UserError or UnavailableError."""
        ...


class GeneratedImages:
    """The images of positions 0 to `count`, from the latents of `ganscale sample` with the same
    seed (whose classes come in turn), quantised to uint8 as files would be.

    labels: of all positions, None for an unconditional generator
    """

    def __init__(
        self,
        generator: nn.Module,
        seed: int,
        count: int,
        latent_dim: int,
        labels: Tensor | None,
    ) -> None:
        """Raises UserError for a count that a generator of groups of images does not make."""
        check_whole_groups(generator, "evaluation.samples", count)
        self._generator, self._seed, self._count = generator, seed, count
        self._latent_dim, self._labels = latent_dim, labels

    def __len__(self) -> int:
        return self._count

    @torch.no_grad()
    def chunk(self, rows: range) -> ImageChunk:
        """Raises UserError for images that are not finite, and for rows that do not make up groups
        of the generator's."""
        check_whole_groups(self._generator, "evaluation.batch_size", len(rows))
        weights = next(self._generator.parameters())
        inputs = [sample_latents(self._seed, rows.start, len(rows), self._latent_dim).to(weights)]
        if self._labels is not None:
            inputs.append(self._labels[rows.start : rows.stop].to(weights.device))
        positions = torch.arange(rows.start, rows.stop, device=weights.device)
        with in_evaluation(self._generator), sampling_draws(self._seed, positions):
            images = self._generator(*inputs)
        if not bool(images.isfinite().all()):
            raise UserError("the generator makes images with NaN or infinite pixels")
        usable = torch.ones(len(rows), dtype=torch.bool)
        return ImageChunk(to_bytes(images).permute(0, 3, 1, 2), usable)


Samples = range | Int64[np.ndarray, " images"]
"""Of a data set, by index: an array of all of them could be larger than memory."""


class DataSetImages:
    """Samples of a data set, decoded as for training but never flipped."""

    def __init__(self, manifest: Manifest, config: DataConfig, samples: Samples) -> None:
        self._samples = samples
        self._reader = ShardReader(manifest, config)
        self._threads = DaemonThreadPool(max(1, config.workers), "reference")
        self._shape = *config.size, config.channels

    def __len__(self) -> int:
        return len(self._samples)

    def chunk(self, rows: range) -> ImageChunk:
        locations = self._reader.locations(np.asarray(self._samples[rows.start : rows.stop]))
        images = np.zeros((len(rows), *self._shape), np.uint8)

        def decode(location: SampleLocation, pixels: np.ndarray) -> bool:
            try:
                decode_into(self._reader.read_location(location), pixels)
            except BadSampleError:
                return False
            return True

        waiting = [
            self._threads.submit(lambda row=row, pixels=pixels: decode(row, pixels))
            for row, pixels in zip(locations, images, strict=True)
        ]
        usable = torch.tensor([each.result() for each in waiting], dtype=torch.bool)
        return ImageChunk(torch.from_numpy(images).permute(0, 3, 1, 2), usable)

    def close(self) -> None:
        self._threads.close(_CLOSE_SECONDS)
        self._reader.close()


def chosen_samples(manifest: Manifest, limit: int = 0) -> Samples:
    """All samples, or `limit` of them chosen at random, by index in ascending order."""
    total = len(manifest.samples)
    if limit == 0 or limit >= total:
        return range(total)
    return np.sort(_order(manifest).samples(np.arange(limit)))


def are_gray(manifest: Manifest, config: DataConfig) -> bool:
    """Whether the images of a data set are stored without colors, by the headers of a few."""
    reader = ShardReader(manifest, config)
    try:
        places = reader.locations(np.asarray(chosen_samples(manifest, _LOOKED_AT)))
        return all(_is_gray(partial(reader.read_location, place)) for place in places)
    finally:
        reader.close()


def are_gray_files(source: Source) -> bool:
    """The same of image files."""
    step = -(-len(source.images) // _LOOKED_AT)
    read = image_reader(source.kind, source.path)
    return all(_is_gray(partial(read, file)) for file in source.images[::step])


def _is_gray(read: Callable[[], bytes]) -> bool:
    try:
        return is_gray(read())
    except BadSampleError:
        return True  # others decide


def labels_for(
    manifest: Manifest | None, count: int, num_classes: int
) -> Int64[Tensor, " count"] | None:
    """Classes with the frequencies that they have in the data set, in turn where it is not known;
    None without classes."""
    if manifest is None or not num_classes:
        return sample_labels(0, count, num_classes)
    labels = manifest.samples["label"][_order(manifest).samples(np.arange(count))]
    return torch.from_numpy(labels.astype(np.int64))


def describe_labels(manifest: Manifest | None, is_conditional: bool) -> str:
    """How `labels_for` chooses; "" without classes."""
    if not is_conditional:
        return ""
    return "in turn" if manifest is None else f"as in data {manifest.fingerprint[:16]}"


def _order(manifest: Manifest) -> Order:
    """The same for runs with other seeds and settings, so that they have the same reference."""
    return Order(
        np.diff(manifest.first_sample),
        seed=0,
        fingerprint=manifest.fingerprint,
        lanes=1,
        block_samples=256,
        window_blocks=8,
    )


def _name_digest(file: SourceImage) -> bytes:
    name = file.name.encode("utf-8", "surrogateescape")  # it need not be UTF-8
    return hashlib.blake2b(name, digest_size=16).digest()


class FileImages:
    """The image files of a folder, zip or tar, in the order of their names, all of one size."""

    def __init__(self, source: Source, shape: tuple[int, int, int], limit: int = 0) -> None:
        """shape: (channels, height, width) that they must have
        limit: take only so many, a random choice by name; 0: all
        """
        self._source, self._shape = source, shape
        chosen = sorted(source.images, key=_name_digest)[:limit] if limit else source.images
        self._files = sorted(chosen, key=lambda file: file.name)
        self._read = image_reader(source.kind, source.path)

    def __len__(self) -> int:
        return len(self._files)

    def chunk(self, rows: range) -> ImageChunk:
        """Raises UserError for an image that cannot be read or has another size."""
        channels, height, width = self._shape
        images = np.empty((len(rows), height, width, channels), np.uint8)
        for pixels, file in zip(images, self._files[rows.start : rows.stop], strict=True):
            where = f"{file.name} in {self._source.path}"
            try:
                found = decode(self._read(file), None, channels)
            except (OSError, DecodeError) as error:
                raise UserError(f"{where} cannot be read: {error}") from error
            if found.shape != pixels.shape:
                raise UserError(
                    f"{where} has {found.shape[0]} x {found.shape[1]} pixels, not {height} x "
                    f"{width}: images are judged in the one size in which they were made"
                )
            pixels[...] = found
        usable = torch.ones(len(rows), dtype=torch.bool)
        return ImageChunk(torch.from_numpy(images).permute(0, 3, 1, 2), usable)
