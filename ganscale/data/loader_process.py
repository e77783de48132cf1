"""A rank's batches, some of which lie ready whenever the training wants one.

They come from a process of their own (`data.loader_worker` is its end). Threads decode without Python's
lock, but not all around it: of small images, the little that is left takes the lock thousands of
times a second, and each time a training step may have to wait for it.

The other process is started afresh, not forked: it has none of the files, locks, threads and GPU
contexts of the training. It ends by itself when the training does, however that ends.
"""

import contextlib
import logging
import mmap
import os
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ganscale.data.batch import Batch
from ganscale.data.bad_samples import BadSample
from ganscale.data.dataset import DataSet
from ganscale.data.loader import Loader, BatchAllocator
from ganscale.data.streaming.loader import StreamLoader
from ganscale.data.thread_pool import DaemonThreadPool
from ganscale.errors import GanscaleError, UnavailableError
from ganscale.schema import DataConfig

_PROGRAM = """
import sys
sys.path[:] = sys.argv[3:]  # where this package was found
from ganscale.data.loader_worker import main
main()
"""
_THREAD_CLOSE_SECONDS = 1.0
_PROCESS_CLOSE_SECONDS = 12.0  # a little longer than loaders take


def start_loader(
    data: DataSet, config: DataConfig, room: BatchAllocator, ahead: int, **place: Any
) -> "LoaderThread | LoaderProcess":
    """This rank's batches; from another process if the config has workers for that.

    room: makes the tensors in which images are handed out
    ahead: so many batches lie ready
    place: the other arguments of `data.loader`
    """
    if config.workers > 0 and hasattr(os, "memfd_create"):
        return LoaderProcess(data, config, room, ahead, **place)
    return LoaderThread(data.loader(room=room, **place), ahead)


class LoaderThread:
    """The batches of a loader, which a thread asks for."""

    def __init__(self, loader: Loader | StreamLoader, ahead: int) -> None:
        self._loader = loader
        self._crew = DaemonThreadPool(1, "loader")
        self._ahead: deque[Future[Batch]] = deque()
        for _ in range(ahead):
            self._ask()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """Raises as the loader does, at every further call, too."""
        batch = self._ahead[0].result()
        self._ahead.popleft()
        self._ask()
        return batch

    def wait(self, seconds: float) -> bool:
        """Whether the next batch, or what there is instead, comes within that time."""
        return bool(wait([self._ahead[0]], timeout=seconds).done)

    def close(self) -> None:
        """Within seconds: a batch that is still waited for is left to itself."""
        self._ahead.clear()
        self._crew.close(_THREAD_CLOSE_SECONDS)
        self._loader.close()

    def _ask(self) -> None:
        self._ahead.append(self._crew.submit(lambda: next(self._loader)))


@dataclass(frozen=True)
class Job:
    """What the other process is to do."""

    loader: Callable[..., Loader | StreamLoader]
    shape: tuple[int, ...]
    slots: int


@dataclass(frozen=True)
class LogMessage:
    """The other process has something for the log."""

    logger: str
    level: int
    text: str


@dataclass(frozen=True)
class BatchReady:
    """The other process has filled slot `index` of the common memory with the images of a batch."""

    index: int
    labels: np.ndarray
    slots: np.ndarray
    bad_samples: tuple[BadSample, ...]


class Memory:
    """Memory of both processes for `count` batches of uint8 images: `slots`, (count, *shape)."""

    def __init__(self, file: int, shape: tuple[int, ...], count: int) -> None:
        size = count * int(np.prod(shape))
        os.ftruncate(file, size)
        values = np.frombuffer(mmap.mmap(file, size), dtype=np.uint8)
        self.slots = torch.from_numpy(values).view(count, *shape)
        self._free = list(range(count))

    def take(self, shape: tuple[int, ...]) -> Tensor:
        """A free slot: the one that was freed last, whose pages are there."""
        slot = self.slots[self._free.pop()]
        assert slot.shape == shape
        return slot

    def free(self, index: int) -> None:
        self._free.append(index)

    def index(self, slot: Tensor) -> int:
        return (slot.data_ptr() - self.slots.data_ptr()) // slot.nbytes


class LoaderProcess:
    """The batches of `data.loader` from another process.

    That is asked for `ahead` batches at the start, and for one more whenever one is handed out. Its
    images are copied out of the common memory at once; so their place there is free again.
    """

    def __init__(
        self, data: DataSet, config: DataConfig, room: BatchAllocator, ahead: int, **place: Any
    ) -> None:
        share = place["global_batch_size"] // place["world_size"]
        self._room = room
        self._shape = (share, config.resolution, config.resolution, config.channels)
        # As many as lie ready, and as a loader ever holds; unused ones take no memory.
        count = ahead + 2 + 2 * config.workers
        file = os.memfd_create("ganscale batches")
        self._memory = Memory(file, self._shape, count)
        ours, theirs = socket.socketpair()
        self._connection = Connection(ours.detach())
        self._message: object = None  # the next one that is no line for the log
        command = [sys.executable, "-c", _PROGRAM, str(theirs.fileno()), str(file), *sys.path]
        self._process = subprocess.Popen(
            command, pass_fds=(theirs.fileno(), file), start_new_session=True
        )
        theirs.close()
        os.close(file)
        self._send(Job(partial(data.loader, **place), self._shape, count))
        for _ in range(ahead):
            self._send(None)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """Raises as the loader does, at every further call, too; UnavailableError when the other
        process was killed."""
        while not self.wait(60.0):
            pass
        message, self._message = self._message, None
        if not isinstance(message, BatchReady):
            self._send(None)
            assert isinstance(message, Exception)
            raise message
        images = self._room(self._shape)
        images.copy_(self._memory.slots[message.index])
        self._send(message.index)
        labels, slots = torch.from_numpy(message.labels), torch.from_numpy(message.slots)
        return Batch(images, labels, slots, message.bad_samples)

    def wait(self, seconds: float) -> bool:
        """Whether the next batch, or what there is instead, comes within that time."""
        try:
            while self._message is None and self._connection.poll(seconds):
                message = self._connection.recv()
                if isinstance(message, LogMessage):
                    logging.getLogger(message.logger).log(message.level, "%s", message.text)
                else:
                    self._message = message
        except (EOFError, OSError):
            self._message = self._lost()
        return self._message is not None

    def close(self) -> None:
        """Ends the other process; within seconds."""
        self._connection.close()
        try:
            self._process.wait(_PROCESS_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):  # in a read that nothing ends
                self._process.wait(1)

    def _send(self, message: object) -> None:
        with contextlib.suppress(OSError):  # it is gone; receiving says why
            self._connection.send(message)

    def _lost(self) -> GanscaleError:
        try:
            code = self._process.wait(1)
        except subprocess.TimeoutExpired:
            return UnavailableError("the process that reads the data does not answer any more")
        if code < 0:
            return UnavailableError(
                f"the process that reads the data was killed by signal {-code}; of memory?"
            )
        return GanscaleError(f"the process that reads the data ended with code {code}")
