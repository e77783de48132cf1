"""Requests to stop: a signal sets a flag; the loop acts on it when all ranks have agreed."""

import os
import signal
from pathlib import Path
from types import FrameType

# Time limit or preemption (SLURM sends what the batch script asks for), scancel, Ctrl-C.
_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)

STOPPED_FILE = "GANSCALE_STOPPED_FILE"


def mark_stopped(reason: str) -> None:
    """Writes `reason` into the file that the environment names, if it does.

    A batch script that launches through `accelerate launch` reads it there: the launcher replaces
    the exit codes of its workers by its own.
    """
    if path := os.environ.get(STOPPED_FILE):
        Path(path).write_text(reason + "\n")


class StopRequest:
    """While entered, the first signal is remembered; a second Ctrl-C ends the process at once."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def is_requested(self) -> bool:
        return self.received is not None

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
