"""The ranks of one run without a launcher, as under srun: no launcher ends the others for them.

`benchmarks.ranks.run_ranks` calls a function on ranks and waits for them.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.ranks import environment_of, free_port
from tests.helpers.preloaded import PreloadedProcess
from tests.helpers.processes import HANG_SECONDS, REPOSITORY, end_tree

if TYPE_CHECKING:
    from tests.helpers.runs import Runs


class Ranks:
    """started: which of the ranks are started; all of them by default
    command: the arguments of `script`, by default those that train
    """

    def __init__(
        self,
        runs: "Runs",
        count: int,
        *settings: str,
        name: str = "run",
        started: Sequence[int] | None = None,
        script: Path = REPOSITORY / "launch" / "train.py",
        command: Sequence[str] | None = None,
        **environment: str,
    ) -> None:
        port = str(free_port())
        common = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        self.folder = runs.folder / name
        self.processes = [
            PreloadedProcess(
                script,
                runs.settings(name, *settings) if command is None else command,
                {**common, **environment_of(rank, count, port), **environment},
            )
            for rank in (range(count) if started is None else started)
        ]

    def exit_codes(self, *ranks: int) -> list[int]:
        return [self.processes[rank].wait(timeout=HANG_SECONDS) for rank in ranks]

    def printed(self, rank: int) -> str:
        return self.processes[rank].printed()

    def end(self) -> None:
        for process in self.processes:
            end_tree(process)
