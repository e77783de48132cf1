"""Evaluations of a run on any number of ranks, stopped, killed and failed."""

import json
import os
import signal
from pathlib import Path

import pytest

from ganscale.checkpoints.checkpoint import load_state
from tests.helpers.processes import HANG_SECONDS, REPOSITORY, end_tree, wait_until
from tests.helpers.ranks import Ranks
from tests.helpers.runs import Runs, checkpoint_bits, read_rows

OURS = "tests.helpers.feature_networks:"
FD = "eval/fd_Projection"
MEMORY = "out of memory in an evaluation: a lower evaluation.batch_size"


@pytest.fixture
def settings(tmp_path: Path) -> tuple[str, ...]:
    return (
        "training.total_images=640",
        "checkpoint.every_images=320",
        "log.every_images=160",
        "evaluation.every_images=160",
        "evaluation.samples=300",
        "evaluation.batch_size=16",
        "evaluation.metrics=[fd,kid,precision,coverage,is]",
        f"evaluation.network={OURS}Projection",
        f"data.cache={tmp_path}/cache",
        "training.precision=float64",
    )


def figures(runs: Runs, name: str) -> list[dict]:
    """The evaluations of a record, without their times."""
    rows = read_rows(runs.folder / name / "metrics.jsonl")
    return [_without_time(row) for row in rows if "eval/failed" in row]


def _without_time(row: dict) -> dict:
    return {name: value for name, value in row.items() if name != "eval/seconds"}


def assert_close(rows: list[dict], expected: list[dict], relative: float) -> None:
    def numbers(row: dict) -> dict:
        return {name: value for name, value in row.items() if not isinstance(value, str)}

    for row, other in zip(rows, expected, strict=True):
        assert numbers(row) == pytest.approx(numbers(other), rel=relative)
        assert row["eval/identity"] == other["eval/identity"]


def evaluated(runs: Runs, *arguments: str, ranks: int) -> list[dict]:
    """What `ganscale evaluate` prints as JSON."""
    script = REPOSITORY / "ganscale" / "__main__.py"
    processes = Ranks(runs, ranks, script=script, command=["evaluate", *arguments, "--json"])
    try:
        codes = processes.exit_codes(*range(ranks))
        printed = processes.printed(0)
    finally:
        processes.end()
    assert codes == [0] * ranks, printed
    return json.loads(printed[printed.index("[") : printed.rindex("]") + 1])


def test_figures_are_the_same_on_one_two_and_four_ranks(
    runs: Runs, settings: tuple[str, ...]
) -> None:
    runs.finish("one", *settings)
    rows = figures(runs, "one")
    assert [row["progress/images_seen"] for row in rows] == [160, 320, 480, 640]
    runs.finish("two", *settings, ranks=2)
    assert_close(figures(runs, "two"), rows, 1e-6)
    # Of the same checkpoint, whose images are the same bytes.
    found = [evaluated(runs, str(runs.folder / "one"), ranks=ranks)[0] for ranks in (1, 2, 4)]
    one, *others = [[_without_time(row)] for row in found]
    for other in others:
        assert_close(other, one, 1e-9)
    assert found[0]["eval/identity"] == rows[-1]["eval/identity"]


def test_the_best_evaluation_has_a_checkpoint(runs: Runs, settings: tuple[str, ...]) -> None:
    best = f"checkpoint.best={FD}"
    runs.finish("best", *settings, best, "checkpoint.keep_last=1")
    rows = figures(runs, "best")
    lowest = min(rows, key=lambda row: row[FD])["progress/images_seen"]
    kept = [int(path.name.removeprefix("images-")) for path in runs.checkpoints("best")]
    assert kept == sorted({lowest, 640})
    summary = runs.summary("best")["best_figures"]
    assert summary[FD] == {"value": min(row[FD] for row in rows), "images_seen": lowest}


def test_a_run_killed_in_an_evaluation_makes_it_once(runs: Runs, settings: tuple[str, ...]) -> None:
    runs.finish("whole", *settings, ranks=2)
    slow = (*settings, "evaluation.samples=6000")
    process = runs.start("killed", *slow, ranks=2)
    try:
        log = runs.folder / "killed" / "log.txt"
        wait_until(lambda: log.exists() and "480 of 640" in log.read_text(), process=process)
    finally:
        end_tree(process)
        process.communicate()
    runs.finish("killed", *settings, ranks=2)
    assert figures(runs, "killed")[-2:] == figures(runs, "whole")[-2:]
    assert [row["progress/images_seen"] for row in figures(runs, "killed")] == [160, 320, 480, 640]
    last = [runs.checkpoints(name)[-1] for name in ("killed", "whole")]
    assert checkpoint_bits(last[0]) == checkpoint_bits(last[1])


def test_an_evaluation_that_a_stop_interrupts_is_made_after_the_resume(
    runs: Runs, settings: tuple[str, ...]
) -> None:
    """At the end of the run, too: it is not over before."""
    runs.finish("whole", *settings)
    slow = (*settings, "evaluation.samples=60000", "evaluation.every_images=640")
    process = runs.start("stopped", *slow)
    try:
        record = runs.folder / "stopped" / "metrics.jsonl"
        last_row = '"progress/images_seen": 640'
        wait_until(lambda: record.exists() and last_row in record.read_text(), process=process)
        os.kill(process.pid, signal.SIGUSR1)
        output, _ = process.communicate(timeout=HANG_SECONDS)
    finally:
        end_tree(process)
    assert process.returncode == 75, output
    assert not figures(runs, "stopped")
    runs.finish("stopped", *settings, "evaluation.every_images=640")
    assert figures(runs, "stopped") == figures(runs, "whole")[-1:]
    best = load_state(runs.checkpoints("stopped")[-1])["best_figures"]
    assert best[FD] == {"value": figures(runs, "stopped")[-1][FD], "images_seen": 640}
    assert "finished already" in runs.finish("stopped", *settings, "evaluation.every_images=640")


def test_an_evaluation_that_fails_is_counted_and_the_run_goes_on(
    runs: Runs, settings: tuple[str, ...]
) -> None:
    """On one rank of two only: both give it up."""
    stubborn = f"evaluation.network={OURS}Stubborn"
    printed = runs.finish("failing", *settings, stubborn, ranks=2)
    assert "the evaluation at 160 images failed" in printed
    assert "not to my taste" in printed
    assert [row["eval/failed"] for row in figures(runs, "failing")] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("function", "rank", "sentence"),
    [
        ("frechet_distance", 0, "the features' covariance has no eigenvalues"),
        ("kernel_distance", 0, MEMORY),
        ("precision_and_recall", 1, MEMORY),
        ("collect", 1, MEMORY),
    ],
)
def test_a_failure_on_one_rank_anywhere_in_an_evaluation_is_counted_on_both(
    runs: Runs, settings: tuple[str, ...], function: str, rank: int, sentence: str
) -> None:
    network = f"evaluation.network={OURS}Breaking"
    options = f"evaluation.options={{function: {function}, rank: {rank}}}"
    short = "training.total_images=320", "evaluation.every_images=320"
    printed = runs.finish("breaking", *settings, *short, network, options, ranks=2)
    assert f"the evaluation at 320 images failed: {sentence}" in printed
    (row,) = figures(runs, "breaking")
    assert row["eval/failed"] == 1
