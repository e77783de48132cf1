"""Training processes that are forked from a process which has imported torch: each saves three
seconds, most of what a tiny run takes."""

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest

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
    """`python SCRIPT ARGUMENTS`, with methods as `subprocess.Popen` has them."""

    def __init__(
        self, script: Path, arguments: Sequence[str], environment: Mapping[str, str]
    ) -> None:
        """`environment` comes too late for what torch reads at import, such as OMP_NUM_THREADS."""
        self._output = tempfile.NamedTemporaryFile()  # noqa: SIM115 (closed with this object)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        _start_server()
        self._process = context.Process(
            target=_run, args=[str(script), [*arguments], {**environment}, self._output.name]
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
            raise subprocess.TimeoutExpired("python", timeout or 0.0, self.printed().encode())
        return self.returncode

    def printed(self) -> str:
        """Its stdout and stderr so far."""
        return Path(self._output.name).read_text()

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()


def stop_server() -> None:
    """Ends the process that the others are forked from; otherwise it lives as long as this one."""
    server: Any = vars(forkserver)["_forkserver"]
    if server._forkserver_pid is not None:
        os.kill(server._forkserver_pid, signal.SIGKILL)  # to end without torch's clean-up
        server._stop()


def _start_server() -> None:
    """With one thread for each process that it forks, whatever the tests' own process uses, and
    without CUDA, which no process could use that is forked after its start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
        forkserver.ensure_running()


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
