"""What a batch script does when a training ends: the job completes, fails, or is requeued.

A few lines of bash stand in for the training, which would take ten seconds per attempt; the other
files of this folder run the real one.
"""

import pytest
from jobs import Jobs

# Counts the attempts, like a run that continues from its checkpoint.
_COUNTED = """\
attempt=$(grep -c ^attempt "$GANSCALE_JOB_HISTORY_FILE")
says() { echo "$*" >> "$GANSCALE_JOB_HISTORY_FILE"; }
"""


def test_a_job_is_queued_again_while_it_makes_progress_and_then_so_often_without(
    jobs: Jobs,
) -> None:
    stand_in = jobs.stand_in(
        _COUNTED + 'says "started $((attempt < 2 ? 100 : 200))"; says "ended 75 stopped"'
    )
    job = jobs.submit("train.sbatch", "any", GANSCALE_CONTAINER=stand_in, GANSCALE_MAX_ATTEMPTS="1")
    jobs.cluster.wait_for(job, JobState="FAILED", Restarts="2", ExitCode="75:0")
    again, limit = (
        "stopped; goes back into the queue",
        "stopped; attempts without progress: 1, which is the limit",
    )
    said = jobs.last_words(job)
    assert said[:2] == [again] * 2
    assert said[2].startswith(limit)


def test_a_rank_that_dies_before_anyone_can_say_so_is_named_and_the_job_comes_again(
    jobs: Jobs,
) -> None:
    stand_in = jobs.stand_in(
        _COUNTED + "((attempt > 1)) || { [[ $RANK != 3 ]] || kill -KILL $$; exit 76; }"
    )
    job = jobs.submit(
        "train_nodes.sbatch", "any", options="--ntasks-per-node=2", GANSCALE_CONTAINER=stand_in
    )
    jobs.cluster.wait_for(job, JobState="COMPLETED", Restarts="1")
    lost = "rank 3 on node2 was killed by signal 9"
    assert jobs.last_words(job) == [f"{lost}; goes back into the queue", "done"]
    assert lost in jobs.rank_log(job, "rank-3")


def test_what_is_neither_a_stop_nor_a_lost_rank_ends_the_job_with_its_code(jobs: Jobs) -> None:
    stand_in = jobs.stand_in(_COUNTED + "says 'ended 1 a gradient became NaN'; exit 1")
    job = jobs.submit("train.sbatch", "any", GANSCALE_CONTAINER=stand_in)
    jobs.cluster.wait_for(job, JobState="FAILED", Restarts="0", ExitCode="1:0")
    assert jobs.log(job).splitlines()[-1].endswith("failed: a gradient became NaN")


def test_every_rank_knows_its_place_and_sees_all_gpus_of_its_node(jobs: Jobs) -> None:
    """The GPUs are a stand-in: devices that SLURM hands out, and torch does not see."""
    stand_in = jobs.stand_in(
        'echo "$RANK/$WORLD_SIZE $LOCAL_RANK/$LOCAL_WORLD_SIZE $(hostname) $CUDA_VISIBLE_DEVICES '
        '$MASTER_ADDR $OMP_NUM_THREADS"; echo "a word of rank $RANK" >&2'
    )
    options = "--ntasks-per-node=2 --gpus-per-node=2 --export=ALL,OMP_NUM_THREADS="
    job = jobs.submit("train_nodes.sbatch", "any", options=options, GANSCALE_CONTAINER=stand_in)
    jobs.cluster.wait_for(job, JobState="COMPLETED")
    assert "0/4 0/2 node1 0,1 node1 1\n" in jobs.log(job)
    for rank, place in enumerate(["1/2 node1", "0/2 node2", "1/2 node2"], 1):
        words = f"a word of rank {rank}\n"
        own = jobs.rank_log(job, f"rank-{rank}")
        assert sorted(own.splitlines(True)) == [f"{rank}/4 {place} 0,1 node1 1\n", words]
        assert words in jobs.log(job)


def test_a_task_of_an_array_is_queued_again_alone(jobs: Jobs) -> None:
    """The last task: its number is also that of the whole array."""
    (settings := jobs.folder / "three.txt").write_text("# two\na=1\n\n  b=2\n")
    stand_in = jobs.stand_in(
        _COUNTED
        + 'echo "$*"; ((SLURM_ARRAY_TASK_ID == 1 || attempt > 1)) || says "ended 75 stopped"'
    )
    array = jobs.submit(
        "sweep.sbatch", str(settings), "c=3", options="--array=1-2", GANSCALE_CONTAINER=stand_in
    )
    first = jobs.cluster.wait_for(f"{array}_1", JobState="COMPLETED", Restarts="0")
    jobs.cluster.wait_for(f"{array}_2", JobState="COMPLETED", Restarts="1")
    assert "run.name=three-1 c=3 a=1\n" in jobs.log(first["JobId"])
    assert jobs.log(array).count("run.name=three-2 c=3 b=2\n") == 2


@pytest.mark.parametrize(
    ("script", "arguments", "options", "sentence"),
    [
        pytest.param(
            "train.sbatch", ["any"], "--gpus-per-node=2", "2 GPUs and 1 tasks", id="one-rank-a-gpu"
        ),
        pytest.param(
            "train.sbatch", ["any"], "--gpus-per-task=1", "not --gpus-per-task", id="one-gpu-a-task"
        ),
        pytest.param("sweep.sbatch", ["no.txt"], "--array=1", "a file of settings", id="no-file"),
        pytest.param(
            "sweep.sbatch",
            ["configs/sweeps/objectives.txt"],
            "--array=99",
            "has no settings number 99",
            id="no-such-line",
        ),
        pytest.param(
            "shards.sbatch",
            ["write", "a", "b"],
            "--array=1-2",
            "write cannot be shared",
            id="write",
        ),
        pytest.param(
            "shards.sbatch", ["index", "a"], "--array=2", "--array=1-2", id="parts-are-missing"
        ),
    ],
)
def test_options_that_do_not_fit_end_the_job_with_a_sentence(
    jobs: Jobs, script: str, arguments: list[str], options: str, sentence: str
) -> None:
    job = jobs.submit(script, *arguments, options=options)
    jobs.cluster.wait_for(job, JobState="FAILED", ExitCode="2:0")
    line = jobs.log(job).splitlines()[-1]
    assert "error: " in line
    assert sentence in line
