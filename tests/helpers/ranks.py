"""The ranks of one run without a launcher, as under srun: no launcher ends the others for them.

`benchmarks.ranks.run_ranks` calls a function on ranks and waits for them.
"""

import os
import subprocess
import sys

from benchmarks.ranks import environment_of, free_port
from tests.helpers.processes import REPOSITORY, end_tree
from tests.helpers.runs import Runs


class Ranks:
    """Ranks of the run `run`; what each prints goes to a file."""

    def __init__(self, runs: Runs, count: int, *settings: str, **environment: str) -> None:
        train = [sys.executable, str(REPOSITORY / "launch" / "train.py")]
        port = str(free_port())
        common = {**os.environ, "PYTHONPATH": str(REPOSITORY), **environment}
        self.folder = runs.folder / "run"
        self.outputs = [runs.folder / f"rank-{rank}.log" for rank in range(count)]
        self.processes: list[subprocess.Popen[str]] = []
        runs.folder.mkdir(exist_ok=True)
        for rank, output in enumerate(self.outputs):
            with output.open("w") as file:
                self.processes.append(
                    subprocess.Popen(
                        [*train, *runs.settings("run", *settings)],
                        stdout=file,
                        stderr=file,
                        text=True,
                        env={**common, **environment_of(rank, count, port)},
                    )
                )

    def exit_code(self, rank: int, seconds: float) -> int:
        return self.processes[rank].wait(timeout=seconds)

    def said(self, rank: int) -> str:
        return self.outputs[rank].read_text()

    def end(self) -> None:
        for process in self.processes:
            end_tree(process)
