"""Finished batches for one rank: positions -> samples -> bytes -> pixels, decoded ahead by threads.

Threads, since the decoders release Python's lock: all of them fill one batch, cut into parts, so
that the first one is there soon. In training, they are in a process of their own (`data.loader_process`).
"""

import logging
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ganscale.data.batch import Batch
from ganscale.data.bad_samples import BadSample, BadSampleLog, name_of, reason_of
from ganscale.data.images.decoding import DecodeError, decode_into
from ganscale.data.manifest import Manifest
from ganscale.data.order import Order, batch_positions
from ganscale.data.shard_lookahead import WindowTracker, shards_ahead
from ganscale.data.shard_reader import BadSampleError, SampleLocation, open_shard_reader
from ganscale.data.thread_pool import DaemonThreadPool
from ganscale.errors import UserError
from ganscale.schema import DataConfig

logger = logging.getLogger(__name__)

_SAMPLES_TRIED = 64  # of a lane, one after the other, before its data is given up
_PART_PIXELS = 1 << 14  # at least, of a part: what it costs besides is then little
_CLOSE_SECONDS = 5.0


BatchAllocator = Callable[[tuple[int, ...]], Tensor]
"""Of a shape, where a batch of uint8 images finds its place."""


def allocate_batch(shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=torch.uint8)


def allocate_pinned_batch(shape: tuple[int, ...]) -> Tensor:
    """From which a GPU copies while the processor goes on."""
    return torch.empty(shape, dtype=torch.uint8, pin_memory=True)


def parts_and_depth(config: DataConfig, images: int) -> tuple[int, int]:
    """(parts that a batch of `images` is cut into, batches that are begun at one time)."""
    parts = max(1, min(config.workers, images * config.resolution**2 // _PART_PIXELS))
    # Every thread has a part to do while the consumer holds a batch and one is waiting for it.
    return parts, 2 + config.workers // parts if config.workers else 1


@dataclass(frozen=True)
class _Pending:
    """A batch whose rows are being filled; each part returns its bad samples."""

    batch: Batch
    parts: "list[Future[list[BadSample]]]" = field(default_factory=list)


class Loader:
    """The endless stream of this rank's batches from `images_seen` on.

    Attributes, over the batches that were handed out: `samples_read`, and `broken`, a Counter by
    (shard, reason) of those among them that other samples took the place of.
    """

    def __init__(
        self,
        manifest: Manifest,
        config: DataConfig,
        *,
        seed: int,
        global_batch_size: int,
        rank: int,
        world_size: int,
        images_seen: int,
        room: BatchAllocator = allocate_batch,
    ) -> None:
        self.order = Order(
            np.diff(manifest.first_sample),
            seed=seed,
            fingerprint=manifest.fingerprint,
            lanes=config.lanes,
            block_samples=config.block_samples,
            window_blocks=config.window_blocks,
        )
        self.bad_samples: Counter[tuple[str, str]] = Counter()
        self.samples_read = 0
        self._manifest = manifest
        self._store = open_shard_reader(manifest, config)
        self._watch = WindowTracker(self.order)
        share = global_batch_size // world_size
        self._shape = (share, config.resolution, config.resolution, config.channels)
        self._room = room
        self._batch = (global_batch_size, self.order.lanes, rank, world_size)
        self._next = images_seen
        self._log = BadSampleLog()
        self._crew = DaemonThreadPool(config.workers, "decode")
        self._parts, self._depth = parts_and_depth(config, global_batch_size // world_size)
        self._ahead: deque[_Pending] = deque()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """Raises UserError for a lane without a readable sample, and as the shards' store does;
        again at every further call, since no batch is ever skipped."""
        while len(self._ahead) < self._depth:
            self._ahead.append(self._start(self._next))
            self._next += self._batch[0]
        pending = self._ahead[0]
        bad_samples = [bad_samples for part in pending.parts for bad_samples in part.result()]
        self._ahead.popleft()
        self.samples_read += len(pending.batch.slots)
        self.bad_samples.update((each.shard, each.reason) for each in bad_samples)
        self._log.tell(bad_samples)
        batch = pending.batch
        return Batch(batch.images, batch.labels, batch.slots, tuple(bad_samples))

    def close(self) -> None:
        """Ends the threads; batches that were decoded ahead are dropped. Within seconds: a thread
        that hangs in a read is left behind."""
        self._ahead.clear()
        if not self._crew.close(_CLOSE_SECONDS):
            logger.warning("a thread still hangs in a read; it ends with this process")
        self._store.close()

    def _start(self, images_seen: int) -> _Pending:
        """Hands the parts of a batch to the threads."""
        positions, slots = batch_positions(images_seen, *self._batch)
        images = self._room(self._shape)
        labels = torch.empty(len(positions), dtype=torch.int64)
        pending = _Pending(Batch(images, labels, torch.from_numpy(slots)))
        self._fetch_ahead(positions, pending)
        rows = zip(
            *(
                np.array_split(each, self._parts)
                for each in (positions, images.numpy(), labels.numpy())
            ),
            strict=True,
        )
        for part in rows:
            pending.parts.append(self._crew.submit(partial(self._fill, *part)))
        return pending

    def _fetch_ahead(self, positions: np.ndarray, pending: _Pending) -> None:
        """Tells the store of remote shards what the lanes read next, once a window."""
        if not self._store.is_remote:
            return
        entered = self._watch.entered(positions)

        def tell() -> list[BadSample]:
            self._store.prefetch(shards_ahead(self._manifest, self.order, entered).tolist())
            return []

        if len(entered):
            pending.parts.append(self._crew.submit(tell))

    def _fill(self, positions: np.ndarray, pixels: np.ndarray, labels: np.ndarray) -> list[BadSample]:
        """Decodes the samples at `positions` into the rows of `pixels`; the bad ones."""
        samples = self.order.samples(positions)
        bad_samples: list[BadSample] = []
        for row, place in enumerate(self._store.places(samples)):
            found = self._decode(place, pixels[row])
            if found is not None:
                bad_samples.append(found)
                samples[row] = self._substitute(int(positions[row]), pixels[row])
        labels[...] = self._manifest.samples["label"][samples]
        return bad_samples

    def _substitute(self, position: int, pixels: np.ndarray) -> int:
        """Fills `pixels` from the next readable sample of the lane; returns which that is.

        Unreadable ones on the way are counted where their own position comes up.
        """
        bad_samples = None
        for _ in range(_SAMPLES_TRIED - 1):
            position += self.order.lanes
            (place,) = self._store.places(self.order.samples(np.array([position])))
            bad_samples = self._decode(place, pixels)
            if bad_samples is None:
                return place.sample
        assert bad_samples is not None
        raise UserError(
            f"{_SAMPLES_TRIED} samples in a row could not be used; the last: {name_of(bad_samples)} "
            f"{bad_samples.detail}"
        )

    def _decode(self, place: SampleLocation, pixels: np.ndarray) -> BadSample | None:
        """Fills `pixels` from a sample, or says what is wrong with it."""
        try:
            decode_into(self._store.read_location(place), pixels)
        except (BadSampleError, DecodeError) as error:
            shard, key = self._store.locate(place.sample)
            detail = error.reason if isinstance(error, BadSampleError) else str(error)
            return BadSample(shard, reason_of(error), key, detail)
        return None
