"""The batches of one rank: positions -> samples -> bytes -> pixels, decoded ahead by threads.

Threads, since the decoders release Python's lock. All of them fill chunks of the same batch, so
that the first one is ready soon. In training they run in another process (`data.loader_process`).
"""

import logging
import math
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from functools import partial

import numpy as np
import torch

from ganscale.data.bad_samples import (
    SAMPLES_TRIED,
    BadSample,
    BadSampleError,
    BadSampleLog,
    too_many_in_a_row,
)  # fmt: skip
from ganscale.data.batch import Batch, BatchAllocator, allocate_batch
from ganscale.data.images.decoding import decode_into
from ganscale.data.manifest import Manifest
from ganscale.data.order import Order, WindowTracker, batch_positions, shards_ahead
from ganscale.data.shard_reader import SampleLocation, ShardReader
from ganscale.data.thread_pool import DaemonThreadPool
from ganscale.schema import DataConfig

logger = logging.getLogger(__name__)

_CHUNK_PIXELS = 1 << 14  # at least: less decoding does not pay for handing a chunk to a thread
_CLOSE_SECONDS = 5.0


def chunks_and_depth(config: DataConfig, images: int) -> tuple[int, int]:
    """(chunks that a batch of `images` is cut into, batches that are decoded at the same time)."""
    chunks = max(1, min(config.workers, images * math.prod(config.size) // _CHUNK_PIXELS))
    # Every thread has a chunk to fill while the consumer holds a batch and another one is ready.
    return chunks, 2 + config.workers // chunks if config.workers else 1


class Loader(Iterator[Batch]):
    """The endless stream of this rank's batches from `position` of the data order on."""

    def __init__(
        self,
        manifest: Manifest,
        config: DataConfig,
        *,
        seed: int,
        global_batch_size: int,
        rank: int,
        world_size: int,
        position: int,
        allocate: BatchAllocator = allocate_batch,
    ) -> None:
        self.order = Order(
            np.diff(manifest.first_sample),
            seed=seed,
            fingerprint=manifest.fingerprint,
            lanes=config.lanes,
            block_samples=config.block_samples,
            window_blocks=config.window_blocks,
        )
        self._manifest = manifest
        self._reader = ShardReader(manifest, config)
        self._windows = WindowTracker(self.order)
        share = global_batch_size // world_size
        self._shape = (share, *config.size, config.channels)
        self._allocate = allocate
        self._batch_arguments = (global_batch_size, self.order.lanes, rank, world_size)
        self._next_position = position
        self._log = BadSampleLog()
        self._threads = DaemonThreadPool(config.workers, "decode")
        self._chunks, self._depth = chunks_and_depth(config, share)
        # Batches that are being filled, with the bad samples of each chunk to come.
        self._started: deque[tuple[Batch, list[Future[list[BadSample]]]]] = deque()

    def __next__(self) -> Batch:
        """Raises UserError for a lane without a usable sample, and as the shard reader does; again
        at every further call, since no batch is ever skipped."""
        while len(self._started) < self._depth:
            self._started.append(self._start(self._next_position))
            self._next_position += self._batch_arguments[0]
        batch, chunks = self._started[0]
        bad_samples = [bad_sample for chunk in chunks for bad_sample in chunk.result()]
        self._started.popleft()
        self._log.warn(bad_samples)
        return Batch(batch.images, batch.labels, batch.slots, tuple(bad_samples))

    def close(self) -> None:
        """Ends the threads within seconds; one that hangs in a read is left behind."""
        self._started.clear()
        if not self._threads.close(_CLOSE_SECONDS):
            logger.warning("a thread still hangs in a read; it ends with this process")
        self._reader.close()

    def _start(self, position: int) -> tuple[Batch, list[Future[list[BadSample]]]]:
        """Hands the chunks of a batch to the threads."""
        positions, slots = batch_positions(position, *self._batch_arguments)
        images = self._allocate(self._shape)
        labels = torch.empty(len(positions), dtype=torch.int64)
        columns = (positions, images.numpy(), labels.numpy())
        chunks = zip(*(np.array_split(rows, self._chunks) for rows in columns), strict=True)
        tasks = [partial(self._fill, *chunk) for chunk in chunks]
        if self._manifest.is_remote and len(entered := self._windows.entered(positions)):
            tasks.insert(0, partial(self._prefetch, entered))
        batch = Batch(images, labels, torch.from_numpy(slots))
        return batch, [self._threads.submit(task) for task in tasks]

    def _prefetch(self, positions: np.ndarray) -> list[BadSample]:
        """Has the shards fetched that the lanes of `positions` read next."""
        self._reader.prefetch(shards_ahead(self._manifest, self.order, positions).tolist())
        return []

    def _fill(
        self, positions: np.ndarray, pixels: np.ndarray, labels: np.ndarray
    ) -> list[BadSample]:
        """Decodes the samples at `positions` into the rows of `pixels`; returns the bad ones."""
        samples = self.order.samples(positions)
        bad_samples: list[BadSample] = []
        for row, location in enumerate(self._reader.locations(samples)):
            if (bad_sample := self._decode(location, pixels[row])) is not None:
                bad_samples.append(bad_sample)
                samples[row] = self._replace(bad_sample, int(positions[row]), pixels[row])
        labels[...] = self._manifest.samples["label"][samples]
        return bad_samples

    def _replace(self, bad_sample: BadSample, position: int, pixels: np.ndarray) -> int:
        """Fills `pixels` from the next usable sample of the lane; returns which one that is."""
        for _ in range(SAMPLES_TRIED - 1):
            position += self.order.lanes
            (location,) = self._reader.locations(self.order.samples(np.array([position])))
            if (last := self._decode(location, pixels)) is None:
                return location.sample
            bad_sample = last
        raise too_many_in_a_row(bad_sample)

    def _decode(self, location: SampleLocation, pixels: np.ndarray) -> BadSample | None:
        """Fills `pixels` from a sample, or returns what is wrong with it."""
        try:
            decode_into(self._reader.read_location(location), pixels)
        except BadSampleError as error:
            shard, key = self._reader.shard_and_key(location.sample)
            return BadSample(shard, error.reason, key, error.detail)
        return None
