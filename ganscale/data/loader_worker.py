"""The process in which a rank's loader is: the other end of `data.loader_process`."""

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

from ganscale.data.loader_process import BatchReady, Job, Memory, LogMessage
from ganscale.data.loader import Loader
from ganscale.data.streaming.loader import StreamLoader
from ganscale.errors import GanscaleError


class _Teller(logging.Handler):
    """Hands log lines to the process that trains; to standard error once that is gone."""

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


class _Server:
    """A loader whose batches are asked for."""

    def __init__(self, connection: Connection, file: int) -> None:
        self._connection = connection
        self._lock = threading.Lock()  # of sending
        self._file = file
        self._asked: SimpleQueue[int | None] = SimpleQueue()
        self._loader: Loader | StreamLoader | None = None
        self._is_over = False

    def run(self) -> None:
        """Until the other end is closed."""
        try:
            logging.basicConfig(
                level=logging.INFO,
                format="%(message)s",
                handlers=[_Teller(self._connection, self._lock)],
            )
            job = self._connection.recv_bytes()
            threading.Thread(target=self._serve, args=(job,), daemon=True).start()
            while True:
                self._asked.put(self._connection.recv())
        except (EOFError, OSError):
            self._is_over = True
            if self._loader is not None:
                self._loader.close()

    def _serve(self, job: bytes) -> None:
        """Ends the process if it cannot go on: the other end must not wait for ever."""
        try:
            self._answer(job)
        except BaseException as error:
            # What fails while the loader is being closed, or because nobody listens, is no error
            if not self._is_over and not isinstance(error, OSError):
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)

    def _answer(self, job: bytes) -> None:
        memory: Memory | None = None
        while True:
            free = self._asked.get()
            if free is not None:
                assert memory is not None
                memory.free(free)
            try:
                if self._loader is None:
                    todo: Job = pickle.loads(job)
                    memory = Memory(self._file, todo.shape, todo.slots)
                    self._loader = todo.loader(room=memory.take)
                assert memory is not None
                batch = next(self._loader)
                index = memory.index(batch.images)
                answer: object = BatchReady(
                    index, batch.labels.numpy(), batch.slots.numpy(), batch.bad_samples
                )
            except (GanscaleError, OSError) as error:
                answer = error
            with self._lock:
                self._connection.send(answer)


def main() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1})
    torch.set_num_threads(1)  # each of its threads decodes by itself
    connection, file = map(int, sys.argv[1:3])
    with contextlib.suppress(Exception):
        _Server(Connection(connection), file).run()
    sys.stderr.flush()
    os._exit(0)  # threads may hang in a read
