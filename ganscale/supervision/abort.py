"""The end of a process whose run cannot go on: last words, then the exit code.

The main thread may hang for ever, and so may whatever is written here (a disk or network may be the
cause): it gets some seconds and is then abandoned.
"""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NoReturn

from ganscale.supervision.failure_attribution import FailureCause
from ganscale.supervision.job_history import note_bad_host, note_ended
from ganscale.supervision.progress import Progress
from ganscale.supervision.rank_links import RankLink
from ganscale.tracking.console import append_line

_BEFORE_ABORT_SECONDS = 15.0
_WRITE_SECONDS = 3.0
ABORT_SECONDS = _BEFORE_ABORT_SECONDS + 3 * _WRITE_SECONDS
"""Shorter than a batch script waits for the last rank."""

STDOUT, STDERR = 1, 2  # file descriptors


def abort(
    cause: FailureCause, rank: int, progress: Progress, links: Sequence[RankLink]
) -> NoReturn:
    """Ends this process."""
    try:
        _run_for(ABORT_SECONDS, _write_last_words, cause, rank, progress, links)
    finally:
        os._exit(cause.exit_code)


def _write_last_words(
    cause: FailureCause, rank: int, progress: Progress, links: Sequence[RankLink]
) -> None:
    if cause.is_hang:
        _run_for(_WRITE_SECONDS, _write_stacks, rank, progress)
    else:  # a checkpoint that is being written is worth a moment
        _run_for(_BEFORE_ABORT_SECONDS, progress.before_abort)
    if _is_reporter(rank, links):
        deadline = time.monotonic() + _WRITE_SECONDS
        while time.monotonic() < deadline and any(link.receive() for link in links):
            time.sleep(0.02)  # the other ranks write first, so that our message is the last line
    is_reporter = _is_reporter(rank, links)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # a full disk
            stream.flush()
    if is_reporter:
        with suppress(OSError):
            os.write(STDERR, f"error: {cause.message}\n".encode(errors="backslashreplace"))
    # The main thread's collective fails as other ranks leave; its error must not follow ours.
    null = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (STDOUT, STDERR):
        os.dup2(null, descriptor)
    if is_reporter:
        if cause.suspect_host:
            note_bad_host(cause.suspect_host)
        note_ended(cause.exit_code, cause.message)
        if folder := progress.run_folder:
            append_line(folder.log, f"ERROR: {cause.message}")


def _is_reporter(rank: int, links: Sequence[RankLink]) -> bool:
    """Rank 0; if that is lost, rank 1 and the first rank of every other machine."""
    if rank == 0:
        return True
    is_first = rank == 1 or os.environ.get("LOCAL_RANK") == "0"
    return is_first and all(link.cause is None for link in links)


def _write_stacks(rank: int, progress: Progress) -> None:
    if progress.run_folder is None:
        faulthandler.dump_traceback(file=STDERR)
        return
    path = progress.run_folder.stack(rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        faulthandler.dump_traceback(file)


def _run_for(seconds: float, function: Callable[..., None], *arguments: Any) -> None:
    """Calls `function` in a thread and abandons it after `seconds`."""
    thread = threading.Thread(target=function, args=arguments, daemon=True)
    thread.start()
    thread.join(seconds)
