"""Notices a rank that dies, fails or hangs, names it, and ends the others.

Left alone, the others would wait in a collective for minutes or for ever, and then fail with the
communication library's message. So every rank sends heartbeats with its progress to rank 0, which
judges all ranks and sends the others the cause of the end. The others judge rank 0 themselves.
"""

import faulthandler
import os
import selectors
import sys
import threading
import time
import traceback
from dataclasses import astuple
from math import inf

from ganscale import runtime as runtime_module
from ganscale.errors import EXIT_RANK_LOST
from ganscale.schema import RuntimeConfig
from ganscale.supervision.abort import ABORT_SECONDS, STDERR, abort
from ganscale.supervision.failure_attribution import (
    Failure,
    FailureCause,
    RankStatus,
    attribute_failure,
    is_for_users,
)
from ganscale.supervision.joining import JoinError, join_ranks
from ganscale.supervision.placement import Placement
from ganscale.supervision.progress import Progress
from ganscale.supervision.signals import PARENT_PID, StopRequest

_MAX_HEARTBEAT_SECONDS = 5.0
_CHECK_SECONDS = 0.25
_CLOSE_SECONDS = 3.0
_WAITING_FOLDERS = ("/torch/distributed/", "/torch/autograd/")


class Watchdog:
    """Waits for all ranks when it is constructed, and watches them until the end of its `with`
    block. On every rank, before there is a process group.

    An error that leaves the block ends all ranks; a single rank then only stops watching.
    stop: requested when this rank's launcher dies and leaves it behind
    Ends the process if not all ranks join.
    """

    def __init__(
        self, placement: Placement, progress: Progress, config: RuntimeConfig, stop: StopRequest
    ) -> None:
        self._placement = placement
        self._progress = progress
        self._stop = stop
        self._limit = limit_seconds = config.timeout_seconds
        # This thread runs whatever the main thread does, unless the process is stopped.
        self._silence = min(limit_seconds, max(30.0, limit_seconds / 10))
        # Rank 0 receives 200 heartbeats a second at most until there are 1,000 ranks.
        interval = min(max(1.0, placement.world_size / 200), _MAX_HEARTBEAT_SECONDS)
        self._heartbeat_seconds = min(interval, self._silence / 10)
        self._is_closing = threading.Event()
        now = time.monotonic()
        self._own_status = RankStatus(placement.rank, placement.host, now, now)
        try:
            self._links = join_ranks(placement, config.join_timeout_seconds, stop)
        except JoinError as error:
            for link in error.links:
                link.send(cause=astuple(error.cause))
            abort(error.cause, placement.rank, progress, error.links)
        self._watched = [link.status for link in self._links]
        if placement.is_main:
            self._watched.insert(0, self._own_status)
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        """Without an error, all ranks have to be past their last collective."""
        if error is not None and self._links:
            self._fail(error)
            return
        self._is_closing.set()
        self._thread.join(_CLOSE_SECONDS)
        faulthandler.cancel_dump_traceback_later()
        for link in self._links:
            link.send(goodbye=True)

    def _fail(self, error: BaseException) -> None:
        failure = Failure.from_error(error)
        if not failure.is_consequence and not is_for_users(error):
            traceback.print_exception(error)
        self._own_status.failure, self._own_status.failed_at = failure, time.monotonic()
        if not self._placement.is_main:
            self._links[0].send(failure=astuple(failure))
        # The watchdog's thread ends this process. If it does not, the error is raised after all.
        time.sleep(self._silence + ABORT_SECONDS + _CLOSE_SECONDS)

    def _run(self) -> None:
        try:
            self._watch()
        except Exception as error:  # ours: without a watchdog this rank would be taken for dead
            traceback.print_exception(error)
            message = f"the watchdog of {self._own_status.name} failed: {error}"
            self._abort(FailureCause(EXIT_RANK_LOST, message))

    def _watch(self) -> None:
        selector = selectors.DefaultSelector()
        for link in self._links:
            selector.register(link.connection, selectors.EVENT_READ, link)
        previous, next_heartbeat, next_check = time.monotonic(), 0.0, 0.0
        self._reset_clocks(previous)  # the first ranks have waited for the last to connect
        while not self._is_closing.is_set():
            for key, _ in selector.select(_CHECK_SECONDS) if self._links else ():
                if not key.data.receive():
                    selector.unregister(key.fileobj)
            if not self._links:
                self._is_closing.wait(_CHECK_SECONDS)
            now = time.monotonic()
            if now - previous > self._silence / 2:  # we were suspended, and perhaps the others
                self._reset_clocks(now)
            previous = self._own_status.heard_at = now
            if self._own_status.mark is not self._progress.current:
                self._own_status.mark = self._progress.current
                self._own_status.progressed_at = now
            if now >= next_heartbeat:
                next_heartbeat = now + self._heartbeat_seconds
                self._send_heartbeat()
            for link in self._links:
                if link.cause is not None:
                    self._abort(link.cause)
            if now >= next_check:  # not at every one of hundreds of heartbeats a second
                next_check = now + _CHECK_SECONDS
                self._check(now)

    def _reset_clocks(self, now: float) -> None:
        for status in self._watched:
            status.heard_at = status.progressed_at = now

    def _send_heartbeat(self) -> None:
        mark = self._progress.current
        self._own_status.is_waiting = _is_main_thread_waiting()
        for link in self._links:
            link.send(heartbeat=astuple(mark), is_waiting=self._own_status.is_waiting)
        if self._links and os.getppid() != PARENT_PID:
            self._stop.request()
        # If a thread never releases the interpreter, this C thread still prints where.
        faulthandler.dump_traceback_later(1.5 * self._limit + mark.extra_seconds, file=STDERR)

    def _check(self, now: float) -> None:
        limit = self._limit if self._placement.is_main else inf
        cause = attribute_failure(self._watched, now, limit, self._silence)
        if cause is not None:
            for link in self._links:
                link.send(cause=astuple(cause))
            self._abort(cause)

    def _abort(self, cause: FailureCause) -> None:
        if not self._is_closing.is_set():
            abort(cause, self._placement.rank, self._progress, self._links)


def _is_main_thread_waiting() -> bool:
    """Whether the main thread is in a part of torch that waits for other ranks."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        file = frame.f_code.co_filename
        if file == runtime_module.__file__ or any(folder in file for folder in _WAITING_FOLDERS):
            return True
        if "/torch/" not in file:
            return False
        frame = frame.f_back
    return False
