"""Threads that never keep a process from ending, unlike those of an executor, which the interpreter
joins at exit, however long a read from a dead server takes."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

Result = TypeVar("Result")


class DaemonThreadPool:
    """`size` threads that run tasks in the order of submission; with 0, the caller runs them."""

    def __init__(self, size: int, name: str) -> None:
        self._tasks: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._is_closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}-{i}", daemon=True)
            for i in range(size)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, task: Callable[[], Result]) -> "Future[Result]":
        """The future result of the task, or the exception that it raises."""
        if self._is_closed:
            raise RuntimeError("the thread pool is closed")
        future: Future[Result] = Future()
        if self._threads:
            self._tasks.put((future, task))
        else:
            _run(future, task)
        return future

    def close(self, seconds: float) -> bool:
        """Drops tasks that have not begun; whether all threads ended within that time."""
        self._is_closed = True
        for _ in self._threads:
            self._tasks.put(None)
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _work(self) -> None:
        while (item := self._tasks.get()) is not None:
            if self._is_closed:
                item[0].cancel()
            else:
                _run(*item)
            del item  # or an idle thread keeps the last batch alive


def _run(future: "Future[Any]", task: Callable[[], Any]) -> None:
    try:
        future.set_result(task())
    except BaseException as error:
        future.set_exception(error)
