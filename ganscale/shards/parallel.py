"""Work on many shards at once, in processes of their own, that a full disk ends with a sentence."""

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

_LOOK_SECONDS = 1.0

Task = TypeVar("Task")
Result = TypeVar("Result")


def run_all(
    work: Callable[[Task], Result], tasks: Sequence[Task], workers: int
) -> Iterator[tuple[Task, Result]]:
    """Every task with its result, as they are finished; `work` is a function of a module.

    Raises what `work` raises, once the tasks that have begun are done, and UserError when a process
    is killed.
    """
    if workers <= 1 or len(tasks) <= 1:
        for task in tasks:
            yield task, work(task)
        return
    # Not fork: a caller with threads (torch has some) could pass a held lock on to its children.
    spawn = multiprocessing.get_context("spawn")
    processes = min(workers, len(tasks))
    pool = ProcessPoolExecutor(
        processes, spawn, initializer=_end_with_parent, initargs=(os.getpid(),)
    )
    try:
        futures = {pool.submit(work, task): task for task in tasks}
        for future in as_completed(futures):
            yield futures.pop(future), future.result()
    except BrokenProcessPool as error:
        raise UserError(
            "a process was killed, perhaps for its memory; fewer --workers need less, and the same "
            "command goes on from here"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent(parent: int) -> None:
    """Ends this process when `parent` is killed, of which a pool's processes do not learn."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def saying_when_full(folder: Path) -> Iterator[None]:
    """Makes a UserError of a disk or quota that is full while files are written to `folder`."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        reason = "the quota is" if error.errno == errno.EDQUOT else "the disk is"
        raise UserError(
            f"cannot write to {folder}: {reason} full; once there is room, the same command goes "
            "on from here"
        ) from error
