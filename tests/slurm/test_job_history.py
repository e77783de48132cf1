"""What a batch script does when a training ends: the job completes, fails, or is requeued.

A few lines of bash stand in for the training, which would take ten seconds per attempt; the other
files of this folder run the real one.
"""

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.helpers.processes import REPOSITORY
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import Jobs

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


@pytest.mark.parametrize("script", ["train.sbatch", "shards.sbatch"])
def test_a_job_is_not_done_when_srun_ends_well_but_has_run_nothing(jobs: Jobs, script: str) -> None:
    first = "any" if script == "train.sbatch" else "verify"
    job = jobs.submit(
        script, first, GANSCALE_CONTAINER=jobs.stand_in("true"), GANSCALE_SRUN="--test-only"
    )
    jobs.cluster.wait_for(job, JobState="FAILED", Restarts="0", ExitCode="1:0")
    assert jobs.last_words(job) == [
        "failed: srun has ended with code 0, but no task has reported its end"
    ]


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


def test_a_node_that_was_found_bad_is_avoided_from_then_on(jobs: Jobs) -> None:
    stand_in = jobs.stand_in(
        _COUNTED
        + 'echo "at $SLURMD_NODENAME"; ((attempt > 1)) || '
        + '{ says "bad $SLURMD_NODENAME"; says "ended 76 a GPU is lost"; }'
    )
    job = jobs.submit("train.sbatch", "any", GANSCALE_CONTAINER=stand_in)
    done = jobs.cluster.wait_for(job, JobState="COMPLETED", Restarts="1")
    first, second = [line for line in jobs.log(job).splitlines() if line.startswith("at ")]
    assert {first, second} == {"at node1", "at node2"}
    bad = first.removeprefix("at ")
    assert done["ExcNodeList"] == bad
    assert jobs.last_words(job) == [
        "a GPU is lost; goes back into the queue",
        f"the next attempt avoids {bad}",
        "done",
    ]


def test_a_bad_node_that_the_job_needs_is_named_and_used_again(jobs: Jobs) -> None:
    stand_in = jobs.stand_in(
        _COUNTED + '((attempt > 1)) || { says "bad node2"; says "ended 76 a GPU is lost"; }'
    )
    job = jobs.submit("train_nodes.sbatch", "any", GANSCALE_CONTAINER=stand_in)
    jobs.cluster.wait_for(job, JobState="COMPLETED", Restarts="1", ExcNodeList="(null)")
    assert jobs.last_words(job)[1].startswith("node2 had better be avoided, but the job needs it")


def test_the_history_of_an_earlier_job_with_the_same_number_does_not_count(jobs: Jobs) -> None:
    stand_in = jobs.stand_in(_COUNTED + '((attempt > 1)) || says "ended 75 stopped"')
    job = jobs.submit("train.sbatch", "any", options="--hold", GANSCALE_CONTAINER=stand_in)
    jobs.history(job).parent.mkdir()
    old = "".join(f"attempt {number}\nended 75 stopped\n" for number in range(1, 10))
    jobs.history(job).write_text(old)
    jobs.cluster.run("scontrol", "release", job)
    jobs.cluster.wait_for(job, JobState="COMPLETED", Restarts="1")
    assert jobs.history(job).read_text() == (
        "attempt 1\nended 75 stopped\nexited 0\nattempt 2\nexited 0\n"
    )
    assert jobs.history(job).with_name(f"{jobs.history(job).name}.old").read_text() == old


@pytest.mark.parametrize("exported", ["NONE", "GANSCALE_LAUNCHER=srun"])
def test_ranks_have_their_environment_although_none_is_exported(jobs: Jobs, exported: str) -> None:
    """The stand-in is named in the script, since its variable is not exported either."""
    stand_in = jobs.stand_in('command -v python ganscale; echo "$MASTER_ADDR $OMP_NUM_THREADS"')
    script = jobs.folder / "train.sbatch"
    text = (REPOSITORY / "slurm" / "train.sbatch").read_text()
    script.write_text(text.replace("# Our options", f"GANSCALE_CONTAINER={stand_in}\n# Our"))
    job = jobs.submit(str(script), "any", options=f"--export={exported}")
    jobs.cluster.wait_for(job, JobState="COMPLETED")
    lines = jobs.log(job).splitlines()
    for line in (f"{REPOSITORY}/.venv/bin/python", f"{REPOSITORY}/.venv/bin/ganscale"):
        assert line in lines
    assert "127.0.0.1 1" in lines


def test_a_node_that_is_taken_exclusively_may_have_more_gpus_than_were_asked_for(
    jobs: Jobs,
) -> None:
    stand_in = jobs.stand_in('echo "sees $CUDA_VISIBLE_DEVICES"')
    job = jobs.submit(
        "train.sbatch", "any", options="--exclusive --gpus-per-node=1", GANSCALE_CONTAINER=stand_in
    )
    jobs.cluster.wait_for(job, JobState="COMPLETED")
    assert "sees 0\n" in jobs.log(job)


@pytest.mark.parametrize("script", ["train.sbatch", "shards.sbatch", "sweep.sbatch"])
def test_a_batch_script_that_is_run_and_not_submitted_says_so(script: str) -> None:
    environment = {name: value for name, value in os.environ.items() if "SLURM" not in name}
    done = subprocess.run(
        ["bash", f"slurm/{script}", "verify"],
        cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (
        2,
        "error: this is a batch script: submit it with sbatch\n",
    )


@pytest.mark.parametrize("script", ["train.sbatch", "shards.sbatch"])
def test_one_task_has_its_cpus_and_runs_once_although_its_node_has_room_for_more(
    jobs: Jobs, script: str
) -> None:
    """srun alone starts as many tasks as fit, and since 22.05 takes no CPUs over from sbatch."""
    stand_in = jobs.stand_in('echo "runs with CPUs $(grep Cpus_allowed_list /proc/self/status)"')
    first = "any" if script == "train.sbatch" else "verify"
    for cpus, listed in ((1, "[01]"), (2, "0-1")):
        job = jobs.submit(
            script, first, options=f"--exclusive --cpus-per-task={cpus}",
            # shards.sbatch checks nothing first, so its own command is the stand-in's
            GANSCALE_CONTAINER=f"{stand_in} task", SRUN_CPUS_PER_TASK="1", SLURM_NTASKS="2",
        )  # fmt: skip
        jobs.cluster.wait_for(job, JobState="COMPLETED")
        lines = [line for line in jobs.log(job).splitlines() if line.startswith("runs with")]
        assert len(lines) == 1
        assert re.fullmatch(rf"runs with CPUs Cpus_allowed_list:\t{listed}", lines[0])


def test_ranks_next_to_each_other_are_on_one_socket(tmp_path: Path, digits: Path) -> None:
    """A node that seems to have two sockets of two CPUs each, of which the first two are there."""
    with Cluster(nodes=1, cpus=4, sockets=2) as cluster:
        jobs = Jobs(cluster, tmp_path, digits)
        stand_in = jobs.stand_in('echo "rank $RANK: $(grep Cpus_allowed_list /proc/self/status)"')
        job = jobs.submit(
            "train.sbatch", "any", options="--ntasks-per-node=2", GANSCALE_CONTAINER=stand_in
        )
        cluster.wait_for(job, JobState="COMPLETED")
        assert "rank 0: Cpus_allowed_list:\t0\n" in jobs.log(job)
        assert "rank 1: Cpus_allowed_list:\t1\n" in jobs.rank_log(job, "rank-1")


def test_a_rank_may_open_as_many_files_as_its_node_permits(jobs: Jobs) -> None:
    stand_in = jobs.stand_in('echo "files: $(ulimit -Sn) of $(ulimit -Hn)"')
    submit = f"ulimit -Sn 1000; sbatch --parsable --output={jobs.folder}/%j.log --gpus-per-node=0"
    job = jobs.cluster.run(
        "bash", "-c", f"{submit} --cpus-per-task=1 slurm/train.sbatch any",
        folder=REPOSITORY, GANSCALE_CONTAINER=stand_in,
    ).strip()  # fmt: skip
    jobs.cluster.wait_for(job, JobState="COMPLETED")
    found = re.search(r"^files: (\d+) of (\d+)$", jobs.log(job), re.MULTILINE)
    assert found is not None
    assert found[1] == found[2]


def test_a_node_that_permits_few_files_is_named() -> None:
    code = "ulimit -n 1000; source slurm/training_job.sh; raise_limits"
    place = {"SLURM_LOCALID": "0", "SLURMD_NODENAME": "node7", "SLURM_JOB_ID": "1"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", code],
        cwd=REPOSITORY, env=os.environ | place, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "warning: on node7, a process may open only 1000 files (ulimit -n)" in done.stderr


def test_dcgms_profiling_is_paused_while_a_rank_runs(jobs: Jobs) -> None:
    """A stand-in writes down what it is asked: there is no GPU that DCGM could profile."""
    calls = jobs.folder / "calls"
    dcgmi = jobs.folder / "bin" / "dcgmi"
    dcgmi.parent.mkdir()
    dcgmi.write_text(f'#!/bin/bash\necho "dcgmi $*" >> {calls}\n')
    dcgmi.chmod(0o755)
    job = jobs.submit(
        "train.sbatch", "any", options="--ntasks-per-node=2", GANSCALE_PAUSE_DCGM="1",
        GANSCALE_CONTAINER=jobs.stand_in(f'[[ $RANK == 1 ]] || echo "rank" >> {calls}'),
        PATH=f"{dcgmi.parent}:{os.environ['PATH']}",
    )  # fmt: skip
    jobs.cluster.wait_for(job, JobState="COMPLETED")
    assert calls.read_text() == "dcgmi profile --pause\nrank\ndcgmi profile --resume\n"


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


def test_a_sweep_file_may_have_quotes_and_come_from_windows(jobs: Jobs) -> None:
    (settings := jobs.folder / "dos.txt").write_bytes(
        b"\xef\xbb\xbf# two\r\n\r\na='{b: 1, c: 2}' \"d=e f\" g=h\r\na=1"
    )
    stand_in = jobs.stand_in('shift 2; printf "<%s>" "$@"')
    array = jobs.submit(
        "sweep.sbatch", str(settings), options="--array=1-2", GANSCALE_CONTAINER=stand_in
    )
    first = jobs.cluster.wait_for(f"{array}_1", JobState="COMPLETED")["JobId"]
    jobs.cluster.wait_for(f"{array}_2", JobState="COMPLETED")
    assert "<run.name=dos-1><a={b: 1, c: 2}><d=e f><g=h>" in jobs.log(first)
    assert "<run.name=dos-2><a=1>" in jobs.log(array)


def test_a_quote_that_is_not_closed_is_a_mistake(jobs: Jobs) -> None:
    (settings := jobs.folder / "open.txt").write_text("a='b\n")
    job = jobs.submit("sweep.sbatch", str(settings), options="--array=1")
    jobs.cluster.wait_for(job, JobState="FAILED", ExitCode="2:0")
    assert "a quote is missing in the settings number 1: a='b" in jobs.log(job)


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
    # Of an array, the first task to fail makes the job a failed one; the log is another's.
    jobs.wait_until(job, lambda: bool(jobs.log(job)))
    line = jobs.log(job).splitlines()[-1]
    assert "error: " in line
    assert sentence in line
