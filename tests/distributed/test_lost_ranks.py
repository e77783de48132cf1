"""A rank that is killed, stopped, stuck or wrong is named, and ends its run.

Every wait here is shorter than the limits of the run and its collectives (600 s), unless a test
sets them: so ranks that leave in time leave because of the watchdog.
"""

import signal
import socket
from pathlib import Path

import psutil
import pytest

from tests.distributed.test_resume import wait_for_checkpoints
from tests.helpers.processes import (
    HANG_SECONDS,
    blocks,
    end_tree,
    seconds_to_import_torch,
    wait_until,
)
from tests.helpers.ranks import Ranks
from tests.helpers.runs import Runs

HOST = socket.gethostname()
NEVER_ENDS = ("training.total_images=1000M", "checkpoint.every_images=320", "data.workers=2")
MISBEHAVES = (*NEVER_ENDS, "critic.target=tests.distributed.misbehaving:Critic")


def short_limit() -> tuple[str, str]:
    """Settings that end a run soon, but never one that is merely slow: starting the process for
    its data takes about as long as importing torch, any other stage takes less."""
    return f"runtime.timeout_seconds={4 * seconds_to_import_torch():.1f}", "data.retry_seconds=1"


def last_error(ranks: Ranks, rank: int) -> str:
    """The end of what a rank printed: its main thread may have been in the middle of a line."""
    return "error: " + ranks.printed(rank).splitlines()[-1].rpartition("error: ")[2]


def test_the_others_leave_when_a_rank_is_killed_and_say_which(
    runs: Runs, started: list[Ranks], tmp_path: Path
) -> None:
    history = tmp_path / "history"
    ranks = Ranks(runs, 3, "training.global_batch_size=24", *NEVER_ENDS,
                  GANSCALE_JOB_HISTORY_FILE=str(history))  # fmt: skip
    started.append(ranks)
    wait_for_checkpoints(runs, "run", 2, ranks.processes[0])
    ranks.processes[2].kill()
    assert ranks.exit_codes(0, 1) == [76, 76]
    last = last_error(ranks, 0)
    assert last.startswith(f"error: rank 2 on {HOST} was lost: the process died in `")
    assert "Traceback" not in ranks.printed(0) + ranks.printed(1)
    assert history.read_text().splitlines()[0] == "started 0"
    assert history.read_text().splitlines()[-1] == f"ended 76 {last.removeprefix('error: ')}"
    assert last.removeprefix("error: ") in (ranks.folder / "log.txt").read_text()


def test_the_others_leave_when_rank_0_is_killed(runs: Runs, started: list[Ranks]) -> None:
    ranks = Ranks(runs, 2, *NEVER_ENDS)
    started.append(ranks)
    wait_for_checkpoints(runs, "run", 2, ranks.processes[0])
    ranks.processes[0].kill()
    assert ranks.exit_codes(1) == [76]
    last = last_error(ranks, 1)
    assert last.startswith(f"error: rank 0 on {HOST} was lost: the process died in `")
    runs.finish("run", "checkpoint.every_images=320", "training.total_images=1280")  # on one


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_rank_whose_process_is_stopped_ends_the_run(
    runs: Runs, started: list[Ranks], stopped: int
) -> None:
    ranks = Ranks(runs, 2, *NEVER_ENDS, *short_limit())
    started.append(ranks)
    wait_for_checkpoints(runs, "run", 2, ranks.processes[0])
    ranks.processes[stopped].send_signal(signal.SIGSTOP)
    other = 1 - stopped
    assert ranks.exit_codes(other) == [76]
    last = last_error(ranks, other)
    assert last.startswith(f"error: rank {stopped} on {HOST} was lost: no sign of life for ")
    stacks = (ranks.folder / "stacks" / f"rank-{other:04d}.txt").read_text()
    assert "trainer.py" in stacks  # what its main thread was waiting in


def test_a_rank_that_hangs_is_distinguished_from_those_that_wait_for_it(
    runs: Runs, started: list[Ranks]
) -> None:
    ranks = Ranks(runs, 2, *MISBEHAVES, *short_limit(), MISBEHAVE="1:hang")
    started.append(ranks)
    assert ranks.exit_codes(0, 1) == [76, 76]
    stacks = (ranks.folder / "stacks" / "rank-0000.txt").read_text()
    said = last_error(ranks, 0)
    assert said.startswith(f"error: rank 1 on {HOST} hangs: in `"), stacks
    assert "misbehaving.py" in (ranks.folder / "stacks" / "rank-0001.txt").read_text()
    assert "Traceback" not in ranks.printed(0) + ranks.printed(1)


def test_a_run_on_one_rank_does_not_hang_for_ever(runs: Runs, started: list[Ranks]) -> None:
    ranks = Ranks(runs, 1, *MISBEHAVES, *short_limit(), MISBEHAVE="0:hang")
    started.append(ranks)
    assert ranks.exit_codes(0) == [76]
    assert "hangs: in `" in last_error(ranks, 0)
    assert "misbehaving.py" in (ranks.folder / "stacks" / "rank-0000.txt").read_text()


def test_an_error_on_one_rank_ends_all_with_its_message(runs: Runs, started: list[Ranks]) -> None:
    ranks = Ranks(runs, 2, *MISBEHAVES, MISBEHAVE="1:fail")
    started.append(ranks)
    assert ranks.exit_codes(0, 1) == [2, 2]
    sentence = "Critic fails in its forward: RuntimeError: the weights of this rank are tired ("
    assert sentence in last_error(ranks, 0)
    assert "Traceback" not in ranks.printed(0)


def test_a_mistake_is_reported_once_for_all_ranks(runs: Runs, started: list[Ranks]) -> None:
    ranks = Ranks(runs, 2, "training.global_batch_size=15")
    started.append(ranks)
    assert ranks.exit_codes(0, 1) == [2, 2]
    assert ranks.printed(0).startswith(
        "error: `training.global_batch_size` of 15 cannot be divided"
    )
    assert ranks.printed(1) == ""


def test_ranks_whose_launcher_was_killed_save_and_leave(runs: Runs) -> None:
    process = runs.start("run", *NEVER_ENDS, ranks=2)
    ranks: list[psutil.Process] = []
    try:
        wait_for_checkpoints(runs, "run", 2, process)
        ranks = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        _, alive = psutil.wait_procs(ranks, timeout=HANG_SECONDS)
    finally:
        for rank in ranks:
            if rank.is_running():
                rank.kill()
        end_tree(process)
        process.communicate()
    assert alive == []
    assert runs.summary("run")["exit_code"] == 75
    newest = int(runs.checkpoints("run")[-1].name.removeprefix("images-"))
    assert newest == runs.summary("run")["images_seen"]


def test_a_signal_during_the_start_is_not_lost(runs: Runs) -> None:
    process = runs.start("run", *NEVER_ENDS)
    try:
        wait_until(lambda: blocks(process, signal.SIGUSR1), process=process, interval=0.001)
        process.send_signal(signal.SIGUSR1)  # torch is not even imported yet
        output, _ = process.communicate(timeout=HANG_SECONDS)
    finally:
        end_tree(process)
    assert process.returncode == 75, output
    assert "stopped on request at 0 images" in output


def test_a_second_ctrl_c_leaves_in_the_middle_of_a_step(runs: Runs, started: list[Ranks]) -> None:
    ranks = Ranks(runs, 1, *MISBEHAVES, MISBEHAVE="0:hang")
    started.append(ranks)
    process = ranks.processes[0]
    wait_until(lambda: "misbehaves now" in process.printed(), process=process)
    process.send_signal(signal.SIGINT)
    wait_until(lambda: "press Ctrl-C again to stop at once" in process.printed(), process=process)
    process.send_signal(signal.SIGINT)
    assert ranks.exit_codes(0) == [130]
