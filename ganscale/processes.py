"""What this process asks of the kernel about processes that it starts or was started by."""

import contextlib
import ctypes
import signal
from pathlib import Path

_PR_SET_PDEATHSIG = 1  # of Linux's prctl.h


def resume_when_parent_dies() -> None:
    """Continues this process, if it is stopped (SIGSTOP) by the time at which its parent dies: to
    notice the death and end, too. Does nothing where there is no prctl."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGCONT), 0, 0, 0)


def is_stopped(pid: int) -> bool:
    """Whether the process is stopped by a signal; False if that is not known."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] == "T"
