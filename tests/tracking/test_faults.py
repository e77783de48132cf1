"""When W&B fails, training continues, ends in time and loses nothing; `sync` sends the rest."""

import contextlib
import signal
import time
from subprocess import Popen

import psutil
import pytest

from tests.helpers.disks import small_disk
from tests.helpers.processes import seconds_to_import_torch
from tests.tracking.sessions import (
    DEADLINE_SECONDS,
    RUN_ID,
    end,
    go_on,
    recorded_steps,
    start,
    steps,
    synchronize,
    wait_until,
    wait_until_paused,
)
from tests.tracking.wandb_server import WandbServer

LAST_STEP = 30
FINISH_SECONDS = 5


def paused(environment, run_folder, mode="auto", finish_seconds=FINISH_SECONDS) -> Popen[str]:
    """A session that has logged 15 of its rows, and goes on when it is ended."""
    process = start(
        environment,
        run_folder=run_folder,
        mode=mode,
        first_step=1,
        last_step=LAST_STEP,
        pause_at=15,
        finish_seconds=finish_seconds,
    )
    wait_until_paused(process)
    return process


def is_quick(seconds: float) -> bool:
    """A second at most, or on a busy machine what it takes right now to import torch."""
    return seconds < 1 or seconds < seconds_to_import_torch()


def services(process: Popen[str]) -> list[psutil.Process]:
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if "wandb-core" in child.name()]


def is_streaming(server: WandbServer) -> bool:
    """Rows follow the client's first message in intervals of 15 s, and when it ends."""
    return server.requests["file_stream"] > 0


def sent(server: WandbServer, name: str = "loss/critic") -> list[int]:
    return steps(server.runs[RUN_ID].history, name) if RUN_ID in server.runs else []


def expect_all_rows_once(server: WandbServer) -> None:
    assert sent(server) == list(range(1, LAST_STEP + 1))
    assert sent(server, "logits/wasserstein") == sent(server, "samples/images") == [10, 20, 30]


@pytest.mark.parametrize("fault", [401, 429, 503, "hang", "dead"])
def test_a_server_that_fails_at_the_start(fault, with_account, run_folder, server):
    if fault == "dead":
        server.stop()
    server.fault = lambda path: None if fault == "dead" else fault
    process = paused(with_account, run_folder)
    outcome = end(process)
    assert is_quick(outcome["start_seconds"])
    assert is_quick(outcome["finish_seconds"] - FINISH_SECONDS)
    assert outcome["output"].count("ganscale sync") == 1
    assert recorded_steps(run_folder) == list(range(1, LAST_STEP + 1))
    assert not sent(server)


@pytest.mark.parametrize("fault", [403, 429, "hang", "dead"])
def test_a_server_that_fails_in_the_middle(fault, with_account, run_folder, server):
    process = paused(with_account, run_folder)
    wait_until(lambda: is_streaming(server), "a connected client")
    if fault == "dead":
        server.stop()
    server.fault = lambda path: None if fault == "dead" else fault
    outcome = end(process)
    assert is_quick(outcome["finish_seconds"] - FINISH_SECONDS)
    assert outcome["output"].count("ganscale sync") == 1
    assert recorded_steps(run_folder) == list(range(1, LAST_STEP + 1))

    server.fault = lambda path: None
    if fault == "dead":
        server.start()
    assert synchronize(with_account, run_folder)["rows"] == LAST_STEP + 6
    expect_all_rows_once(server)


def test_a_server_that_comes_back_gets_all_rows_within_the_session(
    with_account, run_folder, server
):
    server.stop()
    process = paused(with_account, run_folder, finish_seconds=DEADLINE_SECONDS // 2)
    time.sleep(1)
    # The client gives rows up when they are refused, and does not say so.
    server.fault = lambda path: 403 if path.endswith("file_stream") else None
    server.start()
    wait_until(lambda: server.requests["file_stream"] > 0, "refused rows")
    server.fault = lambda path: None
    outcome = end(process)
    assert outcome["output"].count("W&B gets no rows") == 1
    expect_all_rows_once(server)


def test_a_server_that_dies_after_the_last_row(with_account, run_folder, server):
    server.fault = lambda path: 503 if server.requests["file_stream"] > 1 else None
    process = paused(with_account, run_folder)
    outcome = end(process)
    assert is_quick(outcome["finish_seconds"] - FINISH_SECONDS)
    server.fault = lambda path: None
    synchronize(with_account, run_folder)
    expect_all_rows_once(server)
    assert server.runs[RUN_ID].exit_code == 1  # there is no summary that says otherwise


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_service_that_dies_or_hangs(number, with_account, run_folder, server):
    process = paused(with_account, run_folder)
    wait_until(lambda: is_streaming(server), "a connected client")
    (service,) = services(process)
    service.send_signal(number)
    outcome = end(process)
    with contextlib.suppress(psutil.NoSuchProcess):
        service.kill()
    assert is_quick(outcome["finish_seconds"] - FINISH_SECONDS)
    assert recorded_steps(run_folder) == list(range(1, LAST_STEP + 1))
    synchronize(with_account, run_folder)
    expect_all_rows_once(server)


def test_a_disk_that_is_full_for_a_while(with_account, run_folder, server):
    with small_disk(run_folder, "400k"):
        process = start(
            with_account,
            run_folder=run_folder,
            mode="auto",
            first_step=1,
            last_step=LAST_STEP,
            pause_at=15,
            pause_again_at=25,
            evaluation_interval=0,
        )
        wait_until_paused(process)
        wait_until(lambda: is_streaming(server), "a connected client")
        ballast = run_folder / "ballast"
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while file.write(b"0" * 512):
                pass
        go_on(process)
        wait_until_paused(process)
        ballast.unlink()
        end(process)
        assert recorded_steps(run_folder) == list(range(1, LAST_STEP + 1))
        synchronize(with_account, run_folder)
        assert sent(server) == list(range(1, LAST_STEP + 1))


def test_rows_of_a_training_that_is_killed_are_sent_after_its_death(
    with_account, run_folder, server
):
    process = paused(with_account, run_folder, finish_seconds=DEADLINE_SECONDS // 2)
    (uploader,) = psutil.Process(process.pid).children()
    process.kill()
    process.communicate(timeout=DEADLINE_SECONDS)
    psutil.wait_procs([uploader], timeout=DEADLINE_SECONDS)
    assert not uploader.is_running()
    assert sent(server) == list(range(1, 16))
    assert server.runs[RUN_ID].exit_code == 1


def test_an_uploader_that_dies_is_logged_once(with_account, run_folder, server):
    process = paused(with_account, run_folder)
    for child in psutil.Process(process.pid).children():
        child.kill()
    outcome = end(process)
    assert outcome["output"].count("W&B is off") == 1
    assert recorded_steps(run_folder) == list(range(1, LAST_STEP + 1))
