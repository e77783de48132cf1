"""The processes of one session of a run, started as a batch script would."""

import contextlib
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from benchmarks.ranks import environment_of, free_port
from ganscale.supervision.job_history import JOB_HISTORY_FILE

REPOSITORY = Path(__file__).parents[2]
HOST = socket.gethostname()
_MARK = "GANSCALE_FAULTS_SESSION"


class NotSurvived(Exception):
    """A promise is broken after a fault; the message says which."""


class RunOver(Exception):
    """The run is done."""


def wait_until(
    condition: Callable[[], object], seconds: float, problem: Callable[[], str], every: float = 0.01
) -> None:
    """Checks `every` so often, in seconds. Raises NotSurvived with the problem after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise NotSurvived(f"{problem()} within {seconds:.0f} s")
        time.sleep(every)


class Session:
    """One session. When a rank ends, only `accelerate launch` ends the others."""

    def __init__(
        self, folder: Path, settings: Sequence[str], ranks: int, is_launched: bool = False
    ) -> None:
        """folder: a new one, for the output of the processes"""
        folder.mkdir(parents=True)
        self.ranks = ranks
        self.is_launched = is_launched
        self.folder = folder
        self._job_history = folder / "job-history"
        self._mark = secrets.token_hex(8)
        self._outputs = [folder / f"{i}.log" for i in range(1 if is_launched else ranks)]
        program = [str(REPOSITORY / "launch" / "train.py"), *settings]
        port = str(free_port())
        common = {**os.environ, "PYTHONPATH": str(REPOSITORY), _MARK: self._mark}
        common |= {"OMP_NUM_THREADS": "1"}
        self.started: list[subprocess.Popen[bytes]] = []
        if is_launched:
            launcher = ["-m", "accelerate.commands.launch", "--num_processes", str(ranks)]
            launcher += ["--config_file", str(REPOSITORY / "launch" / "cpu.yaml")]
            launcher += ["--main_process_port", "0"]
            self._start([*launcher, *program], common | {JOB_HISTORY_FILE: str(self._job_history)})
        else:
            for rank in range(ranks):
                self._start(program, common | environment_of(rank, ranks, port))

    def _start(self, arguments: Sequence[str], environment: dict[str, str]) -> None:
        with self._outputs[len(self.started)].open("wb") as output:
            self.started.append(
                subprocess.Popen(
                    [sys.executable, *arguments],
                    cwd=self._outputs[0].parent,
                    env=environment,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )

    def output(self, rank: int = 0) -> str:
        file = self._outputs[0 if self.is_launched else rank]
        return file.read_text(errors="replace")

    def images_seen(self) -> int | None:
        """According to its newest row; None before the first."""
        rows = re.findall(r"^([\d,]+) of [\d,]+ images, ", self.output(), re.MULTILINE)
        return int(rows[-1].replace(",", "")) if rows else None

    def processes(self) -> list[psutil.Process]:
        """All that are alive, even if their parent has changed."""
        processes = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.environ().get(_MARK) == self._mark:
                    processes.append(process)
        return processes

    def rank(self, number: int, *, loader: bool = False) -> psutil.Process | None:
        """The process of a rank, or its loader process; None if there is none."""
        for process in self.processes():
            with contextlib.suppress(psutil.Error, OSError):
                if loader != any(
                    "ganscale.data.loader_worker" in word for word in process.cmdline()
                ):
                    continue
                if self.ranks == 1 or process.environ().get("RANK") == str(number):
                    return process
        return None

    def all_ranks(self) -> list[psutil.Process]:
        return [rank for rank in map(self.rank, range(self.ranks)) if rank is not None]

    def is_over(self) -> bool:
        return all(process.poll() is not None for process in self.started)

    def wait_for_start(self, condition: Callable[[], object], seconds: float) -> None:
        """Waits for `condition`. Raises RunOver if the run is done before, and NotSurvived if the
        session ends otherwise."""

        def happened() -> bool:
            if condition():
                return True
            if self.is_over():
                if [process.returncode for process in self.started] == [0] * len(self.started):
                    raise RunOver
                raise NotSurvived(f"it ended by itself: {self.ending()}")
            return False

        wait_until(happened, seconds, lambda: "it made no progress")

    def ending(self) -> str:
        """The exit codes and last lines of its processes."""
        codes = [process.poll() for process in self.started]
        last = [text.splitlines()[-1:] for text in map(self.output, range(len(self.started)))]
        return f"codes {codes}, last lines {[line for lines in last for line in lines]}"

    def _staying(self) -> str:
        pids = [process.pid for process in self.processes()]
        return f"processes {pids} did not leave ({self.ending()})"

    def wait_for_end(self, seconds: float) -> None:
        """Waits until all its processes are gone. Raises NotSurvived if one stays."""
        wait_until(self.is_over, seconds, self._staying)
        wait_until(lambda: not self.processes(), seconds, self._staying, every=0.1)

    def expect_end(self, code: int, seconds: float, *, victims: Sequence[int] = ()) -> str:
        """Waits until all but the `victims` have ended with this exit code.

        Returns the error message. Raises NotSurvived.
        """
        others = [p for rank, p in enumerate(self.started) if rank not in victims]
        if self.is_launched:
            others = self.started
        wait_until(lambda: None not in [p.poll() for p in others], seconds, self._staying)
        if self.is_launched:
            return self._expect_in_job_history(code)
        codes = [process.returncode for process in others]
        if codes != [code] * len(others):
            raise NotSurvived(f"it did not end with {code}: {self.ending()}")
        text = "".join(self.output(rank) for rank in range(self.ranks) if rank not in victims)
        lines = [line for line in text.splitlines() if line.startswith("error: ")]
        return lines[-1].removeprefix("error: ") if lines else ""

    def _expect_in_job_history(self, code: int) -> str:
        lines = self._job_history.read_text().splitlines() if self._job_history.exists() else []
        last = lines[-1] if lines else "nothing"
        if not last.startswith(f"ended {code} "):
            raise NotSurvived(f"its job history does not end with code {code}, but with {last!r}")
        return last.removeprefix(f"ended {code} ")

    def kill(self) -> None:
        """Kills all its processes with -9, like a power failure."""
        while processes := self.processes():  # a launcher may start one meanwhile
            for process in processes:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            time.sleep(0.01)
        for process in self.started:
            process.wait()

    def blocks(self, number: signal.Signals) -> bool:
        """Whether the program runs in every rank and takes the signal as a request to stop."""
        ranks = self.all_ranks()
        return len(ranks) == self.ranks and all(_blocks(rank.pid, number) for rank in ranks)


def _blocks(pid: int, number: signal.Signals) -> bool:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        mask = next(line.split()[1] for line in lines if line.startswith("SigBlk"))
        return bool(int(mask, 16) >> (number - 1) & 1)
    return False
