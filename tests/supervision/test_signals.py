"""Signals that ask a real training to stop."""

import contextlib
import os
import pty
import signal
import subprocess

import pytest

from tests.distributed.test_resume import wait_for_checkpoints
from tests.helpers.processes import HANG_SECONDS, REPOSITORY, end_tree, wait_until
from tests.helpers.ranks import Ranks
from tests.helpers.runs import Runs

SAVES_OFTEN = "checkpoint.every_images=320"
NEVER_ENDS = ("training.total_images=1000M", SAVES_OFTEN)


def assert_saved_at_the_end(runs: Runs) -> None:
    newest = int(runs.checkpoints("run")[-1].name.removeprefix("images-"))
    assert newest == runs.summary("run")["images_seen"]


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR2, signal.SIGXCPU])
def test_signals_of_terminals_and_schedulers_stop_a_run_with_a_checkpoint(
    runs: Runs, number: signal.Signals
) -> None:
    ranks = Ranks(runs, 1, *NEVER_ENDS)
    try:
        wait_for_checkpoints(runs, "run", 1, ranks.processes[0])
        ranks.processes[0].send_signal(number)
        assert ranks.exit_codes(0) == [75]
    finally:
        ranks.end()
    assert_saved_at_the_end(runs)


def test_a_terminal_that_is_closed_stops_its_run_with_a_checkpoint(runs: Runs) -> None:
    """What the run still prints fails, since nobody is there to read it."""
    ours, theirs = pty.openpty()
    os.set_blocking(ours, False)
    command = ["setsid", "--ctty", "--wait", *runs.command("run", *NEVER_ENDS)]
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=one_thread()
    )
    os.close(theirs)

    def has_saved() -> bool:
        with contextlib.suppress(BlockingIOError):
            os.read(ours, 1 << 16)  # a terminal that nobody reads would block the run
        return bool(runs.checkpoints("run"))

    try:
        wait_until(has_saved, process=process)
        os.close(ours)
        assert process.wait(HANG_SECONDS) == 75
    finally:
        end_tree(process)
    assert_saved_at_the_end(runs)


def test_a_run_under_nohup_survives_its_terminal(runs: Runs) -> None:
    process = subprocess.Popen(
        [
            "nohup",
            *runs.command("run", "training.total_images=3200", "checkpoint.every_images=320"),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=one_thread(),
    )
    try:
        wait_for_checkpoints(runs, "run", 1, process)
        process.send_signal(signal.SIGHUP)
        output, _ = process.communicate(timeout=HANG_SECONDS)
    finally:
        end_tree(process)
    assert process.returncode == 0, output
    assert runs.summary("run")["images_seen"] == 3200


def one_thread() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
