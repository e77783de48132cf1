"""Jobs on the throw-away cluster, their logs and their runs."""

import json
import time
from collections.abc import Callable
from pathlib import Path

from tests.helpers.processes import HANG_SECONDS, REPOSITORY
from tests.helpers.runs import TINY
from tests.slurm.cluster import Cluster


class Jobs:
    """Jobs on CPUs, with their logs and runs in the test's folder."""

    def __init__(self, cluster: Cluster, folder: Path, data: Path) -> None:
        self.cluster = cluster
        self.folder = folder
        self._where = [f"data.path={data}", f"run.folder={folder}"]

    def submit(self, script: str, *arguments: str, options: str = "", **environment: str) -> str:
        """Submits `slurm/SCRIPT ARGUMENTS`, by default with one task a node; the job's number. A
        whole path is submitted as it is."""
        small = "--ntasks-per-node=1 --gpus-per-node=0 --cpus-per-task=1"
        given = [f"--output={self.folder}/%j.log", *small.split(), *options.split()]
        command = [*given, str(Path("slurm") / script), *arguments]
        return self.cluster.submit(*command, folder=REPOSITORY, **environment)

    def train(self, script: str, *settings: str, options: str = "", **environment: str) -> str:
        """The number of a job that trains small networks on digits."""
        given = [*TINY, "data.workers=2", *self._where, *settings]
        return self.submit(script, *given, options=options, **environment)

    def sweep(self, lines: str, *settings: str, options: str) -> str:
        """The number of the array that trains with each line of the file `lines`."""
        given = [lines, *TINY, "data.workers=2", *self._where, *settings]
        return self.submit("sweep.sbatch", *given, options=options)

    def stand_in(self, code: str) -> str:
        """A value of GANSCALE_CONTAINER that runs bash `code` instead of a rank and accepts any
        settings: to test the batch scripts alone, in a second instead of ten."""
        script = self.folder / "stand-in"
        script.write_text(f"#!/bin/bash\n[[ $1 != ganscale ]] || exit 0\n{code}\n")
        script.chmod(0o755)
        return str(script)

    def log(self, job: str) -> str:
        path = self.folder / f"{job}.log"
        return path.read_text() if path.exists() else ""

    def last_words(self, job: str) -> list[str]:
        """The batch script's last message in each attempt."""
        lines = [line.partition(f" job {job}: ")[2] for line in self.log(job).splitlines()]
        return [line for line in lines if line and not line.startswith(("attempt", "asking"))]

    def history(self, job: str) -> Path:
        return self.folder / f"{job}-ranks" / f"history-{job}-throwaway"

    def rank_log(self, job: str, name: str) -> str:
        return (self.folder / f"{job}-ranks" / f"{name}.log").read_text()

    def run_folder(self, name: str = "run") -> Path:
        return self.folder / name

    def summary(self, name: str = "run") -> dict:
        return json.loads((self.run_folder(name) / "summary.json").read_text())

    def wait_until(self, job: str, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + HANG_SECONDS
        while not condition():
            assert time.monotonic() < deadline, self.log(job)
            time.sleep(0.02)

    def wait_for_training(self, job: str, name: str = "run") -> None:
        """Until the run has a row of losses."""
        rows = self.run_folder(name) / "metrics.jsonl"
        self.wait_until(job, lambda: rows.exists() and "loss/critic" in rows.read_text())

    def wait_for_a_checkpoint(self, job: str) -> None:
        folder = self.run_folder() / "checkpoints"
        self.wait_until(job, lambda: any(folder.glob("images-*")))
