"""Batches from tars without a manifest, as WebDataset streams them: at once, but exact in nothing.

Each rank and worker draws shards at random with replacement (`ResampledShards`), reads them from
their beginning and shuffles samples in a buffer. So nothing has to be split between ranks and no
rank runs dry; but what is seen depends on the cluster, an epoch repeats some samples and leaves
others out, and a resumed run goes on with other images than an uninterrupted one.

webdataset draws, groups and shuffles; its `.decode()`, which runs code from some members, is never
called. `tar_reader` opens and parses, from wherever `remote` reads.
"""

import contextlib
import logging
import random
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any

import numpy as np
import torch
from webdataset.filters import shuffle
from webdataset.pipeline import DataPipeline
from webdataset.shardlists import ResampledShards

from ganscale.data.remote import objects
from ganscale.data.batch import Batch
from ganscale.data.bad_samples import BadSample, BadSampleLog, name_of, reason_of
from ganscale.data.images.decoding import DecodeError, decode_into
from ganscale.data.labels import IMAGE_EXTENSIONS, LABEL_EXTENSIONS, parse_label
from ganscale.data.loader import BatchAllocator, allocate_batch
from ganscale.data.shard_reader import LARGEST_IMAGE_BYTES
from ganscale.data.streaming.tar_stream import StreamedTars, shard_name
from ganscale.data.thread_pool import DaemonThreadPool
from ganscale.errors import UnavailableError, UserError
from ganscale.randomness import derived_seed
from ganscale.schema import DataConfig

logger = logging.getLogger(__name__)

_SAMPLES_TRIED = 64  # in a row, before the data is given up
_SHARDS_TRIED = 32  # in a row that have no sample at all
_STALL_SECONDS = (
    120.0  # of silence, after data.retry_seconds: remote reads end sooner by themselves
)
_CLOSE_SECONDS = 5.0


class StreamLoader:
    """The endless stream of this rank's batches, with slots from `images_seen` on.

    As `Loader`, with the same attributes `broken` and `samples_read`, but the images are another
    random choice for each `images_seen`, rank, world size and number of workers.
    """

    def __init__(
        self,
        urls: list[str],
        config: DataConfig,
        *,
        seed: int,
        global_batch_size: int,
        rank: int,
        world_size: int,
        images_seen: int,
        room: BatchAllocator = allocate_batch,
    ) -> None:
        if rank == 0:
            logger.warning(
                "data.path=%s is streamed in random order: the images seen depend on the number of "
                "ranks and workers, and a resumed run sees others than an uninterrupted one "
                "(`ganscale shards index` makes the order exact)",
                config.path,
            )
        self.bad_samples: Counter[tuple[str, str]] = Counter()
        self.samples_read = 0
        share = global_batch_size // world_size
        self._slots = images_seen + rank * share + torch.arange(share)
        self._global_batch_size = global_batch_size
        self._log = BadSampleLog()
        self._stall_seconds = config.retry_seconds + _STALL_SECONDS
        count = max(1, config.workers)
        place = f"stream/{images_seen}/{rank} of {world_size}"
        self._streams = [
            _Stream(
                urls,
                config,
                derived_seed(seed, f"{place}/{i} of {count}"),
                share,
                room,
                count,
            )
            for i in range(count)
        ]
        # A thread each, also without workers: who waits for a dead server has to notice.
        self._crews = [DaemonThreadPool(1, f"stream-{i}") for i in range(count)]
        self._ahead: deque[tuple[_Stream, Future[Batch]]] = deque()
        self._turn = 0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """Raises UserError when the shards hold nothing that can be used, and UnavailableError
        when they stop to yield anything; again at every further call."""
        while len(self._ahead) < 2 * len(self._streams):
            stream, crew = self._streams[self._turn], self._crews[self._turn]
            self._ahead.append((stream, crew.submit(stream.batch)))
            self._turn = (self._turn + 1) % len(self._streams)
        batch = self._wait(*self._ahead[0])
        self._ahead.popleft()
        slots, self._slots = self._slots, self._slots + self._global_batch_size
        self.samples_read += len(slots) + len(batch.bad_samples)
        self.bad_samples.update((each.shard, each.reason) for each in batch.bad_samples)
        self._log.tell(batch.bad_samples)
        return Batch(batch.images, batch.labels, slots, batch.bad_samples)

    def close(self) -> None:
        """Ends threads and commands; within seconds."""
        self._ahead.clear()
        for stream in self._streams:
            stream.tars.stop()
        deadline = time.monotonic() + _CLOSE_SECONDS
        for stream, crew in zip(self._streams, self._crews, strict=True):
            if crew.close(max(0.0, deadline - time.monotonic())):
                stream.close()
            else:
                where = objects.shown(stream.tars.url)
                logger.warning("a thread still hangs in %s; it ends with this process", where)

    def _wait(self, stream: "_Stream", future: "Future[Batch]") -> Batch:
        while True:
            try:
                return future.result(timeout=1.0)
            except FutureTimeoutError:
                silence = time.monotonic() - stream.tars.heard_at
                if not future.done() and silence > self._stall_seconds:
                    raise UnavailableError(
                        f"nothing came from {objects.shown(stream.tars.url)} for {silence:.0f} s"
                    ) from None


class _Stream:
    """One worker's endless samples; `tars` reads them."""

    def __init__(
        self,
        urls: list[str],
        config: DataConfig,
        seed: int,
        batch_size: int,
        room: BatchAllocator,
        streams: int,
    ) -> None:
        self.tars = StreamedTars(config.retry_seconds)
        self._config = config
        self._batch_size = batch_size
        self._room = room
        self._has_worked = False
        buffer = max(2, config.block_samples * config.window_blocks // streams)
        pipeline = DataPipeline(
            # Its own seed would have time and process in it.
            ResampledShards(urls, seed=seed, worker_seed=lambda: 0, deterministic=True),
            self._samples_of_shards,
            shuffle(buffer, initial=100, rng=random.Random(seed)),
        )
        self._samples: Iterator[dict[str, Any]] = iter(pipeline)

    def batch(self) -> Batch:
        """The next images and labels; slots are not known here."""
        config, count = self._config, self._batch_size
        self.tars.heard_at = time.monotonic()  # the consumer may have been away
        shape = (count, config.resolution, config.resolution, config.channels)
        images = self._room(shape)
        pixels = images.numpy()
        labels = torch.tensor([self._fill(pixels[row]) for row in range(count)])
        bad_samples, self.tars.bad_samples = tuple(self.tars.bad_samples), []
        return Batch(images, labels, torch.zeros(count, dtype=torch.int64), bad_samples)

    def close(self) -> None:
        """Closes the tar that was being read; after the thread has ended."""
        with contextlib.suppress(Exception):
            self._samples.close()  # type: ignore[attr-defined]

    def _fill(self, pixels: np.ndarray) -> int:
        """Fills `pixels` from the next usable sample; its label."""
        for _ in range(_SAMPLES_TRIED):
            sample = next(self._samples)
            shard, key = shard_name(sample["__url__"]), sample["__key__"]
            try:
                _check_sizes(sample)
                label = self._label(sample)
                decode_into(_image(sample), pixels)
            except DecodeError as error:
                self.tars.bad_samples.append(BadSample(shard, reason_of(error), key, str(error)))
                continue
            self._has_worked = True
            return label
        last = self.tars.bad_samples[-1]
        raise UserError(
            f"{_SAMPLES_TRIED} samples in a row could not be used; the last: {name_of(last)} "
            f"{last.detail}"
        )

    def _label(self, sample: dict[str, Any]) -> int:
        """-1 without one. Raises DecodeError when classes are expected and this is none."""
        found = (parse_label(sample.get(extension), extension) for extension in LABEL_EXTENSIONS)
        label = next((label for label in found if label is not None), -1)
        classes = self._config.class_count
        if classes and not 0 <= label < classes:
            has = "has no label" if label < 0 else f"has label {label}"
            raise DecodeError(f"{has}, not one of data.class_count={classes} classes")
        return label

    def _samples_of_shards(self, shards: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """WebDataset's samples, shard by shard: what is left of a bad one never meets the next
        one's members."""
        barren = 0
        for shard in shards:
            barren += 1
            for sample in self.tars.samples(shard["url"]):
                barren = 0
                yield sample
            if barren >= _SHARDS_TRIED:
                kind = UnavailableError if self._has_worked else UserError
                raise kind(
                    f"{barren} shards in a row gave no sample; the last: "
                    f"{objects.shown(self.tars.url)} {self.tars.damage or 'is empty'}"
                )


def _check_sizes(sample: dict[str, Any]) -> None:
    """Raises DecodeError when a member was too large to be read."""
    for size in sample.values():
        if isinstance(size, int):
            raise DecodeError(f"has {size:,} bytes, more than {LARGEST_IMAGE_BYTES >> 20} MiB")


def _image(sample: dict[str, Any]) -> bytes:
    for extension in IMAGE_EXTENSIONS:
        if extension in sample:
            return sample[extension]
    raise DecodeError("has no image")
