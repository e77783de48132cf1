"""Ranks that do not come, or cannot belong together, are named before a process group is formed."""

import signal
import socket
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.ranks import free_port
from tests.helpers.preloaded import PreloadedProcess
from tests.helpers.processes import blocks, seconds_to_import_torch, wait_until
from tests.helpers.ranks import Ranks
from tests.helpers.runs import Runs

HOST = socket.gethostname()


def test_a_rank_that_never_joins_is_named_within_the_limit_for_joining(
    runs: Runs, started: list[Ranks], tmp_path: Path
) -> None:
    history, limit = tmp_path / "history", round(4 * seconds_to_import_torch())
    ranks = Ranks(runs, 4, f"runtime.join_timeout_seconds={limit}", started=[0, 2],
                  GANSCALE_JOB_HISTORY_FILE=str(history), GANSCALE_HOSTS="a",
                  LOCAL_WORLD_SIZE="2")  # fmt: skip
    started.append(ranks)
    assert ranks.exit_codes(0, 1) == [76, 76]
    sentence = f"rank 1 on a, rank 3 did not join within {limit} s (2 of 4 ranks did): "
    assert ranks.printed(0).startswith(f"error: {sentence}")
    assert len(ranks.printed(0).splitlines()) == 1
    assert ranks.printed(1) == ""
    bad, ended = history.read_text().splitlines()
    assert bad == "bad a"
    assert ended.startswith(f"ended 76 {sentence}")


def test_without_rank_0_the_others_say_that_they_have_waited_for_it(
    runs: Runs, started: list[Ranks]
) -> None:
    ranks = Ranks(runs, 3, "runtime.join_timeout_seconds=1", started=[1, 2])
    started.append(ranks)
    assert ranks.exit_codes(0, 1) == [76, 76]
    assert ranks.printed(0).startswith(
        "error: rank 0 did not join within 1 s: it does not answer at 127.0.0.1:"
    )
    assert len(ranks.printed(0).splitlines()) == 1
    assert ranks.printed(1) == ""


def test_another_program_at_the_port_of_rank_0_is_not_waited_for_for_ever(
    runs: Runs, started: list[Ranks]
) -> None:
    """It accepts connections, and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        address = f"127.0.0.1:{stranger.getsockname()[1]}"
        ranks = Ranks(runs, 2, "runtime.join_timeout_seconds=2", MASTER_PORT=address[10:])
        started.append(ranks)
        assert ranks.exit_codes(0, 1) == [75, 76]
    assert f"rank 0 on {HOST} cannot start: it cannot listen at {address}" in ranks.printed(0)
    assert f"rank 0 did not join within 2 s: it does not answer at {address}" in ranks.printed(1)


def has_joined(process: PreloadedProcess) -> bool:
    """Whether the rank is connected to rank 0 as well as to torch's store."""
    connections = psutil.Process(process.pid).net_connections("tcp")
    return sum(each.status == psutil.CONN_ESTABLISHED for each in connections) == 2


def test_a_rank_that_dies_while_another_is_awaited_is_named_at_once(
    runs: Runs, started: list[Ranks]
) -> None:
    """Long before the limit for joining, which is longer than this test may take."""
    ranks = Ranks(runs, 4, "runtime.join_timeout_seconds=9999", started=[0, 1, 2])
    started.append(ranks)
    for process in ranks.processes[1:]:
        wait_until(lambda process=process: has_joined(process), process=process)
    ranks.processes[1].kill()
    assert ranks.exit_codes(0, 2) == [76, 76]
    lost = f"error: rank 1 on {HOST} was lost: the process died while the ranks were joining\n"
    assert ranks.printed(0) == lost
    assert ranks.printed(2) == ""


@pytest.mark.parametrize(("there", "missing"), [(0, 1), (1, 0)])
def test_a_rank_that_waits_for_another_stops_on_request(
    runs: Runs, started: list[Ranks], there: int, missing: int
) -> None:
    ranks = Ranks(runs, 2, "runtime.join_timeout_seconds=9999", started=[there])
    started.append(ranks)
    process = ranks.processes[0]
    wait_until(lambda: blocks(process, signal.SIGTERM), process=process)
    process.send_signal(signal.SIGTERM)
    assert ranks.exit_codes(0) == [75]
    assert f"stopped before rank {missing} joined" in ranks.printed(0)


def test_two_processes_with_one_rank_are_a_mistake(runs: Runs, started: list[Ranks]) -> None:
    ranks = Ranks(runs, 3, started=[0, 1, 1])
    started.append(ranks)
    assert ranks.exit_codes(0, 1, 2) == [2, 2, 2]
    assert ranks.printed(0).startswith(f"error: two processes are rank 1, on {HOST} and on {HOST}")
    assert ranks.printed(1) + ranks.printed(2) == ""


@pytest.mark.parametrize(
    ("variable", "value", "sentence"),
    [
        ("RANK", "2", "RANK is 2, but WORLD_SIZE is 2: ranks count from 0"),
        ("RANK", "one", "RANK is 'one', which is not a whole number"),
        ("WORLD_SIZE", "two", "WORLD_SIZE is 'two', which is not a whole number"),
        ("MASTER_PORT", "66660", "MASTER_PORT is 66660: the last port is 65535"),
    ],
)
def test_numbers_of_a_launcher_that_cannot_be_are_a_mistake(
    runs: Runs, started: list[Ranks], variable: str, value: str, sentence: str
) -> None:
    environment: dict[str, Any] = {variable: value}
    ranks = Ranks(runs, 2, started=[1], **environment)
    started.append(ranks)
    assert ranks.exit_codes(0) == [2]
    assert ranks.printed(0).endswith(f"error: {sentence}\n")
    assert len(ranks.printed(0).splitlines()) == 1


def test_a_main_host_without_an_address_is_named_in_one_line(
    runs: Runs, started: list[Ranks]
) -> None:
    ranks = Ranks(runs, 2, started=[0], MASTER_ADDR="nowhere.invalid")
    started.append(ranks)
    assert ranks.exit_codes(0) == [75]
    assert f"rank 0 on {HOST} cannot start: MASTER_ADDR nowhere.invalid" in ranks.printed(0)
    assert len(ranks.printed(0).splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "settings"), [("other", []), ("run", ["optimizer.critic.learning_rate=0.5"])]
)
def test_a_rank_of_another_job_at_the_same_port_is_refused_before_it_trains(
    runs: Runs, started: list[Ranks], name: str, settings: list[str]
) -> None:
    port = str(free_port())
    here = Ranks(runs, 2, started=[0], MASTER_PORT=port)
    stranger = Ranks(runs, 2, *settings, name=name, started=[1], MASTER_PORT=port)
    started += [here, stranger]
    assert here.exit_codes(0) + stranger.exit_codes(0) == [2, 2]
    assert f"rank 1 on {HOST} trains {name} (settings " in here.printed(0)
    assert ", but rank 0 trains run (settings " in here.printed(0)
    assert not here.folder.exists()


def test_machines_with_different_numbers_of_ranks_are_a_mistake(
    runs: Runs, started: list[Ranks]
) -> None:
    port = str(free_port())
    few = Ranks(runs, 2, started=[0], MASTER_PORT=port)
    many = Ranks(runs, 4, started=[3], MASTER_PORT=port)
    started += [few, many]
    assert few.exit_codes(0) + many.exit_codes(0) == [2, 2]
    assert f"rank 3 on {HOST} expects 4 ranks, but rank 0 expects 2" in few.printed(0)
