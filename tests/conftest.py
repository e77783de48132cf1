"""What many tests share: real digits as shards, and real training processes."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from tests.helpers.preloaded import PreloadedProcess, stop_server

if TYPE_CHECKING:
    from ganscale.runtime import Runtime

REPOSITORY = Path(__file__).parent.parent

# A shell's background job ignores Ctrl-C, and so would all that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A whole run in a few seconds: the demo's networks, smaller, a row at every generator step, and no
# process for its data, which would take a second to start. Where that matters, tests ask for it.
TINY = [
    str(REPOSITORY / "configs" / "demo.yaml"),
    "generator.options.width=4",
    "critic.options.width=4",
    "objective.n_critic=2",
    "training.global_batch_size=16",
    "log.every_images=32",
    "log.wandb=disabled",
    "data.workers=0",
    "samples.count=4",
]


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled digits as five shards with their manifest."""
    from ganscale.shards.writing import write_shards

    folder = tmp_path_factory.mktemp("digits")
    write_shards("bundled:mnist", folder, shard_samples=1000)
    return folder


@pytest.fixture(scope="session")
def runtime() -> "Runtime":
    """This process as a run's only rank."""
    from ganscale.runtime import Runtime

    return Runtime.start()


@pytest.fixture(scope="session", autouse=True)
def preloaded_server() -> Iterator[None]:
    """Ends the server of preloaded processes, if a test has started it."""
    yield
    stop_server()


@pytest.fixture
def runs(tmp_path: Path, digits: Path) -> "Runs":
    return Runs(tmp_path / "runs", digits)


class Runs:
    """Starts training processes as a user would, in a folder of their own."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.folder = folder
        self._data = data

    def command(self, name: str, *settings: str, ranks: int = 1) -> list[str]:
        program = [sys.executable, "-m", "ganscale", "train"]
        if ranks > 1:
            program = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes"]
            program += [str(ranks), "--config_file", str(REPOSITORY / "launch" / "cpu.yaml")]
            program += ["--main_process_port", "0", str(REPOSITORY / "launch" / "train.py")]
        where = [f"run.folder={self.folder}", f"run.name={name}", f"data.path={self._data}"]
        return [*program, *TINY, *where, *settings]

    def start(self, name: str, *settings: str, ranks: int = 1) -> subprocess.Popen[str]:
        """One thread a rank: sums are in another order with another number of threads."""
        return subprocess.Popen(
            self.command(name, *settings, ranks=ranks),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def finish(
        self, name: str, *settings: str, ranks: int = 1, exit_code: int = 0, seconds: float = 120
    ) -> str:
        """Trains to the end; what the processes printed."""
        process = self.start(name, *settings, ranks=ranks)
        try:
            output, _ = process.communicate(timeout=seconds)
        finally:
            end_tree(process)
        assert process.returncode == exit_code, output
        return output

    def rows(self, name: str) -> list[dict]:
        """The rows of metrics.jsonl that have losses."""
        lines = (self.folder / name / "metrics.jsonl").read_text().splitlines()
        return [row for row in map(json.loads, lines) if "loss/critic" in row]

    def summary(self, name: str) -> dict:
        return json.loads((self.folder / name / "summary.json").read_text())

    def checkpoints(self, name: str) -> list[Path]:
        return sorted((self.folder / name / "checkpoints").glob("images-*"))


def end_tree(process: "subprocess.Popen[str] | PreloadedProcess") -> None:
    """Kills (-9) the process and all that it started: a launcher's ranks have sessions of their
    own, so a signal to the process group would miss them."""
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process.pid)
        for member in [parent, *parent.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
    process.wait()
