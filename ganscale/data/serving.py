"""The process in which a rank's loader is: the other end of `data.ahead`.

    python -m ganscale.data.serving SOCKET MEMORY     (file descriptors)
"""

import contextlib
import logging
import os
import signal
import sys
import threading
import traceback
from multiprocessing.connection import Connection
from queue import SimpleQueue

from ganscale.data.dataset import open_data
from ganscale.data.loader import Loader
from ganscale.data.ahead import Filled, Job, Memory, Told
from ganscale.data.streaming import StreamLoader
from ganscale.errors import GanscaleError, UserError


class _Teller(logging.Handler):
    """Hands log lines to the process that trains."""

    def __init__(self, connection: Connection, lock: threading.Lock) -> None:
        super().__init__()
        self._connection, self._lock = connection, lock

    def emit(self, record: logging.LogRecord) -> None:
        with self._lock, contextlib.suppress(OSError):
            self._connection.send(Told(record.name, record.levelno, record.getMessage()))


class _Server:
    """The other process: a loader whose batches are asked for."""

    def __init__(self, connection: Connection, file: int) -> None:
        self._connection = connection
        self._lock = threading.Lock()  # of sending
        self._file = file
        self._asked: SimpleQueue[int | None] = SimpleQueue()
        self._loader: Loader | StreamLoader | None = None

    def run(self) -> None:
        """Until the other end is closed."""
        try:
            job = self._connection.recv()
            logging.basicConfig(
                level=logging.INFO, handlers=[_Teller(self._connection, self._lock)]
            )
            threading.Thread(target=self._serve, args=(job,), daemon=True).start()
            while True:
                self._asked.put(self._connection.recv())
        except (EOFError, OSError):
            if self._loader is not None:
                self._loader.close()

    def _serve(self, job: Job) -> None:
        memory = Memory(self._file, job.shape, job.slots)
        while True:
            free = self._asked.get()
            if free is not None:
                memory.free(free)
            try:
                if self._loader is None:
                    self._loader = self._open(job, memory)
                batch = next(self._loader)
                answer: object = Filled(
                    memory.index(batch.images),
                    batch.labels.numpy(),
                    batch.slots.numpy(),
                    batch.broken,
                )
            except GanscaleError as error:
                answer = error
            except BaseException:  # of a loader that is being closed, too
                answer = RuntimeError(f"in the process that reads the data:\n{traceback.format_exc()}")
            with self._lock, contextlib.suppress(OSError):
                self._connection.send(answer)

    def _open(self, job: Job, memory: Memory) -> Loader | StreamLoader:
        data = open_data(job.config)
        if data.fingerprint != job.fingerprint:
            raise UserError(f"the data set in {data.location} has just been changed")
        return data.loader(room=memory.take, **job.place)


def main() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1})
    connection, file = map(int, sys.argv[1:])
    _Server(Connection(connection), file).run()
    sys.stderr.flush()
    os._exit(0)  # threads may hang in a read


if __name__ == "__main__":
    main()
