"""The process of a rank's loader: the other end of `data.loader_process`.

Over the connection, the trainer sends a LoaderJob, then a request for each batch: the index of a
place in the shared memory that is free again, or None. The loader answers each request with a
BatchReady or an exception, and sends LogMessages in between.
"""

import contextlib
import logging
import mmap
import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ganscale.data.bad_samples import BadSample
from ganscale.data.dataset import DataSet
from ganscale.data.loader import Loader
from ganscale.data.streaming.loader import StreamLoader
from ganscale.errors import GanscaleError, OutOfMemoryError, is_out_of_memory
from ganscale.processes import resume_when_parent_dies
from ganscale.randomness import Draw, draw_together


@dataclass(frozen=True)
class LoaderJob:
    """Load `data` into shared memory for `count` batches of images of `shape`, and make the random
    numbers `draws` of each. arguments: of `data.make_loader`"""

    data: DataSet
    arguments: dict[str, Any]
    draws: Sequence[Draw]
    shape: tuple[int, ...]
    count: int


@dataclass(frozen=True)
class LogMessage:
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
    draws: np.ndarray


class SharedBatches:
    """Memory of both processes for uint8 images: `images`, (count, *shape), a batch at each index;
    the trainer only reads."""

    def __init__(self, file: int, shape: tuple[int, ...], count: int) -> None:
        size = count * int(np.prod(shape))
        os.ftruncate(file, size)
        values = np.frombuffer(mmap.mmap(file, size), dtype=np.uint8)
        self.images = torch.from_numpy(values).view(count, *shape)
        self.free = list(range(count))  # indices

    def allocate(self, shape: tuple[int, ...]) -> Tensor:
        """Free memory for a batch: what was freed last, whose pages are there already."""
        images = self.images[self.free.pop()]
        assert images.shape == shape
        return images

    def index(self, images: Tensor) -> int:
        """Which batch of the memory `images` is."""
        return (images.data_ptr() - self.images.data_ptr()) // images.nbytes


class _LogForwarder(logging.Handler):
    """Sends log lines to the process that trains; writes to standard error once that has ended."""

    def __init__(self, connection: Connection, lock: threading.Lock) -> None:
        super().__init__()
        self._connection, self._lock = connection, lock

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        try:
            with self._lock:
                self._connection.send(LogMessage(record.name, record.levelno, text))
        except OSError:
            sys.stderr.write(f"{text}\n")


class _LoaderServer:
    """Answers requests for batches, which are in the shared memory `file`."""

    def __init__(self, connection: Connection, file: int) -> None:
        self._connection, self._file = connection, file
        self._send_lock = threading.Lock()
        self._requests: SimpleQueue[int | None] = SimpleQueue()
        self._loader: Loader | StreamLoader | None = None
        self._is_closing = False

    def run_until_closed(self) -> None:
        try:
            forwarder = _LogForwarder(self._connection, self._send_lock)
            logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[forwarder])
            job = self._connection.recv_bytes()
            threading.Thread(target=self._serve, args=(job,), daemon=True).start()
            while True:
                self._requests.put(self._connection.recv())
        except (EOFError, OSError):
            self._is_closing = True
            if self._loader is not None:
                self._loader.close()

    def _serve(self, job: bytes) -> None:
        """Ends the process if it cannot go on: the other end must not wait for ever."""
        try:
            self._answer_requests(job)
        except BaseException as error:
            # Failures while the loader is being closed, or after the other end was, are expected.
            if not self._is_closing and not isinstance(error, OSError):
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)

    def _answer_requests(self, pickled: bytes) -> None:
        shared: SharedBatches | None = None
        job: LoaderJob | None = None
        while True:
            freed = self._requests.get()
            try:
                if self._loader is None or shared is None or job is None:
                    job = pickle.loads(pickled)  # raises if the data set has changed
                    assert isinstance(job, LoaderJob)
                    shared = SharedBatches(self._file, job.shape, job.count)
                    self._loader = job.data.make_loader(allocate=shared.allocate, **job.arguments)
                if freed is not None:
                    shared.free.append(freed)
                batch = next(self._loader)
                draws = draw_together(job.draws, job.arguments["seed"], batch.slots)
                index, labels, slots = shared.index(batch.images), batch.labels, batch.slots
                answer: object = BatchReady(
                    index, labels.numpy(), slots.numpy(), batch.bad_samples, draws.numpy()
                )
            except (GanscaleError, OSError) as error:
                answer = error
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                answer = OutOfMemoryError("out of memory while reading images")
            with self._send_lock:
                self._connection.send(answer)


def main() -> None:
    resume_when_parent_dies()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1})
    torch.set_num_threads(1)  # each of its threads decodes by itself
    connection, file = map(int, sys.argv[1:3])
    with contextlib.suppress(Exception):
        _LoaderServer(Connection(connection), file).run_until_closed()
    sys.stderr.flush()
    os._exit(0)  # threads may hang in a read
