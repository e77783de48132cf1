"""Processes that a test starts, waits for and ends."""

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).parent.parent.parent


def end_tree(process: subprocess.Popen) -> None:
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
    seconds: float = 20,
    *,
    process: subprocess.Popen | None = None,
    interval: float = 0.01,
) -> None:
    """Polls `condition`; fails after `seconds`, or when `process` has ended first."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, "the process ended too early"
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(interval)


def run_python(*arguments: str, seconds: float = 60, **options) -> subprocess.CompletedProcess[str]:
    """`python ARGUMENTS` in the repository, with its output; fails unless it exits with 0."""
    options = {"cwd": REPOSITORY, **options}
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=seconds, **options
    )
    assert done.returncode == 0, done.stderr
    return done
