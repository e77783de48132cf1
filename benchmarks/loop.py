"""How much of the bare step's speed a whole run keeps.

    python -m benchmarks.loop [--quick] [--json FILE]

`ganscale train` as users run it, with shards read and decoded by another process, meters, the
panel, W&B (offline), the EMA, sample grids, audits and checkpoints, against its own cycle alone on
a batch in memory. Both are in one process and take turns, a block of cycles each, so other load on
the machine affects both. While the bare steps run, the loader fills its few batches and waits, as
it does during training.

- `demo`: configs/demo.yaml, the bundled digits
- `bce_dcgan32`: the lightest step, one critic step per image, on the bundled emoji
- `wgan_gp_resnet32`: a heavy one

The ratio is images per second of the run over those of the bare step, in percent: the median over
periods from one checkpoint to the next; low and high are its quartiles. Reporting takes the same
time however small the networks are, so its intervals are set by time: a row about every 4 seconds,
samples about every 20, an audit and a checkpoint about every 40 (--quick: 8; on a GPU, 2). That is
as often as on a GPU with the default intervals. torch has one thread; the loader has a process with
`data.workers` threads, which "cores used" does not include.
"""

import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.ours import CONFIGS, Ours, cycles_within
from benchmarks.report import Row, arguments, table, write
from benchmarks.timing import spread
from ganscale.cli.main import main as ganscale
from ganscale.config import resolve
from ganscale.data.batch import Batch
from ganscale.runtime import Runtime
from ganscale.training.cycle import Cycle
from ganscale.training.device_batch import DeviceBatch
from ganscale.training.trainer import Trainer


@dataclass(frozen=True)
class Case:
    """block_cycles: cycles per turn and per logged row, on a CPU; blocks: turns per period;
    block_seconds: of such a turn, on a GPU"""

    name: str
    data: str
    settings: tuple[str, ...]
    block_cycles: int
    blocks: int
    periods: int
    block_seconds: float = 4.0


_SMALL = ("generator.options.width=32", "critic.options.width=32", "generator.latent_dim=64")
_BCE = (
    str(CONFIGS / "resnet32.yaml"),
    str(CONFIGS / "objective" / "non_saturating.yaml"),
    "generator.target=dcgan",
    "critic.target=dcgan",
    *_SMALL,
)
CASES = (
    Case("demo", "mnist", (str(CONFIGS / "demo.yaml"),), 80, 10, 5),
    Case("bce_dcgan32", "emoji", _BCE, 60, 10, 5),
    Case("wgan_gp_resnet32", "emoji", (str(CONFIGS / "resnet32.yaml"), *_SMALL), 4, 10, 3),
)
QUICK = (Case("demo", "mnist", (str(CONFIGS / "demo.yaml"),), 25, 8, 2),)
QUICK_ON_GPU = tuple(
    replace(case, blocks=4, periods=2, block_seconds=0.5) for case in (CASES[0], CASES[2])
)


@dataclass(frozen=True)
class Clocks:
    """Seconds: wall-clock time, processor time of this thread, of all threads."""

    wall: float
    thread: float
    process: float

    @classmethod
    def read(cls) -> "Clocks":
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return cls(time.perf_counter(), time.thread_time(), time.process_time())

    def since(self, before: "Clocks") -> "Clocks":
        return Clocks(
            self.wall - before.wall, self.thread - before.thread, self.process - before.process
        )

    @classmethod
    def total(cls, clocks: Sequence["Clocks"]) -> "Clocks":
        return cls(
            sum(clock.wall for clock in clocks),
            sum(clock.thread for clock in clocks),
            sum(clock.process for clock in clocks),
        )


class TakesTurns(Cycle):
    """A run's cycle that, at the start of every block, first runs as many bare cycles."""

    def __init__(self, trainer: Trainer, block_cycles: int) -> None:
        super().__init__(trainer.config, trainer.objective, trainer.runtime, trainer.state)
        self.training: list[Clocks] = []
        self.bare: list[Clocks] = []
        self._block_cycles = block_cycles
        self._blocks_begun = 0
        self._began: Clocks | None = None
        self._ours: Ours | None = None

    def run(self, batches: Sequence[Batch | DeviceBatch], **settings: Any) -> dict[str, Tensor]:
        if self.state.steps == self._blocks_begun * self._block_cycles:
            self._switch(batches[0])
            self._blocks_begun += 1
        return super().run(batches, **settings)

    def _switch(self, batch: Batch | DeviceBatch) -> None:
        now = Clocks.read()
        if self._began is not None:
            self.training.append(now.since(self._began))
        if self._ours is None:
            images = self.to_device(batch).images.clone()
            self._ours = Ours(self.config, self.runtime, images)
            self._ours()
            self._ours()
        batches = [self._ours.batches() for _ in range(self._block_cycles)]  # as a loader does
        began = Clocks.read()
        for each in batches:
            self._ours.run(each)
        self.bare.append(Clocks.read().since(began))
        self._began = Clocks.read()


def measure(case: Case) -> Row:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with contextlib.redirect_stdout(sys.stderr):
            if ganscale(["shards", "write", f"bundled:{case.data}", str(folder / "data")]) != 0:
                raise RuntimeError("writing the shards failed")
        probe = resolve([*case.settings, f"data.path={folder / 'data'}"]).config
        runtime = Runtime.start()
        if runtime.device.type == "cuda":
            case = replace(case, block_cycles=cycles_within(case.block_seconds, probe, runtime))
        cycle_images = probe.objective.n_critic * probe.training.global_batch_size
        block = case.block_cycles * cycle_images
        period = case.blocks * block
        resolved = resolve(
            [
                *case.settings,
                f"data.path={folder / 'data'}",
                f"run.folder={folder / 'runs'}",
                "log.wandb=offline",
                "evaluation.every_images=0",
                "checkpoint.best=''",
                f"log.every_images={block}",
                f"samples.every_images={period // 2}",
                f"checkpoint.every_images={period}",
                f"audit.every_images={period}",
                # A block to warm up, and a cycle that ends the last block.
                f"training.total_images={block + case.periods * period + cycle_images}",
            ]
        )
        trainer = Trainer(resolved, runtime)
        cycle = trainer.cycle = TakesTurns(trainer, case.block_cycles)
        if trainer.run() != 0:
            raise RuntimeError("the run failed")
    return row_of(case, cycle)


def row_of(case: Case, cycle: TakesTurns) -> Row:
    """Of whole periods, after the first block."""
    shares: list[float] = []
    thread_shares: list[float] = []
    cores: list[tuple[float, float]] = []
    for start in range(1, 1 + case.blocks * case.periods, case.blocks):
        training = Clocks.total(cycle.training[start : start + case.blocks])
        # The mean of the bare turns before and after each block of training.
        turns = cycle.bare[start : start + case.blocks + 1]
        bare = Clocks.total([*turns[:-1], *turns[1:]])
        shares.append(50 * bare.wall / training.wall)
        thread_shares.append(50 * bare.thread / training.thread)
        cores.append((training.process / training.wall, bare.process / bare.wall))
    images = case.blocks * case.block_cycles * cycle.images
    seconds = Clocks.total(cycle.training[1:]).wall / case.periods
    note = (
        f"by the training thread's processor time {statistics.median(thread_shares):.1f} %; "
        f"cores used {statistics.median(c for c, _ in cores):.2f} (bare step "
        f"{statistics.median(c for _, c in cores):.2f}); {case.periods} periods of {images:,} "
        f"images in {seconds:.0f} s, each with {case.blocks} rows, 2 sample grids and 1 checkpoint"
    )
    return Row(case.name, "bare step", *spread(shares), "% of its images/s", note)


def main() -> None:
    options = arguments(__doc__)
    torch.set_num_threads(1)
    quick = QUICK_ON_GPU if torch.cuda.is_available() else QUICK
    rows: list[Row] = []
    for case in quick if options.quick else CASES:
        rows.append(measure(case))
        write(rows, options.json)
    print(table(rows))


if __name__ == "__main__":
    main()
