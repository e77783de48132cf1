"""What the process that trains and the process of its loader exchange.

Over the connection, the trainer sends a LoaderJob, then a request for each batch: the index of a
place in the shared memory that is free again, or None. The loader answers each request with a
BatchReady or an exception, and sends LogMessages in between.
"""

import mmap
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ganscale.data.bad_samples import BadSample
from ganscale.data.dataset import DataSet


@dataclass(frozen=True)
class LoaderJob:
    """Load batches of `data`, with these `arguments` of its loader, into shared memory for `count`
    batches of images of `shape`."""

    data: DataSet
    arguments: dict[str, Any]
    shape: tuple[int, ...]
    count: int


@dataclass(frozen=True)
class LogMessage:
    """A line for the log."""

    logger: str
    level: int
    text: str


@dataclass(frozen=True)
class BatchReady:
    """A batch, whose images are at `index` of the shared memory."""

    index: int
    labels: np.ndarray
    slots: np.ndarray
    bad_samples: tuple[BadSample, ...]


class SharedBatches:
    """Memory of both processes for uint8 images: `images`, (count, *shape), a batch at each index.

    The loader's process allocates and frees; the trainer's only reads.
    """

    def __init__(self, file: int, shape: tuple[int, ...], count: int) -> None:
        size = count * int(np.prod(shape))
        os.ftruncate(file, size)
        values = np.frombuffer(mmap.mmap(file, size), dtype=np.uint8)
        self.images = torch.from_numpy(values).view(count, *shape)
        self._free = list(range(count))

    def allocate(self, shape: tuple[int, ...]) -> Tensor:
        """Free memory for a batch: what was freed last, whose pages are there already."""
        images = self.images[self._free.pop()]
        assert images.shape == shape
        return images

    def free(self, index: int) -> None:
        self._free.append(index)

    def index(self, images: Tensor) -> int:
        """Which batch of the memory `images` is."""
        return (images.data_ptr() - self.images.data_ptr()) // images.nbytes
