"""How long a checkpoint interrupts training.

    python -m benchmarks.checkpoint [--quick] [--json FILE]

A state of about 40 MB and one of about 400 MB (networks, EMA, moments of both optimizers), saved to
a temporary folder of this machine while the networks' own cycles run before and during the write:

- `stall`: from the end of a cycle until the next can start, for a checkpoint written in the loop
  relative to one written in the background; the note has both in milliseconds
- `stall of a cycle`: the background writer's stall in percent of a cycle
- `cycles beside a write`: the time of some cycles while a checkpoint is written, flushed, read back
  and hashed, in percent of the time without; the writer can use a second core

Both take turns. The note has the time of a session's first save, which also allocates memory.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.ours import Ours, config_of, random_images
from benchmarks.report import Row, arguments, report
from benchmarks.timing import spread
from ganscale.checkpoints.background_writer import CheckpointWriter, HostMemory
from ganscale.checkpoints.checkpoint import write_checkpoint
from ganscale.checkpoints.retention import prune
from ganscale.runtime import Runtime
from ganscale.schema import CheckpointConfig
from ganscale.training.state import TrainingState

KEEP = CheckpointConfig(keep_last=1)


@dataclass(frozen=True)
class Case:
    """width: of both networks, which determines the size of the state"""

    name: str
    width: int
    batch: int
    rounds: int


CASES = (Case("40 MB", 56, 8, 9), Case("400 MB", 176, 4, 5))
QUICK = (Case("40 MB", 56, 8, 3),)


@dataclass
class Stalls:
    """Seconds, for each round."""

    in_the_loop: list[float]
    background: list[float]
    first: float
    cycle: list[float]
    beside: list[float]  # ratio of cycles during a write to cycles without
    write: list[float]  # until everything is on disk


def seconds_of(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure(case: Case, folder: Path) -> tuple[Stalls, int]:
    """The stalls, and the bytes of a checkpoint."""
    runtime = Runtime.start()
    width = (f"generator.options.width={case.width}", f"critic.options.width={case.width}")
    cap = "generator.options.max_width=4096", "critic.options.max_width=4096"
    config = config_of("non_saturating", "resnet32", case.batch, *width, *cap)
    cycle = Ours(config, runtime, random_images(config, runtime.device))
    state = cycle.state

    def cycles(count: int) -> float:
        def run() -> None:
            for _ in range(count):
                cycle()
            if torch.cuda.is_available():
                torch.cuda.synchronize()

        return seconds_of(run)

    cycles(2)
    writer = CheckpointWriter(folder, KEEP)
    stalls = Stalls([], [], saved_by(writer, state), [], [], [])
    writer.finish()
    for _ in range(case.rounds):
        stalls.in_the_loop.append(seconds_of(lambda: save_in_the_loop(folder, state)))
        stalls.cycle.append(cycles(2) / 2)
        count = 1 + round(stalls.in_the_loop[-1] / stalls.cycle[-1])
        alone = cycles(count)
        started = time.perf_counter()
        stalls.background.append(saved_by(writer, state))
        beside = cycles(count)
        writer.finish()
        stalls.write.append(time.perf_counter() - started)
        stalls.beside.append(beside / alone)
        state.images_seen += 1  # another folder name next time
    (written,) = folder.iterdir()
    return stalls, sum(path.stat().st_size for path in written.iterdir())


def saved_by(writer: CheckpointWriter, state: TrainingState) -> float:
    return seconds_of(lambda: writer.save(state.images_seen, state.files(), state.numbers()))


def save_in_the_loop(folder: Path, state: TrainingState) -> None:
    files, _ = HostMemory().copy(state.files())
    written = write_checkpoint(folder, state.images_seen, files, json.dumps(state.numbers()))
    prune(folder, KEEP, verified=written)
    state.images_seen += 1


def rows_of(case: Case) -> list[Row]:
    with tempfile.TemporaryDirectory() as name:
        stalls, size = measure(case, Path(name))
    loop, background, cycle = (
        1e3 * statistics.median(seconds)
        for seconds in (stalls.in_the_loop, stalls.background, stalls.cycle)
    )
    ratios = [a / b for a, b in zip(stalls.in_the_loop, stalls.background, strict=True)]
    shares = [100 * a / b for a, b in zip(stalls.background, stalls.cycle, strict=True)]
    note = (
        f"{loop:.0f} ms against {background:.1f} ms, of {size / 1e6:.0f} MB; the first save of a "
        f"session {1e3 * stalls.first:.0f} ms"
    )
    of_cycle = f"of {cycle:.0f} ms for {case.batch} images; in the loop {100 * loop / cycle:.0f} %"
    beside = f"until {statistics.median(stalls.write):.2f} s, when it is on disk"
    percent = [100 * ratio for ratio in stalls.beside]
    return [
        Row(f"stall, {case.name}", "in the loop", *spread(ratios), "x", note),
        Row(f"stall of a cycle, {case.name}", "", *spread(shares), "%", of_cycle),
        Row(f"cycles beside a write, {case.name}", "without", *spread(percent), "%", beside),
    ]


def main() -> None:
    options = arguments(__doc__)
    torch.set_num_threads(1)
    cases = QUICK if options.quick else CASES
    report([row for case in cases for row in rows_of(case)], options.json)


if __name__ == "__main__":
    main()
