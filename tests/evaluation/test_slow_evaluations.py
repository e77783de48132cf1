"""Evaluations that take longer than a run may stand still."""

from tests.helpers.processes import seconds_to_import_torch
from tests.helpers.runs import Runs, read_rows

BATCHES = 12


def test_an_evaluation_that_takes_longer_than_the_watchdog_waits_does_not_end_the_run(
    runs: Runs,
) -> None:
    """As long as no batch of it does."""
    timeout = 3 * seconds_to_import_torch()  # more than any other stage of a tiny run takes
    takes = 1.2 * (timeout + 1)  # an evaluation may also wait a second for its data
    runs.finish(
        "run",
        f"runtime.timeout_seconds={timeout:.1f}",
        "data.retry_seconds=1",
        "training.total_images=32",
        f"evaluation={{every_images: 32, samples: {16 * BATCHES}, batch_size: 16}}",
        "evaluation.reference_images=16",
        "evaluation.network=tests.evaluation.bad_networks:Slow",
        f"evaluation.options.seconds={takes / BATCHES:.3f}",
        f"data.cache={runs.folder}/cache",
    )
    rows = [*read_rows(runs.folder / "run" / "metrics.jsonl")]
    (found,) = [row for row in rows if "eval/failed" in row]
    assert found["eval/failed"] == 0
    assert found["eval/seconds"] > takes
