"""A rank's batches from another process, some of them ready before the training asks for them.

Threads decode without Python's lock; but with small images, the rest takes that lock thousands of
times a second, and each time a training step may have to wait.

The other process (`data.loader_worker`) is started afresh, not forked: it inherits no files, locks,
threads or GPU contexts of the training. It ends when the training does, however that ends.
"""

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import wait
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch

from ganscale.data.batch import Batch, BatchAllocator
from ganscale.data.dataset import DataSet
from ganscale.data.loader import Loader
from ganscale.data.loader_worker import BatchReady, LoaderJob, LogMessage, SharedBatches
from ganscale.data.streaming.loader import StreamLoader
from ganscale.data.thread_pool import DaemonThreadPool
from ganscale.errors import GanscaleError, UnavailableError
from ganscale.processes import is_stopped
from ganscale.randomness import Draw, draw_together

_PROGRAM = """
import sys
sys.path[:] = sys.argv[3:]  # where this package was found
from ganscale.data.loader_worker import main
main()
"""
_THREAD_CLOSE_SECONDS = 1.0
_PROCESS_CLOSE_SECONDS = 12.0  # a little longer than loaders take
_STOPPED_SECONDS = 10.0  # for which the process may be stopped by a signal


def start_loader(
    data: DataSet,
    allocate: BatchAllocator,
    batches_ahead: int,
    draws: Sequence[Draw] = (),
    **arguments: Any,
) -> "LoaderThread | LoaderProcess":
    """This rank's batches; from another process if the config has workers.

    allocate: makes the tensors in which images are returned
    batches_ahead: how many batches are kept ready
    draws: the random numbers that come with each batch
    """
    if data.config.workers > 0 and hasattr(os, "memfd_create"):
        return LoaderProcess(data, allocate, batches_ahead, draws, **arguments)
    loader = data.make_loader(allocate=allocate, **arguments)
    return LoaderThread(loader, batches_ahead, draws, arguments["seed"])


class LoaderThread(Iterator[Batch]):
    """The batches of a loader, taken from it by a thread."""

    def __init__(
        self,
        loader: Loader | StreamLoader,
        batches_ahead: int,
        draws: Sequence[Draw] = (),
        seed: int = 0,
    ) -> None:
        self._loader = loader
        self._draw = partial(draw_together, draws, seed)
        self._thread = DaemonThreadPool(1, "loader")
        self._requested = deque(self._thread.submit(self._next) for _ in range(batches_ahead))

    def __next__(self) -> Batch:
        """Raises as the loader does, also at every further call."""
        batch = self._requested[0].result()
        self._requested.popleft()
        self._requested.append(self._thread.submit(self._next))
        return batch

    def _next(self) -> Batch:
        batch = next(self._loader)
        return replace(batch, draws=self._draw(batch.slots))

    def wait(self, seconds: float) -> bool:
        """Whether the next batch, or an error in its place, arrives within that time."""
        return bool(wait([self._requested[0]], timeout=seconds).done)

    def close(self) -> None:
        """Ends within seconds, without the batch that is being loaded."""
        self._requested.clear()
        self._thread.close(_THREAD_CLOSE_SECONDS)
        self._loader.close()


class LoaderProcess(Iterator[Batch]):
    """The batches of `data.make_loader` from another process: `batches_ahead` are requested at the
    start, and another one whenever one is returned."""

    def __init__(
        self,
        data: DataSet,
        allocate: BatchAllocator,
        batches_ahead: int,
        draws: Sequence[Draw] = (),
        **arguments: Any,
    ) -> None:
        config = data.config
        share = arguments["global_batch_size"] // arguments["world_size"]
        self._allocate = allocate
        self._shape = (share, *config.size, config.channels)
        # Those that are ready, and as many as a loader ever fills; unused ones take no memory.
        count = batches_ahead + 2 + 2 * config.workers
        file = os.memfd_create("ganscale batches")
        self._shared = SharedBatches(file, self._shape, count)
        ours, theirs = socket.socketpair()
        self._connection = Connection(ours.detach())
        self._answer: object = None  # the next batch or error, if it has arrived
        self._stopped_since: float | None = None
        command = [sys.executable, "-c", _PROGRAM, str(theirs.fileno()), str(file), *sys.path]
        self._process = subprocess.Popen(
            command, pass_fds=(theirs.fileno(), file), start_new_session=True
        )
        theirs.close()
        os.close(file)
        self._send(LoaderJob(data, arguments, draws, self._shape, count))
        for _ in range(batches_ahead):
            self._send(None)

    def __next__(self) -> Batch:
        """Raises as the loader does, also at every further call; UnavailableError when the other
        process was killed or stopped."""
        while not self.wait(1.0):
            pass
        answer, self._answer = self._answer, None
        if not isinstance(answer, BatchReady):
            self._send(None)
            assert isinstance(answer, Exception)
            raise answer
        images = self._allocate(self._shape)
        images.copy_(self._shared.images[answer.index])
        self._send(answer.index)  # whose place in the shared memory is free again
        arrays = answer.labels, answer.slots, answer.draws
        labels, slots, draws = (torch.from_numpy(array) for array in arrays)
        return Batch(images, labels, slots, answer.bad_samples, draws)

    def wait(self, seconds: float) -> bool:
        """Whether the next batch, or an error in its place, arrives within that time."""
        try:
            while self._answer is None and self._connection.poll(seconds):
                message = self._connection.recv()
                if isinstance(message, LogMessage):
                    logging.getLogger(message.logger).log(message.level, "%s", message.text)
                else:
                    self._answer = message
        except (EOFError, OSError):
            self._answer = self._exit_error()
        if self._answer is None:
            self._end_if_stopped()
        return self._answer is not None

    def close(self) -> None:
        """Ends the other process within seconds."""
        self._connection.close()
        self._process.send_signal(signal.SIGCONT)  # if it is stopped, so that it ends
        try:
            self._process.wait(_PROCESS_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):  # in a read that nothing ends
                self._process.wait(1)

    def _send(self, message: object) -> None:
        with contextlib.suppress(OSError):  # the process has ended: `wait` finds out why
            self._connection.send(message)

    def _end_if_stopped(self) -> None:
        """Kills the other process once it has been stopped for too long, so that a call raises."""
        now = time.monotonic()
        if self._process.poll() is not None or not is_stopped(self._process.pid):
            self._stopped_since = None
        elif self._stopped_since is None:
            self._stopped_since = now
        elif now - self._stopped_since > _STOPPED_SECONDS:
            self._process.kill()

    def _exit_error(self) -> GanscaleError:
        try:
            code = self._process.wait(1)
        except subprocess.TimeoutExpired:
            return UnavailableError("the process that loads the data no longer answers")
        if self._stopped_since is not None:
            return UnavailableError(
                "the process that loads the data was stopped (SIGSTOP) and not continued"
            )
        if code < 0:
            return UnavailableError(
                f"the process that loads the data was killed by signal {-code}; was memory short?"
            )
        return GanscaleError(f"the process that loads the data ended with code {code}")
