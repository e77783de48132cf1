"""Jobs on the throw-away cluster, and what tests ask of them."""

import json
import time
from collections.abc import Callable
from pathlib import Path

from cluster import Cluster

from tests.helpers.processes import REPOSITORY
from tests.helpers.runs import TINY


class Jobs:
    """Jobs on CPUs, with their logs and their runs in a folder of the test's."""

    def __init__(self, cluster: Cluster, folder: Path, data: Path) -> None:
        self.cluster = cluster
        self.folder = folder
        self._where = [f"data.path={data}", f"run.folder={folder}"]

    def submit(self, script: str, *arguments: str, options: str = "", **environment: str) -> str:
        """The number of the job of one task a node, if `options` of sbatch do not say otherwise.

        `arguments` are the script's, which lies in slurm/ and knows it.
        """
        small = "--ntasks-per-node=1 --gpus-per-node=0 --cpus-per-task=1"
        given = [f"--output={self.folder}/%j.log", *small.split(), *options.split()]
        command = [*given, f"slurm/{script}", *arguments]
        return self.cluster.submit(*command, folder=REPOSITORY, **environment)

    def train(self, script: str, *settings: str, options: str = "", **environment: str) -> str:
        """The number of a job that trains small networks on digits."""
        given = [*TINY, "data.workers=2", *self._where, *settings]
        return self.submit(script, *given, options=options, **environment)

    def sweep(self, lines: str, *settings: str, options: str) -> str:
        """The number of the array that trains so with what stands on each line."""
        given = [lines, *TINY, "data.workers=2", *self._where, *settings]
        return self.submit("sweep.sbatch", *given, options=options)

    def stand_in(self, does: str) -> str:
        """A value of GANSCALE_CONTAINER that runs bash's `does` in the place of a rank, and takes
        any settings: for what the batch scripts do, in a second instead of ten."""
        script = self.folder / "stand-in"
        script.write_text(f"#!/bin/bash\n[[ $1 != ganscale ]] || exit 0\n{does}\n")
        script.chmod(0o755)
        return str(script)

    def log(self, job: str) -> str:
        path = self.folder / f"{job}.log"
        return path.read_text() if path.exists() else ""

    def last_words(self, job: str) -> list[str]:
        """What the batch script said at the end of each attempt."""
        lines = [line.partition(f" job {job}: ")[2] for line in self.log(job).splitlines()]
        return [line for line in lines if line and not line.startswith(("attempt", "asks"))]

    def rank_log(self, job: str, name: str) -> str:
        return (self.folder / f"{job}-ranks" / f"{name}.log").read_text()

    def run_folder(self, name: str = "run") -> Path:
        return self.folder / name

    def summary(self, name: str = "run") -> dict:
        return json.loads((self.run_folder(name) / "summary.json").read_text())

    def wait_until(self, job: str, is_so: Callable[[], bool], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not is_so():
            assert time.monotonic() < deadline, self.log(job)
            time.sleep(0.02)

    def wait_for_training(self, job: str, name: str = "run") -> None:
        """Until the run has a row of losses."""
        rows = self.run_folder(name) / "metrics.jsonl"
        self.wait_until(job, lambda: rows.exists() and "loss/critic" in rows.read_text())

    def wait_for_a_checkpoint(self, job: str) -> None:
        folder = self.run_folder() / "checkpoints"
        self.wait_until(job, lambda: any(folder.glob("images-*")))
