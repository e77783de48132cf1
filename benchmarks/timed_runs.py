"""Whole training runs of a given time, for benchmarks that compare what they learn."""

import contextlib
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.ours import cycles_within
from ganscale.config import resolve
from ganscale.runtime import Runtime
from ganscale.training.trainer import Trainer


@dataclass(frozen=True)
class TimedRun:
    """A run that has ended.

    images: that its critic has seen
    seconds: of the whole run, with its start and its evaluations
    """

    trainer: Trainer
    images: int
    seconds: float


def train_for(
    seconds: float, settings: Sequence[str], runtime: Runtime, evaluations: int = 1
) -> TimedRun:
    """Trains about that long, as `ganscale train` does with these settings.

    The number of images follows from the speed of its cycles, measured just before, since learning
    rates may decay over the whole run. Reports are not what is measured: there are rows, sample
    grids and evaluations at `evaluations` equal steps only, and a checkpoint at the end.
    """
    config = resolve([*settings, "training.total_images=1"]).config
    cycles = cycles_within(seconds, config, runtime)
    part = -(-cycles // evaluations) * config.objective.n_critic * config.training.global_batch_size
    images = part * evaluations
    intervals = dict.fromkeys(("samples", "evaluation", "log"), part)
    intervals |= dict.fromkeys(("checkpoint", "audit"), images)
    lengths = [f"{section}.every_images={count}" for section, count in intervals.items()]
    started = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):
        resolved = resolve([*settings, f"training.total_images={images}", *lengths])
        trainer = Trainer(resolved, runtime)
        if trainer.run() != 0:
            raise RuntimeError("the run was stopped")
    return TimedRun(trainer, images, time.perf_counter() - started)
