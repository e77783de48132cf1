"""Work on many shards in parallel processes, and a clear error when the disk is full."""

import errno
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from ganscale.errors import UserError

_POLL_SECONDS = 1.0

Task = TypeVar("Task")
Result = TypeVar("Result")


def run_all(
    work: Callable[[Task], Result], tasks: Sequence[Task], workers: int
) -> Iterator[tuple[Task, Result]]:
    """Yields every task with its result as it finishes; `work` is a module-level function.

    Raises what `work` raises, once the running tasks are done, and UserError when a process is
    killed.
    """
    if workers <= 1 or len(tasks) <= 1:
        for task in tasks:
            yield task, work(task)
        return
    # Not fork: torch has threads, and a child would inherit the locks that they hold.
    spawn = multiprocessing.get_context("spawn")
    size = min(workers, len(tasks))
    pool = ProcessPoolExecutor(size, spawn, _end_with_parent, (os.getpid(),))
    try:
        futures = {pool.submit(work, task): task for task in tasks}
        for future in as_completed(futures):
            yield futures.pop(future), future.result()
    except BrokenProcessPool as error:
        raise UserError(
            "a process was killed, perhaps for lack of memory: run the same command with fewer "
            "--workers to continue"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent(parent: int) -> None:
    """Ends this process when `parent` is killed, which a pool does not do."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_POLL_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def explain_full_disk(folder: Path) -> Iterator[None]:
    """Raises a UserError when the disk or quota is full while files are written to `folder`."""
    try:
        yield
    except OSError as error:
        limit = {errno.ENOSPC: "disk", errno.EDQUOT: "quota"}.get(error.errno or 0)
        if limit is None:
            raise
        raise UserError(
            f"cannot write to {folder}: the {limit} is full; free some space and run the same "
            "command to continue"
        ) from error
