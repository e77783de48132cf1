"""`make demo` on a terminal."""

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

from tests.helpers.processes import REPOSITORY


def test_a_demo_that_ctrl_c_stops_does_not_end_with_an_error_of_make(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(REPOSITORY / name, tmp_path)
    shutil.copytree(REPOSITORY / "configs", tmp_path / "configs")
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / ".installed").touch()
    spawn = [sys.executable, "-c", "import pty, sys; pty.spawn(sys.argv[1:])"]
    process = subprocess.Popen(
        [*spawn, "make", "demo", f"BIN={Path(sys.executable).parent}"],
        cwd=tmp_path,
        env={**os.environ, "WANDB_MODE": "disabled"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    timer = threading.Timer(300, process.kill)
    timer.start()
    assert process.stdin is not None
    assert process.stdout is not None
    printed = ""
    try:
        for line in process.stdout:
            printed += line.decode()
            if b"starts at 0" in line:
                process.stdin.write(b"\x03")  # Ctrl-C
                process.stdin.flush()
        process.wait()
    finally:
        timer.cancel()
        process.kill()
        process.stdin.close()
        process.stdout.close()
    assert "the same command continues" in printed
    assert "make: ***" not in printed
    assert "Traceback" not in printed
