"""Whether a run survives all kinds of faults, and what they cost.

    python -m benchmarks.faults [--faults N] [--seed N] [--quick] [--json FILE]

Two trainings of tiny networks, by processes of one thread over gloo. Each gets half of the faults,
one per session, and is continued by the same command until it is done:

- `on 2 ranks`: in all sessions; the result must have the same bits as the undisturbed run
- `on 1 or 2 ranks`: at random; in float64, with a tolerance of 1e-9

The faults are drawn from a seed, equally many of each kind: one rank or all are killed (-9); one
rank or all get SIGUSR1, SIGTERM or SIGINT, or their launcher is killed; a rank is stopped (SIGSTOP)
for good, or until the others have left; the run's disk is full for a while, or from the start; the
newest checkpoint is truncated, gets a flipped bit or loses a file; metrics.jsonl ends in half a row
or in zeros; a session is killed or asked to stop while it starts.

After each fault no process may be left, the exit code must be the documented one, the newest whole
checkpoint must not be older than before, the next session must start from it, and the log must end
with the name of the lost rank, if one was lost.

- `faults`, `survived`: their numbers
- `images_lost`: trained again, because no checkpoint had them (up to the last row)
- `rows_lost`, `checkpoints_lost`, `sample_grids_lost`: missing, duplicate, or different from the
  undisturbed run's; rows of evaluations, too
- `largest_weight_difference`: to the undisturbed run, relative to a tensor's largest element
"""

import shutil
import signal
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.faults.campaign import WORLDS, Campaign, Result, World
from benchmarks.faults.disk import small_disk
from benchmarks.faults.plan import KINDS, planned
from benchmarks.report import Row, argument_parser, report
from ganscale.shards.writing import write_shards

FAULTS, QUICK_FAULTS = 50, 4


def measure(count: int, seed: int, worlds: Sequence[World] = WORLDS) -> tuple[list[Row], list[str]]:
    """The rows, and a sentence for every problem."""
    folder = Path(tempfile.mkdtemp(prefix="ganscale-faults-"))
    write_shards("bundled:mnist", folder / "data", shard_samples=1000)
    with small_disk(folder / "disk") as disk:
        kinds = [kind for kind in KINDS if disk.is_small or kind != "full disk"]
        plans = planned(count, seed, [world.ranks for world in worlds], kinds)
        results = [
            Campaign(
                folder / world.name.replace(" ", "-"), disk, folder / "data", world, plan
            ).run()
            for world, plan in zip(worlds, plans, strict=True)
        ]
    rows, wrong = rows_of(results), problems(results, count)
    if not disk.is_small:
        rows[0] = replace(rows[0], note=f"{rows[0].note}; no full disk, which takes root")
    if wrong:
        wrong.append(f"the output of the sessions is in {folder}")
    else:
        shutil.rmtree(folder)
    return rows, wrong


def rows_of(results: Sequence[Result]) -> list[Row]:
    injected = sum(len(result.lost) for result in results)
    images = sum(result.total_images for result in results)
    lost = [images for result in results for images in result.lost]
    judgements = [result.judgement for result in results]
    recomputed = (
        f"{100 * sum(lost) / images:.1f} % of the runs; {statistics.median(lost or [0]):.0f} per "
        f"fault, at most {max(lost, default=0)}"
    )
    differences = ", ".join(
        f"{result.world.name} {result.judgement.weight_difference:.2g} of {result.world.weights:g}"
        for result in results
    )
    counts = {
        "faults": (injected, f"in runs of {images:,} images"),
        "survived": (injected - sum(len(result.wrong) for result in results), times(results)),
        "images_lost": (sum(lost), recomputed),
        "rows_lost": (sum(len(judgement.rows) for judgement in judgements), ""),
        "checkpoints_lost": (sum(len(judgement.checkpoints) for judgement in judgements), ""),
        "sample_grids_lost": (sum(len(judgement.sample_grids) for judgement in judgements), ""),
    }
    largest = max(judgement.weight_difference for judgement in judgements)
    return [
        *(Row(name, "", count, unit="", note=note) for name, (count, note) in counts.items()),
        Row("largest_weight_difference", "undisturbed", largest, unit="relative", note=differences),
    ]


def times(results: Sequence[Result]) -> str:
    """From a fault to the end of its session: the median and the longest, by kind."""
    seconds: dict[str, list[float]] = {}
    for result in results:
        for kind, times_of_kind in result.seconds.items():
            seconds.setdefault(kind, []).extend(times_of_kind)
    sentences = (
        f"{kind} {statistics.median(times_of_kind):.1f} s, at most {max(times_of_kind):.1f}"
        for kind, times_of_kind in sorted(seconds.items())
    )
    return "; ".join(sentences)


def problems(results: Sequence[Result], count: int) -> list[str]:
    wrong = [sentence for result in results for sentence in result.wrong]
    for result in results:
        wrong += result.judgement.losses
        if not result.is_equal:
            wrong.append(
                f"{result.world.name}: weights differ by {result.judgement.weight_difference:.2g} "
                f"({result.judgement.where})"
            )
    if (injected := sum(len(result.lost) for result in results)) < count:
        wrong.append(f"the runs ended after {injected} of {count} faults")
    return wrong


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--faults", type=int, metavar="N", help=f"how many in all (default: {FAULTS})"
    )
    parser.add_argument("--seed", type=int, default=0, help="from which the faults are drawn")
    options = parser.parse_args()
    # A shell's background jobs ignore SIGINT, and the sessions would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    count = options.faults or (QUICK_FAULTS if options.quick else FAULTS)
    rows, wrong = measure(count, options.seed)
    report(rows, options.json)
    for sentence in wrong:
        print(sentence)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
