"""Readers that take turns on one core, each in its own processes."""

import gc
import multiprocessing
import os
import resource
import time
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

START_SECONDS, ROUND_SECONDS = 120, 300
_QUIET_SECONDS = 0.03


class Cost(NamedTuple):
    """Seconds per image: processor time, and wall-clock time."""

    cpu: float
    wall: float


class Contestant:
    """A reader in a process which, with all processes and threads that it starts, uses one core.

    failure: why it cannot be measured, or empty
    """

    def __init__(self, reader: str, core: int) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pipe, child_pipe = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(child_pipe, reader, core))
        self._process.start()
        child_pipe.close()
        self.failure = ""

    def open(self, case: Any) -> None:
        """Starts to read `case`."""
        self.failure = ""
        self._ask(case, START_SECONDS)

    def read(self, images: int) -> Cost | None:
        """The cost of the next `images`; None after a failure."""
        return None if self.failure else self._ask(images, ROUND_SECONDS)

    def close(self) -> None:
        """Ends its processes."""
        if self._process.is_alive():
            self._pipe.close()
            self._process.join(10)
        if self._process.is_alive():
            _kill_tree(self._process.pid)
            self._process.join()

    def _ask(self, request: Any, seconds: float) -> Any:
        try:
            self._pipe.send(request)
            if not self._pipe.poll(seconds):
                raise TimeoutError(f"no answer within {seconds} s")
            answer = self._pipe.recv()
            if isinstance(answer, str):
                self.failure = answer
                return None
            return answer
        except (OSError, EOFError) as error:
            self.failure = f"{type(error).__name__}: {error}"
            return None


def _kill_tree(pid: int | None) -> None:
    import psutil

    for process in [*psutil.Process(pid).children(recursive=True), psutil.Process(pid)]:
        process.kill()


def _serve(pipe: Connection, reader: str, core: int) -> None:
    """Answers each request of a `Contestant` with a Cost, with None, or with an error message."""
    os.sched_setaffinity(0, {core})
    # The default of data loaders on Linux, except in a spawned process.
    multiprocessing.set_start_method("fork", force=True)
    import torch

    torch.set_num_threads(1)
    from benchmarks.readers import BATCH, READERS

    batches: Iterator[Any] = iter(())
    while True:
        try:
            request = pipe.recv()
        except EOFError:
            return
        try:
            if isinstance(request, int):
                pipe.send(_measure(batches, request, BATCH))
            else:
                batches = iter(())
                gc.collect()  # ends the last stream's workers before the next ones start
                batches = READERS[reader][0](request)
                next(batches)
                pipe.send(None)
        except Exception as error:
            # Data loaders prepend the worker's traceback: the last line is the message.
            text = f"{type(error).__name__}: {error}".strip().splitlines()
            pipe.send(text[-1][:120])


def _measure(batches: Iterator[Any], images: int, batch: int) -> Cost:
    """The cost of the next `images`, including what is read ahead.

    It starts and ends at rest, with the read-ahead full, so no image is read for free.
    """
    meter = _Meter()
    meter.wait_until_quiet()
    cpu, wall = meter.seconds(), time.perf_counter()
    count = 0
    while count < images:
        count += len(next(batches))
    wall = time.perf_counter() - wall
    meter.wait_until_quiet()
    cpu = meter.seconds() - cpu
    return Cost(cpu / count, wall / count)


class _Meter:
    """User and system time of this process and its current descendants.

    Those that have ended since count through the kernel's record, once they are waited for.
    """

    def __init__(self) -> None:
        import psutil

        self._children = [child.pid for child in psutil.Process().children(recursive=True)]

    def seconds(self) -> float:
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = time.process_time() + ended.ru_utime + ended.ru_stime
        for pid in self._children:
            with suppress(OSError):  # it has ended
                # clock_getcpuclockid(3): in nanoseconds, where /proc counts hundredths of a second
                seconds += time.clock_gettime((~pid << 3) | 2)
        return seconds

    def wait_until_quiet(self) -> None:
        """Waits until hardly any processor time is used, at most 2 seconds."""
        deadline = time.monotonic() + 2
        before = self.seconds()
        while time.monotonic() < deadline:
            time.sleep(_QUIET_SECONDS)
            now = self.seconds()
            if now - before < 0.05 * _QUIET_SECONDS:
                return
            before = now
