"""Batches from tars without a manifest, as WebDataset streams them: at once, but not exact.

Each rank and worker draws shards at random with replacement (`ResampledShards`), reads them from
their beginning and shuffles samples in a buffer. So no rank runs dry; but the images seen depend on
the cluster, an epoch repeats some samples and leaves others out, and a resumed run sees other
images than an uninterrupted one.

webdataset draws, groups and shuffles; its `.decode()`, which runs code from some members, is never
called.
"""

import contextlib
import itertools
import logging
import random
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from functools import cache
from typing import Any

import numpy as np
import torch
from webdataset.filters import shuffle
from webdataset.pipeline import DataPipeline
from webdataset.shardlists import ResampledShards

from ganscale.data.bad_samples import (
    SAMPLES_TRIED,
    BadSample,
    BadSampleError,
    BadSampleLog,
    too_many_in_a_row,
)  # fmt: skip
from ganscale.data.batch import Batch, BatchAllocator, allocate_batch
from ganscale.data.images.decoding import decode_into
from ganscale.data.labels import CLASS_LIMIT, IMAGE_EXTENSIONS, LABEL_EXTENSIONS, parse_label
from ganscale.data.remote import objects
from ganscale.data.shard_reader import too_large
from ganscale.data.streaming.tar_stream import StreamedTars, shard_name
from ganscale.data.thread_pool import DaemonThreadPool
from ganscale.errors import UnavailableError, UserError
from ganscale.randomness import derived_seed
from ganscale.schema import DataConfig
from ganscale.secrets import without_secrets

logger = logging.getLogger(__name__)

_SHARDS_TRIED = 32  # in a row without a sample
_STALL_SECONDS = 120.0  # of silence, after data.retry_seconds: remote reads end before that
_CLOSE_SECONDS = 5.0


class StreamLoader(Iterator[Batch]):
    """The endless stream of this rank's batches, as from `Loader`, but with another random choice
    of images for each `position`, rank, world size and number of workers."""

    def __init__(
        self,
        urls: Sequence[str],
        config: DataConfig,
        *,
        seed: int,
        global_batch_size: int,
        rank: int,
        world_size: int,
        position: int,
        allocate: BatchAllocator = allocate_batch,
    ) -> None:
        if rank == 0:
            logger.warning(
                f"data.path={without_secrets(config.path)} is streamed in random order: the images "
                "seen depend on the number of ranks and workers, and a resumed run sees others "
                "than an uninterrupted one (`ganscale shards index` makes the order exact)"
            )
        share = global_batch_size // world_size
        self._slots = position + rank * share + torch.arange(share)
        self._global_batch_size = global_batch_size
        self._log = BadSampleLog()
        self._stall_seconds = config.retry_seconds + _STALL_SECONDS
        count = max(1, config.workers)
        purpose = f"stream/{position}/{rank} of {world_size}"
        seeds = [derived_seed(seed, f"{purpose}/{i} of {count}") for i in range(count)]
        self._streams = [_Stream(urls, config, seed, share, allocate, count) for seed in seeds]
        # One thread each, also without workers: the caller has to notice a dead server.
        self._threads = [DaemonThreadPool(1, f"stream-{i}") for i in range(count)]
        self._turns = itertools.cycle(zip(self._streams, self._threads, strict=True))
        self._started: deque[tuple[_Stream, Future[Batch]]] = deque()

    def __next__(self) -> Batch:
        """Raises UserError when no sample can be used, and UnavailableError when no data arrives;
        again at every further call."""
        while len(self._started) < 2 * len(self._streams):
            stream, thread = next(self._turns)
            self._started.append((stream, thread.submit(stream.batch)))
        batch = self._wait(*self._started[0])
        self._started.popleft()
        slots, self._slots = self._slots, self._slots + self._global_batch_size
        self._log.warn(batch.bad_samples)
        return Batch(batch.images, batch.labels, slots, batch.bad_samples)

    def close(self) -> None:
        """Ends threads and commands within seconds."""
        self._started.clear()
        for stream in self._streams:
            stream.tars.stop()
        deadline = time.monotonic() + _CLOSE_SECONDS
        for stream, thread in zip(self._streams, self._threads, strict=True):
            if thread.close(max(0.0, deadline - time.monotonic())):
                stream.close()
            else:
                url = objects.shown(stream.tars.url)
                logger.warning("a thread still hangs in %s; it ends with this process", url)

    def _wait(self, stream: "_Stream", future: "Future[Batch]") -> Batch:
        while True:
            try:
                return future.result(timeout=1.0)
            except FutureTimeoutError:
                silence = stream.silent_seconds()
                if not future.done() and silence > self._stall_seconds:
                    raise UnavailableError(
                        f"nothing came from {objects.shown(stream.tars.url)} for {silence:.0f} s"
                    ) from None


class _Stream:
    """One worker's endless samples; `tars` reads them."""

    def __init__(
        self,
        urls: Sequence[str],
        config: DataConfig,
        seed: int,
        batch_size: int,
        allocate: BatchAllocator,
        streams: int,
    ) -> None:
        self._bad_samples: list[BadSample] = []  # of the batch that is being filled
        self.tars = StreamedTars(config.retry_seconds, self._bad_samples.append)
        self._config = config
        self._shape = (batch_size, *config.size, config.channels)
        self._allocate = allocate
        self._started_at = time.monotonic()
        self._has_yielded = False
        buffer = max(2, config.block_samples * config.window_blocks // streams)
        pipeline = DataPipeline(
            # Its default worker seed depends on time and process.
            ResampledShards(list(urls), seed=seed, worker_seed=lambda: 0, deterministic=True),
            self._samples_of_shards,
            shuffle(buffer, initial=100, rng=random.Random(seed)),
        )
        self._samples: Iterator[dict[str, Any]] = iter(pipeline)

    def batch(self) -> Batch:
        """The next images and labels; slots are set by StreamLoader."""
        self._started_at = time.monotonic()
        self._bad_samples.clear()
        images = self._allocate(self._shape)
        labels = torch.tensor([self._fill(pixels) for pixels in images.numpy()])
        slots = torch.zeros(len(labels), dtype=torch.int64)
        return Batch(images, labels, slots, tuple(self._bad_samples))

    def silent_seconds(self) -> float:
        """For how long no byte has come for the batch that is being filled."""
        return time.monotonic() - max(self._started_at, self.tars.last_read_at)

    def close(self) -> None:
        """Closes the tar that was being read; after the thread has ended."""
        with contextlib.suppress(Exception):
            self._samples.close()  # type: ignore[attr-defined]

    def _fill(self, pixels: np.ndarray) -> int:
        """Fills `pixels` from the next usable sample; returns its label."""
        for _ in range(SAMPLES_TRIED):
            sample = next(self._samples)
            try:
                for member in sample.values():
                    if isinstance(member, int):  # its size: it was not read
                        raise too_large(member)
                label = self._label(sample)
                decode_into(self._image(sample), pixels)
            except BadSampleError as error:
                shard, key = shard_name(sample["__url__"]), sample["__key__"]
                self._bad_samples.append(BadSample(shard, error.reason, key, error.detail))
                continue
            self._has_yielded = True
            return label
        raise too_many_in_a_row(self._bad_samples[-1])

    def _label(self, sample: dict[str, Any]) -> int:
        """-1 without one. Raises BadSampleError when it is not one of the expected classes."""
        label, has = -1, "has no label"
        for extension in LABEL_EXTENSIONS:
            try:
                found = parse_label(sample.get(extension), extension)
            except ValueError as error:
                has = f"has a label that {error}"
                continue
            if isinstance(found, int):
                label, has = found, f"has label {found}"
                break
            if found is not None and extension != "txt":  # other texts are captions
                has = f"has label {found!r}"
        classes = self._config.class_count
        if classes and not 0 <= label < classes:
            expected = f"not one of data.class_count={classes} classes"
            raise BadSampleError(f"{has}, {expected}", "no class")
        if not -1 <= label < CLASS_LIMIT:
            raise BadSampleError(f"{has}, which is not the number of a class", "no class")
        return label

    def _samples_of_shards(self, shards: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Shard by shard: the rest of a damaged one is never joined with members of the next."""
        empty = 0
        for shard in shards:
            empty += 1
            for sample in self.tars.samples(shard["url"]):
                empty = 0
                yield sample
            if empty >= _SHARDS_TRIED:
                kind = UnavailableError if self._has_yielded else UserError
                raise kind(
                    f"{empty} shards in a row gave no sample; the last: "
                    f"{objects.shown(self.tars.url)} {self.tars.damage or self._without_images()}"
                )

    def _image(self, sample: dict[str, Any]) -> bytes:
        """The image of a sample, as a file. Raises BadSampleError without one."""
        found = [extension for extension in IMAGE_EXTENSIONS if extension in sample]
        if not found:
            raise BadSampleError(f"has no image{self._other_images()}", "no image")
        if len(pictures := [extension for extension in found if extension != "npy"]) > 1:
            _warn_of_several(*pictures)
        return sample[found[0]]

    def _without_images(self) -> str:
        other_images = self._other_images()
        return f"has no image{other_images}" if other_images else "is empty"

    def _other_images(self) -> str:
        """What to do where samples have their images under other names."""
        if not (found := sorted(self.tars.other_images)):
            return ""
        return (
            f", only .{' and .'.join(found)}: `ganscale shards index --image {found[0]}` takes one"
        )


@cache
def _warn_of_several(*extensions: str) -> None:
    logger.warning(
        "samples have several images, .%s: the first is used; `ganscale shards index --image EXT` "
        "chooses one",
        " and .".join(extensions),
    )
