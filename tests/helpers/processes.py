"""Processes that a test starts, waits for and ends."""

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import psutil

REPOSITORY = Path(__file__).parent.parent.parent

HANG_SECONDS = 300.0
"""More than anything takes where ten processes share a core: whatever takes longer hangs."""


class Process(Protocol):
    pid: int

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...


def seconds_to_import_torch() -> float:
    """How fast this machine is right now: the wall time of a new Python process (1.5 s if idle)."""
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", "import torch"], timeout=HANG_SECONDS, check=True)
    return time.monotonic() - started


def end_tree(process: Process) -> None:
    """Kills (-9) the process and its descendants: a launcher's ranks have their own sessions, so a
    signal to the process group would miss them."""
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process.pid)
        for member in [parent, *parent.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
    process.wait()


def wait_until(
    condition: Callable[[], object],
    seconds: float = HANG_SECONDS,
    *,
    process: Process | None = None,
    interval: float = 0.01,
) -> None:
    """Polls `condition`; fails after `seconds`, or when `process` has ended first."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, f"it ended too early: {_output(process)}"
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(interval)


def blocks(process: Process, number: signal.Signals) -> bool:
    """Whether the process has blocked the signal, so that it waits to be handled."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return False
    mask = next(line.split()[1] for line in status.splitlines() if line.startswith("SigBlk"))
    return bool(int(mask, 16) >> (number - 1) & 1)


def _output(process: Process) -> str:
    if isinstance(process, subprocess.Popen):
        return process.stdout.read() if process.stdout else ""
    printed = getattr(process, "printed", str)
    return printed()


def run_python(
    *arguments: str, seconds: float = HANG_SECONDS, **options
) -> subprocess.CompletedProcess[str]:
    """`python ARGUMENTS` in the repository, with its output; fails unless it exits with 0."""
    options = {"cwd": REPOSITORY, "timeout": HANG_SECONDS, **options}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return done
