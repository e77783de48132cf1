"""Finished batches for one rank: positions -> samples -> bytes -> pixels, decoded ahead by threads.

Threads rather than processes: the decoders release Python's lock, a batch is never copied between
processes, and there is nothing to clean up when a run is killed.
"""

import logging
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from ganscale.data.decoding import DecodeError, decode
from ganscale.data.manifest import Manifest
from ganscale.data.order import Order, batch_positions
from ganscale.data.store import BrokenSample, ShardStore
from ganscale.errors import UserError
from ganscale.schema import DataConfig

logger = logging.getLogger(__name__)

_SUBSTITUTES_TRIED = 64


@dataclass(frozen=True)
class Batch:
    """This rank's share of a global batch, on the host."""

    images: UInt8[Tensor, "batch height width channels"]
    labels: Int64[Tensor, " batch"]  # -1 where the data set has none
    slots: Int64[Tensor, " batch"]  # what random draws for these images go with


class Loader:
    """The endless stream of this rank's batches from `images_seen` on.

    Attribute `broken`: a Counter of unreadable samples met so far by this process, by
    (shard, reason).
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
        pin_memory: bool = False,
    ) -> None:
        self.order = Order(
            np.diff(manifest.first_sample),
            seed=seed,
            fingerprint=manifest.fingerprint,
            lanes=config.lanes,
            block_samples=config.block_samples,
            window_blocks=config.window_blocks,
        )
        self.broken: Counter[tuple[str, str]] = Counter()
        self._manifest = manifest
        self._store = ShardStore(manifest)
        self._config = config
        self._batch = (global_batch_size, self.order.lanes, rank, world_size)
        self._next = images_seen
        self._pin_memory = pin_memory
        self._samples_read = 0
        self._count_lock = Lock()
        self._pool = ThreadPoolExecutor(config.workers, "decode") if config.workers else None
        self._ahead: deque[Future[Batch]] = deque()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """Raises UserError when more samples are broken than the config bears."""
        if self._pool is None:
            return self._load(self._advance())
        while len(self._ahead) < self._config.workers + 2:
            self._ahead.append(self._pool.submit(self._load, self._advance()))
        return self._ahead.popleft().result()

    def close(self) -> None:
        """Ends the threads; batches that were decoded ahead are dropped."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._store.close()

    def _advance(self) -> int:
        start, self._next = self._next, self._next + self._batch[0]
        return start

    def _load(self, images_seen: int) -> Batch:
        positions, slots = batch_positions(images_seen, *self._batch)
        size, channels = self._config.resolution, self._config.channels
        images = torch.empty(
            (len(positions), size, size, channels), dtype=torch.uint8, pin_memory=self._pin_memory
        )
        pixels = images.numpy()
        samples = self.order.samples(positions)
        for row, position in enumerate(positions):
            samples[row] = self._read(int(position), int(samples[row]), pixels[row])
        labels = self._manifest.samples["label"][samples].astype(np.int64)
        return Batch(images, torch.from_numpy(labels), torch.from_numpy(slots))

    def _read(self, position: int, sample: int, pixels: np.ndarray) -> int:
        """Fills `pixels` from `sample`, or from the next readable one of its lane; returns which."""
        mistake = ""
        for _ in range(_SUBSTITUTES_TRIED):
            try:
                data = self._store.read(sample)
                pixels[...] = decode(data, self._config.resolution, self._config.channels)
            except (BrokenSample, DecodeError) as error:
                reason = error.reason if isinstance(error, BrokenSample) else str(error)
                self._note_broken(sample, reason)
                mistake = f"{self._name(sample)}: {reason}"
            except OSError as error:
                raise UserError(f"{self._name(sample)} cannot be read: {error}") from error
            else:
                self._samples_read += 1
                return sample
            position += self.order.lanes
            sample = int(self.order.samples(np.array([position]))[0])
        raise UserError(
            f"{_SUBSTITUTES_TRIED} samples in a row could not be decoded; the last: {mistake}"
        )

    def _note_broken(self, sample: int, reason: str) -> None:
        """Counts and names an unreadable sample; raises UserError when there are too many."""
        name = self._name(sample)
        with self._count_lock:
            self.broken[self._store.locate(sample)[0], reason] += 1
            count = sum(self.broken.values())
            read = self._samples_read + count
        logger.warning("%s %s; another sample of its lane takes its place", name, reason)
        if count > self._config.broken_limit * max(read, 1000):
            raise UserError(
                f"{count} of {read} samples could not be decoded, more than data.broken_limit="
                f"{self._config.broken_limit:g} allows; the last: {name}: {reason}"
            )

    def _name(self, sample: int) -> str:
        shard, key = self._store.locate(sample)
        return f"sample {key} of shard {shard}"
