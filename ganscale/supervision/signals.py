"""Requests to stop: a signal sets a flag, and the loop stops once all ranks have agreed."""

import os
import signal
import sys
import threading

from ganscale.errors import EXIT_INTERRUPTED

STOP_SIGNALS = (
    signal.SIGUSR1,  # time limit or preemption: SLURM sends what the batch script asks for,
    signal.SIGUSR2,  # and other schedulers these
    signal.SIGXCPU,
    signal.SIGTERM,  # scancel
    signal.SIGHUP,  # the terminal is gone
    signal.SIGINT,  # Ctrl-C
)

PARENT_PID = os.getppid()
"""The process that started this one; read early, before it can die."""


class StopRequest:
    """Set by the first request to stop; a second Ctrl-C ends the process at once."""

    def __init__(self) -> None:
        self._requested = threading.Event()

    @classmethod
    def on_signals(cls) -> "StopRequest":
        """Handles the signals from now on; call it before any other thread starts.

        Every thread blocks them, and a thread that does nothing else waits for them. So none is
        lost while torch is being imported, none interrupts a system call, and none reaches the
        processes that we start, which inherit the mask.
        """
        request = cls()
        signals = {*STOP_SIGNALS}
        for ignorable in (signal.SIGINT, signal.SIGHUP):  # by a shell's background job; by nohup
            if signal.getsignal(ignorable) == signal.SIG_IGN:
                signals.remove(ignorable)
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        threading.Thread(target=request._wait, args=[signals], name="stop", daemon=True).start()
        return request

    def is_requested(self) -> bool:
        return self._requested.is_set()

    def request(self) -> None:
        """Does what a signal would."""
        self._requested.set()

    def _wait(self, signals: set[signal.Signals]) -> None:
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
                        "\nstopping after this cycle with a checkpoint; "
                        "press Ctrl-C again to stop at once\n"
                    )
                    sys.stderr.flush()
