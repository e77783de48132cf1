"""A run from shards on a server is the run from the same shards on disk, bit for bit."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.fault_server import Fault, FaultServer
from tests.helpers.processes import end_tree, wait_until
from tests.helpers.runs import Runs

SETTINGS = (
    "training.total_images=640",
    "training.global_batch_size=16",
    "data.lanes=4",
    "data.block_samples=32",
    "data.window_blocks=2",
    "data.workers=2",
)


@pytest.fixture
def server(digits: Path) -> Iterator[FaultServer]:
    with FaultServer().running() as server:
        server.serve(digits, "/digits")
        yield server


def shard_paths(server: FaultServer) -> list[str]:
    return sorted(path for path in server.objects if path.endswith(".tar"))


def results(rows: list[dict]) -> list[dict]:
    """What the rows say of images and networks; times and speeds differ."""
    parts = ("progress/images_seen", "loss/", "logits/", "panel/", "optim/")
    return [{key: row[key] for key in row if key.startswith(parts)} for row in rows]


def test_a_server_that_fails_now_and_then_gives_the_run_of_a_local_disk(
    runs: Runs, server: FaultServer, tmp_path: Path
) -> None:
    runs.finish("local", *SETTINGS)
    first, second, *_ = shard_paths(server)
    server.faults[first].extend([Fault(), Fault(status=503), Fault(cut_after=50_000)])
    server.faults[second].extend([Fault(cut_after=10_000), Fault(status=500)])
    elsewhere = (f"data.path={server.url}/digits", f"data.cache={tmp_path}/cache")
    runs.finish("remote", *SETTINGS, *elsewhere)
    local, elsewhere_too = results(runs.rows("local")), results(runs.rows("remote"))
    assert len(local) == 20
    assert len(local[0]) > 20
    assert elsewhere_too == local
    runs.finish("two", *SETTINGS, *elsewhere, ranks=2)
    tars = {path: count for path, count in server.gets.items() if path.endswith(".tar")}
    # One GET checks the first shard at each start; then a run finds what another one left.
    assert sum(tars.values()) == 2 + len(tars) + 4


def test_a_server_that_stays_away_asks_for_a_requeue_and_the_run_goes_on(
    runs: Runs, server: FaultServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GANSCALE_JOB_HISTORY_FILE", str(tmp_path / "attempts"))
    elsewhere = (f"data.path={server.url}/digits", f"data.cache={tmp_path}/cache")
    runs.finish("whole", *SETTINGS, *elsewhere, f"data.cache={tmp_path}/other")
    first, *others = shard_paths(server)
    for path in (first, *others):
        server.faults[path].extend([Fault()] if path == first else [])
        server.faults[path].extend([Fault(status=503)] * 10_000)
    command = (*SETTINGS, *elsewhere, "data.retry_seconds=1")
    process = runs.start("cut", *command)
    try:
        output, _ = process.communicate(timeout=300)
    finally:
        end_tree(process)
    assert process.returncode == 75, output
    assert "cannot be read" in output
    assert "Traceback" not in output
    ended = (tmp_path / "attempts").read_text().splitlines()[-1]
    assert ended.startswith("ended 75 ")
    assert "cannot be read" in ended
    server.faults.clear()
    runs.finish("cut", *command)
    assert results(runs.rows("cut")) == results(runs.rows("whole"))


def test_a_request_to_stop_is_heard_while_the_data_does_not_come(
    runs: Runs, server: FaultServer, tmp_path: Path
) -> None:
    first, *others = shard_paths(server)
    server.faults[first].append(Fault())  # the check at the start
    for path in (first, *others):
        server.faults[path].extend([Fault(status=503)] * 10_000)
    elsewhere = (f"data.path={server.url}/digits", f"data.cache={tmp_path}/cache")
    process = runs.start("waiting", *SETTINGS, *elsewhere)
    log = runs.folder / "waiting" / "log.txt"
    try:
        wait_until(lambda: log.exists() and "trying again for up to" in log.read_text())
        process.terminate()
        output, _ = process.communicate(timeout=300)
    finally:
        end_tree(process)
    assert process.returncode == 75, output
    assert "stopped on request at 0 images" in output
