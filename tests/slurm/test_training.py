"""Training on a real SLURM: its jobs run to their end, whatever happens to them on the way."""

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.jobs import Jobs

NODES = "train_nodes.sbatch"
TWO_A_NODE = "--ntasks-per-node=2"
TOTAL = "training.total_images=640"


@pytest.fixture(scope="module")
def undisturbed(
    cluster: Cluster, tmp_path_factory: pytest.TempPathFactory, digits: Path
) -> tuple[Jobs, str]:
    """A job of two nodes with two ranks each that nothing disturbs."""
    jobs = Jobs(cluster, tmp_path_factory.mktemp("undisturbed"), digits)
    job = jobs.train(NODES, "run.name=run", TOTAL, options=TWO_A_NODE)
    cluster.wait_for(job, JobState="COMPLETED", Restarts="0")
    return jobs, job


def weights(jobs: Jobs) -> dict[str, bytes]:
    """The final checkpoint's, byte for byte."""
    folder = jobs.run_folder() / "checkpoints" / "images-000000640"
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def ranks(jobs: Jobs, job: str) -> dict[int, psutil.Process]:
    """The training processes, by rank."""
    found = {}
    for process in jobs.cluster.processes():
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.cmdline()[1:2] == ["launch/train.py"]:
                environment = process.environ()
                if environment["SLURM_JOB_ID"] == job:
                    found[int(environment.get("RANK", 0))] = process
    return found


@contextlib.contextmanager
def frozen(jobs: Jobs, job: str) -> Iterator[None]:
    """Stops the job's ranks, so that a short run does not end before something happens to it."""
    processes = ranks(jobs, job).values()
    for process in processes:
        process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGCONT)


def _limit(jobs: Jobs, job: str, minutes: int) -> None:
    """Has the job's time end within `minutes`, or up to one less."""
    hours, elapsed, _ = jobs.cluster.job(job)["RunTime"].split(":")
    total = 60 * int(hours) + int(elapsed) + minutes
    jobs.cluster.run("scontrol", "update", f"JobId={job}", f"TimeLimit={total}")


def test_two_nodes_of_two_ranks_train_one_run(undisturbed: tuple[Jobs, str]) -> None:
    jobs, job = undisturbed
    assert jobs.summary()["sessions"] == [{"images_seen": 0, "world_size": 4}]
    assert jobs.summary()["images_seen"] == 640
    assert jobs.last_words(job) == ["done"]


def test_at_its_time_limit_a_job_saves_comes_again_and_ends_with_the_same_weights(
    jobs: Jobs, undisturbed: tuple[Jobs, str]
) -> None:
    job = jobs.train(NODES, "run.name=run", TOTAL, options=f"{TWO_A_NODE} --signal=B:USR1@120")
    jobs.wait_for_training(job)
    with frozen(jobs, job):
        _limit(jobs, job, minutes=2)
        jobs.wait_until(job, lambda: "asking the ranks to stop" in jobs.log(job))
        _limit(jobs, job, minutes=60)
    jobs.cluster.wait_for(job, Restarts="1")
    jobs.cluster.wait_for(job, JobState="COMPLETED", Restarts="1")
    first, second = jobs.last_words(job)
    assert first.startswith("stopped at ")
    assert first.endswith("; goes back into the queue")
    assert second == "done"
    sessions = jobs.summary()["sessions"]
    assert [session["world_size"] for session in sessions] == [4, 4]
    assert 0 < sessions[1]["images_seen"] < 640
    assert weights(jobs) == weights(undisturbed[0])


def test_a_rank_killed_is_named_and_the_job_comes_again(jobs: Jobs) -> None:
    job = jobs.train(NODES, "run.name=run", TOTAL, "checkpoint.every_images=64")
    jobs.wait_for_a_checkpoint(job)
    ranks(jobs, job)[1].kill()
    jobs.wait_until(job, lambda: jobs.last_words(job) != [])
    lost = jobs.last_words(job)[0]
    assert lost.startswith("rank 1 on node2 was lost: the process died")
    assert lost.endswith("; goes back into the queue")
    jobs.cluster.wait_for(job, JobState="COMPLETED", Restarts="1")
    assert jobs.last_words(job)[1:] == ["done"]
    assert jobs.summary()["images_seen"] == 640
    assert jobs.summary()["sessions"][-1]["images_seen"] >= 64


def test_when_a_nodes_daemon_dies_the_job_waits_for_the_node_and_goes_on(jobs: Jobs) -> None:
    job = jobs.train(NODES, "run.name=run", TOTAL)
    jobs.wait_for_training(job)
    with frozen(jobs, job):
        jobs.cluster.kill_daemon("node2")
        try:
            jobs.wait_until(job, lambda: jobs.cluster.job(job)["Restarts"] != "0")
        finally:
            jobs.cluster.restore("node2")
    jobs.cluster.wait_for(job, JobState="COMPLETED")
    assert jobs.summary()["images_seen"] == 640
    assert {session["world_size"] for session in jobs.summary()["sessions"]} == {2}


def test_when_a_node_is_switched_off_its_job_goes_on_at_another(jobs: Jobs) -> None:
    total = "training.total_images=6400"
    job = jobs.train("train.sbatch", "run.name=run", total, "checkpoint.every_images=320")
    jobs.wait_for_a_checkpoint(job)
    node = jobs.cluster.job(job)["BatchHost"]
    jobs.cluster.kill_node(node)
    try:
        done = jobs.cluster.wait_for(job, JobState="COMPLETED")
    finally:
        jobs.cluster.restore(node)
    assert done["BatchHost"] != node
    assert jobs.summary()["images_seen"] == 6400
    assert len(jobs.summary()["sessions"]) >= 2


def test_a_preempted_job_makes_way_and_goes_on_and_a_cancelled_one_saves_and_does_not(
    jobs: Jobs,
) -> None:
    job = jobs.train("train.sbatch", "run.name=run", "training.total_images=1000M")
    jobs.wait_for_training(job)
    urgent = jobs.cluster.submit(
        "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true",
        folder=jobs.folder,
    )  # fmt: skip
    jobs.cluster.wait_for(job, Restarts="1")
    stopped_at = jobs.summary()["images_seen"]
    assert stopped_at > 0
    jobs.cluster.wait_for(urgent, JobState="COMPLETED")
    history = jobs.history(job)
    jobs.wait_until(job, lambda: f"started {stopped_at}" in history.read_text().splitlines())

    jobs.cluster.run("scancel", job)
    jobs.cluster.wait_for(job, JobState="CANCELLED", Restarts="1")
    jobs.wait_until(job, lambda: len(jobs.last_words(job)) == 2)
    assert jobs.last_words(job)[1].endswith("SLURM has ended this attempt")
    assert jobs.summary()["exit_code"] == 75


def test_a_request_to_stop_is_answered_even_if_it_comes_while_the_training_starts(
    jobs: Jobs,
) -> None:
    """A job that must never be requeued fails with the exit code that asks for another start."""
    job = jobs.train(
        "train.sbatch", "run.name=run", "training.total_images=1000M", options=TWO_A_NODE,
        GANSCALE_MAX_ATTEMPTS="0",
    )  # fmt: skip
    jobs.wait_until(job, lambda: "attempt 1: 2 ranks on node" in jobs.log(job))
    jobs.cluster.run("scancel", "--batch", "--signal=USR1", job)
    jobs.cluster.wait_for(job, JobState="FAILED", ExitCode="75:0")
    # At 0 images, or before all ranks had joined.
    assert jobs.last_words(job)[-1].startswith(("stopped at ", "stopped before "))
    log = jobs.log(job)
    assert log.splitlines()[-1].endswith("submit it again to continue")
    # The ranks ended by themselves; without a run to continue, srun sees their exit code.
    errors = [line for line in log.splitlines() if "srun: error" in line]
    assert all(line.endswith("Exited with exit code 75") for line in errors), log
    assert "Traceback" not in log, log


def test_a_hangup_of_a_jobs_ranks_is_a_stop_and_the_job_comes_again(jobs: Jobs) -> None:
    job = jobs.train("train.sbatch", "run.name=run", "training.total_images=1000M")
    jobs.wait_for_training(job)
    jobs.cluster.run("scancel", "--signal=HUP", job)
    jobs.cluster.wait_for(job, Restarts="1")
    assert jobs.last_words(job)[0].startswith("stopped at ")
    assert jobs.summary()["exit_code"] == 75


def test_accelerate_may_start_the_ranks_of_each_node(
    jobs: Jobs, undisturbed: tuple[Jobs, str]
) -> None:
    job = jobs.train(
        NODES, "run.name=run", TOTAL, options=TWO_A_NODE, GANSCALE_LAUNCHER="accelerate"
    )
    jobs.cluster.wait_for(job, JobState="COMPLETED", Restarts="0")
    assert jobs.summary()["sessions"] == [{"images_seen": 0, "world_size": 4}]
    assert weights(jobs) == weights(undisturbed[0])


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
def test_a_mistake_fails_the_job_with_one_sentence_at_the_end_of_its_log(
    jobs: Jobs, setting: str, sentence: str
) -> None:
    job = jobs.train(NODES, setting, options=TWO_A_NODE)
    jobs.cluster.wait_for(job, JobState="FAILED", ExitCode="2:0")
    assert jobs.log(job).count("error: ") == 1
    line = jobs.log(job).splitlines()[-1]
    assert line.startswith("error: ")
    assert sentence in line
