"""Work on many shards at once, in processes of their own, that a full disk ends with a sentence."""

import errno
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from ganscale.errors import UserError

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
    pool = ProcessPoolExecutor(min(workers, len(tasks)), mp_context=spawn)
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
