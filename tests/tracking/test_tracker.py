"""The tracker with the real W&B client, in processes of its own, against a server on loopback."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from wandb_server import WandbServer

from ganscale.tracking import read_rows

IMAGES_PER_STEP = 64
DEADLINE_SECONDS = 40
REPOSITORY = Path(__file__).parents[2]
API_KEY = "0" * 40

pytestmark = pytest.mark.timeout(2 * DEADLINE_SECONDS)
started: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def no_process_left() -> Iterator[None]:
    yield
    for process in started:
        with process:
            process.kill()
    started.clear()


@pytest.fixture
def server() -> Iterator[WandbServer]:
    server = WandbServer()
    yield server
    server.stop()


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A user without any W&B account, on a machine that reports to nobody."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    home = tmp_path / "home"
    home.mkdir()
    return {
        **kept,
        "HOME": str(home),
        "NETRC": str(home / ".netrc"),
        "PYTHONPATH": str(REPOSITORY),
        "WANDB_ERROR_REPORTING": "false",
        # Without this, a test that should stay offline would ask the internet.
        "WANDB_BASE_URL": "http://127.0.0.1:9",
    }


@pytest.fixture
def with_account(environment: dict[str, str], server: WandbServer) -> dict[str, str]:
    return {**environment, "WANDB_BASE_URL": server.url, "WANDB_API_KEY": API_KEY}


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


def start(environment: dict[str, str], **arguments) -> subprocess.Popen[str]:
    arguments["run_folder"] = str(arguments["run_folder"])
    script = REPOSITORY / "tests/tracking/training_process.py"
    process = subprocess.Popen(
        [sys.executable, str(script), json.dumps(arguments)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    started.append(process)
    return process


def end(process: subprocess.Popen[str]) -> dict:
    """What the process reports when it is left to go on; its output is under `output`."""
    try:
        stdout, stderr = process.communicate(timeout=DEADLINE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == 0, stderr
    return {**json.loads(stdout.splitlines()[-1]), "output": stdout + stderr}


def train(environment: dict[str, str], **arguments) -> dict:
    return end(start(environment, **arguments))


def wait_until_paused(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    if any(line.startswith('{"logged"') for line in process.stdout):
        return
    pytest.fail("the process ended before it paused")


def offline_records(run_folder: Path, kind: str) -> list[dict]:
    """All records of a kind in the offline fragments of a run, as the client itself reads them."""
    records = []
    for fragment in sorted(run_folder.glob("wandb/offline-run-*/*.wandb")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(fragment)]
        output = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=DEADLINE_SECONDS
        ).stdout
        parsed = [json.loads(line) for line in output.splitlines()]
        records += [record[kind] for record in parsed if record["type"] == kind]
    return records


def steps(rows: list[dict], name: str = "loss/critic") -> list[int]:
    """The training steps of the rows that hold `name`, in order."""
    return [row["progress/step"] for row in rows if name in row]


def recorded_steps(run_folder: Path, name: str = "loss/critic") -> list[int]:
    return steps(list(read_rows(run_folder / "metrics.jsonl")), name)


def test_an_offline_run_holds_every_row_once_over_images_seen(environment, run_folder):
    report = train(environment, run_folder=run_folder, mode="offline", first_step=1, last_step=20)

    rows = [record["item"] for record in offline_records(run_folder, "history")]
    assert steps(rows) == list(range(1, 21))
    assert steps(rows, "eval/fid") == [10, 20]
    assert all(row["progress/images_seen"] == 64 * row["progress/step"] for row in rows)
    assert all(row["loss/generator"] == "NaN" for row in rows if "loss/generator" in row)
    pictures = [row for row in rows if "samples/images.path" in row]
    assert [row["samples/images.format"] for row in pictures] == ["jpg", "jpg"]
    axes = {r["glob_name"]: r["step_metric"] for r in offline_records(run_folder, "metric")[1:]}
    assert axes == {"*": "progress/images_seen"}
    assert Path(report["location"]).parent == run_folder / "wandb"


def test_fragments_of_a_run_resumed_twice_share_no_step(environment, run_folder):
    for first, last in ((1, 12), (9, 25), (21, 30)):
        train(environment, run_folder=run_folder, mode="offline", first_step=first, last_step=last)
    rows = [record["item"] for record in offline_records(run_folder, "history")]
    assert steps(rows) == recorded_steps(run_folder) == list(range(1, 31))
    assert steps(rows, "eval/fid") == [10, 20, 30]
    wandb_steps = [row["_step"] for row in rows]
    assert wandb_steps == sorted(set(wandb_steps))


def test_a_run_resumed_three_times_arrives_once_at_the_server(with_account, run_folder, server):
    for first, last in ((1, 12), (9, 25), (21, 21), (15, 30)):
        report = train(
            with_account, run_folder=run_folder, mode="online", first_step=first, last_step=last
        )
        assert report["degraded"] is None
        assert report["location"].startswith(server.url)
    run = server.runs["same-run"]
    assert steps(run.history) == recorded_steps(run_folder) == list(range(1, 31))
    assert steps(run.history, "eval/fid") == [10, 20, 30]
    assert steps(run.history, "samples/images") == [10, 20, 30]
    assert run.summary["final/critic"] == 0.5
    assert run.exit_code == 0
    assert json.loads(run.config)["world_size"]["value"] == 15


def test_a_run_killed_at_any_moment_continues_its_record(environment, run_folder):
    killed = start(
        environment, run_folder=run_folder, mode="offline", first_step=1, last_step=20, pause_at=15
    )
    wait_until_paused(killed)
    killed.kill()
    killed.communicate(timeout=DEADLINE_SECONDS)
    assert recorded_steps(run_folder) == list(range(1, 16))

    train(environment, run_folder=run_folder, mode="offline", first_step=11, last_step=20)
    assert recorded_steps(run_folder) == list(range(1, 21))


def test_a_score_whose_evaluation_was_cut_short_is_not_taken_for_sent(
    with_account, run_folder, server
):
    """The first process ends at step 10 with the meters logged, but not the evaluation."""
    arguments = {"run_folder": run_folder, "mode": "auto"}
    train(with_account, **arguments, first_step=1, last_step=10, evaluation_interval=0)
    train(with_account, **arguments, first_step=6, last_step=12)
    assert steps(server.runs["same-run"].history) == list(range(1, 13))
    assert steps(server.runs["same-run"].history, "eval/fid") == [10]


def test_rows_that_were_recorded_without_tracking_count_as_not_sent(
    with_account, run_folder, server
):
    train(with_account, run_folder=run_folder, mode="disabled", first_step=1, last_step=12)
    assert not server.runs
    train(with_account, run_folder=run_folder, mode="auto", first_step=9, last_step=15)
    assert steps(server.runs["same-run"].history) == list(range(9, 16))


def test_a_server_that_is_down_at_the_start_makes_the_run_offline(with_account, run_folder, server):
    server.stop()
    report = train(with_account, run_folder=run_folder, mode="online", first_step=1, last_step=5)
    assert "WARNING: " in report["output"]
    assert "does not answer" in report["output"]
    assert report["start_seconds"] < 10
    assert steps([r["item"] for r in offline_records(run_folder, "history")]) == [1, 2, 3, 4, 5]


def test_a_server_that_dies_stops_neither_training_nor_its_end(with_account, run_folder, server):
    process = start(
        with_account, run_folder=run_folder, mode="online", first_step=1, last_step=50, pause_at=5
    )
    wait_until_paused(process)
    server.stop()
    report = end(process)
    assert recorded_steps(run_folder) == list(range(1, 51))
    assert report["finish_seconds"] < 15
    assert report["output"].count("W&B is off") == 1


def test_a_dead_wandb_service_gives_one_warning_and_the_record_goes_on(environment, run_folder):
    process = start(
        environment, run_folder=run_folder, mode="offline", first_step=1, last_step=50, pause_at=5
    )
    wait_until_paused(process)
    children = psutil.Process(process.pid).children(recursive=True)
    services = [child for child in children if "wandb-core" in child.name()]
    assert services
    for service in services:
        service.send_signal(signal.SIGKILL)
    psutil.wait_procs(services, timeout=5)
    report = end(process)
    assert report["output"].count("W&B is off") == 1
    assert report["degraded"]
    assert recorded_steps(run_folder) == list(range(1, 51))


def test_without_an_api_key_a_run_is_offline_and_nobody_is_asked(environment, run_folder, server):
    environment["WANDB_BASE_URL"] = server.url
    report = train(environment, run_folder=run_folder, mode="auto", first_step=1, last_step=3)
    assert "no API key" in report["output"]
    assert "offline-run" in report["location"]
    assert not server.runs


def test_an_api_key_in_netrc_is_found(environment, run_folder, server):
    host = server.url.removeprefix("http://")
    Path(environment["NETRC"]).write_text(f"machine {host} login user password {API_KEY}\n")
    Path(environment["NETRC"]).chmod(0o600)
    environment["WANDB_BASE_URL"] = server.url
    train(environment, run_folder=run_folder, mode="auto", first_step=1, last_step=3)
    assert steps(server.runs["same-run"].history) == [1, 2, 3]


def test_wandb_mode_in_the_environment_decides_where_the_config_does_not(
    with_account, run_folder, server
):
    with_account["WANDB_MODE"] = "offline"
    report = train(with_account, run_folder=run_folder, mode="auto", first_step=1, last_step=3)
    assert "offline-run" in report["location"]
    assert not server.runs


def test_online_without_an_api_key_is_a_mistake_with_a_remedy(environment, run_folder):
    process = start(environment, run_folder=run_folder, mode="online", first_step=1, last_step=3)
    _, stderr = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode != 0
    assert "UserError: tracking mode 'online' needs an API key" in stderr
    assert "WANDB_API_KEY" in stderr
