"""Training processes that are forked from a process which has imported torch: each saves three
seconds, most of what a tiny run takes."""

import atexit
import contextlib
import multiprocessing
import os
import runpy
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path

_PRELOADED = [
    "accelerate",
    "jaxtyping",
    "omegaconf",
    "PIL.PngImagePlugin",
    "safetensors.torch",
    "torch._dynamo",
    "torch.distributed.tensor",
    "webdataset",
]


class PreloadedProcess:
    """`python SCRIPT ARGUMENTS`, with the methods of `subprocess.Popen`; it prints into a file."""

    def __init__(
        self, script: Path, arguments: Sequence[str], environment: Mapping[str, str], output: Path
    ) -> None:
        """`environment` must not be about what torch reads at import, such as OMP_NUM_THREADS."""
        output.write_bytes(b"")
        self._output = output
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        _start_server()
        self._process = context.Process(
            target=_run, args=[str(script), [*arguments], {**environment}, str(output)]
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self._output.name, timeout or 0.0, self.read().encode())
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        self.wait(timeout)
        return self.read(), None

    def read(self) -> str:
        """What it has printed so far."""
        return self._output.read_text()

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()


def stop_server() -> None:
    """Ends the process that others are forked from; else it lives as long as this one."""
    forkserver._forkserver._stop()  # type: ignore[attr-defined]


def _start_server() -> None:
    """With one thread for each rank, whatever the tests' own process uses."""
    with _environment(OMP_NUM_THREADS="1"):
        forkserver.ensure_running()


@contextlib.contextmanager
def _environment(**values: str):
    before = {**os.environ}
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _run(script: str, arguments: list[str], environment: dict[str, str], output: str) -> None:
    os.environ.clear()
    os.environ.update(environment)
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(script, run_name="__main__")
    except Exception:
        traceback.print_exc()
        sys.exit(1)
    finally:
        atexit._run_exitfuncs()
