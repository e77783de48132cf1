"""Before a run starts, every device computes, and the ranks add up a tensor."""

import socket
from pathlib import Path

import pytest

from benchmarks.ranks import run_ranks
from ganscale.runtime import Runtime
from ganscale.supervision.health_check import check_health
from tests.helpers.processes import REPOSITORY, seconds_to_import_torch
from tests.helpers.ranks import Ranks
from tests.helpers.runs import Runs

HOST = socket.gethostname()


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("hang", f"rank 1 on {HOST} hangs: in `health check` for "),
        ("fail", f"rank 1 on {HOST}: AcceleratorError: CUDA error: uncorrectable ECC error"),
        ("slow", f"rank 1 on {HOST}: its device (cpu:0) took 100.00 s to compute what takes most"),
    ],
)
def test_a_sick_device_is_named_and_its_machine_is_noted_as_bad(
    runs: Runs, started: list[Ranks], tmp_path: Path, how: str, sentence: str
) -> None:
    history = tmp_path / "history"
    limit = 4 * seconds_to_import_torch() if how == "hang" else 9999
    ranks = Ranks(
        runs, 3, "training.global_batch_size=24", f"runtime.health_check_seconds={limit}",
        script=REPOSITORY / "tests" / "distributed" / "sick_device.py", SICK=f"1:{how}",
        GANSCALE_JOB_HISTORY_FILE=str(history),
    )  # fmt: skip
    started.append(ranks)
    assert ranks.exit_codes(0, 1, 2) == [76, 76, 76]
    assert sentence in ranks.printed(0).splitlines()[-1]
    bad, ended = history.read_text().splitlines()
    assert bad == f"bad {HOST}"
    assert ended.startswith(f"ended 76 {sentence}")
    assert not ranks.folder.exists()


def test_a_single_rank_with_a_sick_device_notes_its_machine(
    runs: Runs, started: list[Ranks], tmp_path: Path
) -> None:
    history = tmp_path / "history"
    ranks = Ranks(
        runs, 1, script=REPOSITORY / "tests" / "distributed" / "sick_device.py", SICK="0:fail",
        GANSCALE_JOB_HISTORY_FILE=str(history),
    )  # fmt: skip
    started.append(ranks)
    ranks.exit_codes(0)
    assert f"bad {HOST}" in history.read_text().splitlines()


def test_ranks_that_are_well_pass(tmp_path: Path) -> None:
    run_ranks("tests.distributed.test_health_check:check", tmp_path, 2, seconds=300)


def check(_: Path) -> None:
    runtime = Runtime.start(timeout_seconds=300)
    check_health(runtime)
    runtime.close()
