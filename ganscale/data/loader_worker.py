"""The process of a rank's loader: the other end of `data.loader_process`."""

import contextlib
import logging
import os
import pickle
import signal
import sys
import threading
import traceback
from multiprocessing.connection import Connection
from queue import SimpleQueue

import torch

from ganscale.data.loader import Loader
from ganscale.data.loader_messages import BatchReady, LoaderJob, LogMessage, SharedBatches
from ganscale.data.streaming.loader import StreamLoader
from ganscale.errors import GanscaleError


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
    """Answers requests for batches."""

    def __init__(self, connection: Connection, file: int) -> None:
        self._connection = connection
        self._send_lock = threading.Lock()
        self._file = file
        self._requests: SimpleQueue[int | None] = SimpleQueue()
        self._loader: Loader | StreamLoader | None = None
        self._is_closing = False

    def run(self) -> None:
        """Until the other end is closed."""
        try:
            logging.basicConfig(
                level=logging.INFO,
                format="%(message)s",
                handlers=[_LogForwarder(self._connection, self._send_lock)],
            )
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
        while True:
            freed = self._requests.get()
            try:
                if self._loader is None or shared is None:
                    job: LoaderJob = pickle.loads(pickled)  # raises if the data set has changed
                    shared = SharedBatches(self._file, job.shape, job.count)
                    self._loader = job.data.make_loader(allocate=shared.allocate, **job.arguments)
                if freed is not None:
                    shared.free(freed)
                batch = next(self._loader)
                answer: object = BatchReady(
                    shared.index(batch.images),
                    batch.labels.numpy(),
                    batch.slots.numpy(),
                    batch.bad_samples,
                )
            except (GanscaleError, OSError) as error:
                answer = error
            with self._send_lock:
                self._connection.send(answer)


def main() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1})
    torch.set_num_threads(1)  # each of its threads decodes by itself
    connection, file = map(int, sys.argv[1:3])
    with contextlib.suppress(Exception):
        _LoaderServer(Connection(connection), file).run()
    sys.stderr.flush()
    os._exit(0)  # threads may hang in a read
