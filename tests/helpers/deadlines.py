"""Deadlines that hold on a busy machine."""

import subprocess
import sys
import time

HANG_SECONDS = 300.0
"""More than anything takes where ten processes share a core: whatever takes longer hangs."""


def seconds_to_import_torch() -> float:
    """How fast this machine is right now: the wall time of a new Python process (1.5 s if idle)."""
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", "import torch"], timeout=HANG_SECONDS, check=True)
    return time.monotonic() - started
