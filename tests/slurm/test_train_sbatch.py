"""slurm/train.sbatch, submitted to a real SLURM."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster

from tests.conftest import REPOSITORY, TINY

SCRIPT = "slurm/train.sbatch"


@pytest.fixture
def tiny_run(tmp_path: Path, digits: Path) -> list[str]:
    """The arguments of a run in tmp_path/run that never ends, but for a `training.total_images`."""
    where = [f"data.path={digits}", f"run.folder={tmp_path}", "run.name=run"]
    return [*TINY, "log.every_images=320", "training.total_images=1000M", *where]


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    """Of a job on CPUs, for this cluster's small node."""
    return [f"--output={tmp_path / 'job.log'}", "--cpus-per-task=2", "--gpus-per-node=0"]


@pytest.fixture(autouse=True)
def _no_job_is_left(cluster: Cluster) -> Iterator[None]:
    yield
    cluster.run("scancel", "--user=root")


def summary(folder: Path) -> dict:
    return json.loads((folder / "run" / "summary.json").read_text())


def wait_for_training(folder: Path, seconds: float = 60) -> None:
    """Until the run has a row of losses."""
    deadline = time.monotonic() + seconds
    rows = folder / "run" / "metrics.jsonl"
    while not (rows.exists() and "loss/critic" in rows.read_text()):
        assert time.monotonic() < deadline, (folder / "job.log").read_text()
        time.sleep(0.1)


@pytest.mark.timeout(90)
def test_a_job_trains_with_a_process_for_each_gpu_of_its_node(
    cluster: Cluster, tiny_run: list[str], options: list[str], tmp_path: Path
) -> None:
    """The GPUs are a stand-in: devices that SLURM hands out, and torch does not see."""
    command = [*options, "--gpus-per-node=2", SCRIPT, *tiny_run, "training.total_images=640"]
    job = cluster.submit(*command, folder=REPOSITORY)
    cluster.wait_for(job, seconds=60, JobState="COMPLETED")
    assert summary(tmp_path)["sessions"] == [{"images_seen": 0, "world_size": 2}]
    assert summary(tmp_path)["images_seen"] == 640


@pytest.mark.timeout(180)
def test_a_job_at_its_time_limit_saves_requeues_itself_and_completes(
    cluster: Cluster, tiny_run: list[str], options: list[str], tmp_path: Path
) -> None:
    # What the limit interrupts would not end by itself; the job's second run finds an end.
    config = tmp_path / "run.yaml"
    config.write_text("training: {total_images: 1000M}\n")
    settings = [setting for setting in tiny_run if not setting.startswith("training.total_images")]
    limits = ["--time=00:01:00", "--signal=B:USR1@50"]
    job = cluster.submit(
        *options, *limits, SCRIPT, settings[0], str(config), *settings[1:],
        folder=REPOSITORY, GANSCALE_PROCESSES="2",
    )  # fmt: skip
    cluster.wait_for(job, seconds=90, Restarts="1")
    stopped_at = summary(tmp_path)["images_seen"]
    assert summary(tmp_path)["exit_code"] == 75
    config.write_text(f"training: {{total_images: {stopped_at + 3200}}}\n")

    cluster.wait_for(job, seconds=60, JobState="COMPLETED")
    assert summary(tmp_path)["images_seen"] == stopped_at + 3200
    assert summary(tmp_path)["sessions"] == [
        {"images_seen": 0, "world_size": 2},
        {"images_seen": stopped_at, "world_size": 2},
    ]


@pytest.mark.timeout(90)
def test_a_request_to_stop_is_answered_even_if_it_comes_while_the_training_starts(
    cluster: Cluster, tiny_run: list[str], options: list[str], tmp_path: Path
) -> None:
    """And a job that may not be requeued any more fails, with the code for `run it again`."""
    job = cluster.submit(*options, SCRIPT, *tiny_run, folder=REPOSITORY, GANSCALE_MAX_REQUEUES="0")
    log = tmp_path / "job.log"
    while not (log.exists() and "ranks 1, node node1" in log.read_text()):
        time.sleep(0.02)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    cluster.wait_for(job, seconds=60, JobState="FAILED", ExitCode="75:0")
    assert len(list((tmp_path / "run" / "checkpoints").glob("images-*"))) == 1
    text = log.read_text()
    assert "submit it again" in text
    assert "srun: error" not in text, text  # the launcher and its ranks ended in their own time
    assert "Traceback" not in text, text


@pytest.mark.timeout(90)
def test_a_cancelled_job_saves_and_stays_cancelled(
    cluster: Cluster, tiny_run: list[str], options: list[str], tmp_path: Path
) -> None:
    job = cluster.submit(*options, SCRIPT, *tiny_run, folder=REPOSITORY)
    wait_for_training(tmp_path)
    cluster.run("scancel", job)
    cluster.wait_for(job, seconds=60, JobState="CANCELLED", Restarts="0")
    assert summary(tmp_path)["exit_code"] == 75
    assert len(list((tmp_path / "run" / "checkpoints").glob("images-*"))) == 1


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        pytest.param(
            "training.totl_images=1",
            "unknown key `training.totl_images`; did you mean `training.total_images`?",
            id="config",
        ),
        pytest.param("data.path=nowhere", "nowhere", id="data"),
    ],
)
def test_a_mistake_fails_the_job_with_a_sentence_in_its_log(
    cluster: Cluster,
    tiny_run: list[str],
    options: list[str],
    tmp_path: Path,
    setting: str,
    sentence: str,
) -> None:
    job = cluster.submit(*options, SCRIPT, *tiny_run, setting, folder=REPOSITORY)
    cluster.wait_for(job, seconds=40, JobState="FAILED")
    lines = (tmp_path / "job.log").read_text().splitlines()
    assert [line for line in lines if "error: " in line and sentence in line]
