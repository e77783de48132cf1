"""How long a disk or network may fail before a run gives up."""

import logging
import random
import threading
import time

from ganscale.errors import UnavailableError
from ganscale.terminal import printable

logger = logging.getLogger(__name__)

_FIRST_DELAY_SECONDS = 0.5
_LONGEST_DELAY_SECONDS = 30.0


class Backoff:
    """Waits between tries: exponential backoff with full jitter, so that a thousand ranks that
    failed together do not come back together (Brooker, "Exponential Backoff And Jitter", 2015).

    seconds: how long every try may fail; 0 gives up at the first failure
    stopped: ends a wait at once when another thread sets it
    """

    def __init__(self, seconds: float, stopped: threading.Event | None = None) -> None:
        self._seconds = seconds
        self._stopped = stopped or threading.Event()
        self._failures, self._first_failure = 0, 0.0
        # Its own, since it draws in threads: a network that draws from the default one is refused.
        # It decides when something is read, never what.
        self._random = random.Random()

    def wait(self, error: BaseException, problem: str) -> None:
        """Waits before the next try; at the end, raises UnavailableError "`problem`: `error`"."""
        now = time.monotonic()
        if self._failures == 0:
            self._first_failure = now
        left = self._first_failure + self._seconds - now
        message = printable(f"{problem}: {str(error) or type(error).__name__}")
        if left <= 0:
            message += f"; tried for {self._seconds:g} s (data.retry_seconds)"
            raise UnavailableError(message) from error
        if self._failures & (self._failures + 1) == 0:  # the first, second, fourth, eighth one
            logger.warning("%s; trying again for up to %.0f s", message, left)
        ceiling = min(_LONGEST_DELAY_SECONDS, _FIRST_DELAY_SECONDS * 2.0**self._failures)
        self._failures = min(self._failures + 1, 32)
        self._stopped.wait(min(left, self._random.uniform(0, ceiling)))

    def reset(self) -> None:
        """After a success: the next failure counts as the first."""
        self._failures = 0
