"""Requests to stop: a signal is noted; the loop acts on it when all ranks have agreed."""

import os
import signal
import sys
import threading

from ganscale.errors import EXIT_INTERRUPTED

# Time limit or preemption (SLURM sends what the batch script asks for), scancel, Ctrl-C.
_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)


PARENT = os.getppid()
"""The process that started this one; read early, while it lives."""


class StopRequest:
    """The first request to stop is remembered; a second Ctrl-C ends the process at once."""

    def __init__(self) -> None:
        self._asked = threading.Event()

    @classmethod
    def listening(cls) -> "StopRequest":
        """Takes the signals from here on; to be called before any other thread is started.

        They are blocked in every thread and waited for in one of our own. So none is lost while
        torch is still being imported, none cuts a system call short, and none reaches the processes
        that we start, which inherit the mask.
        """
        request = cls()
        signals = {*_SIGNALS}
        if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell's background job
            signals.remove(signal.SIGINT)
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        threading.Thread(target=request._listen, args=[signals], name="stop", daemon=True).start()
        return request

    def is_requested(self) -> bool:
        return self._asked.is_set()

    def request(self) -> None:
        """Does what a signal would."""
        self._asked.set()

    def _listen(self, signals: set[signal.Signals]) -> None:
        was_interrupted = False
        while True:
            received = signal.sigwait(signals)
            self.request()
            if received == signal.SIGINT:
                if was_interrupted:
                    os._exit(EXIT_INTERRUPTED)
                was_interrupted = True
                if os.environ.get("RANK", "0") == "0":
                    sys.stderr.write(
                        "\nstops after this cycle, with a checkpoint; Ctrl-C again leaves at once\n"
                    )
                    sys.stderr.flush()
