"""Whole training runs of a given length, for benchmarks that compare what they learn."""

import contextlib
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.ours import cycles_within
from ganscale.config import resolve
from ganscale.runtime import Runtime
from ganscale.schema import Config
from ganscale.training.trainer import Trainer


@dataclass(frozen=True)
class TimedRun:
    """A run that has ended.

    images: that its critic has seen
    seconds: of the whole run, with its start and its evaluations, but not from before a stop
    """

    trainer: Trainer
    images: int
    seconds: float


def images_within(seconds: float, settings: Sequence[str], runtime: Runtime) -> int:
    """The images of a run that takes about that long, by the speed of its cycles now."""
    config = resolve([*settings, "training.total_images=1"]).config
    return cycles_within(seconds, config, runtime) * _images_per_cycle(config)


def train_for(
    images: int, settings: Sequence[str], runtime: Runtime, evaluations: int = 1
) -> TimedRun:
    """Trains for at least that many images, as `ganscale train` does with these settings.

    Reports are not what is measured: there are rows, sample grids and evaluations at `evaluations`
    equal steps only, and checkpoints there. A run that was stopped continues.
    """
    per_cycle = _images_per_cycle(resolve([*settings, "training.total_images=1"]).config)
    part = -(-images // (evaluations * per_cycle)) * per_cycle
    images = part * evaluations
    intervals = {"samples": part, "evaluation": part, "log": part, "checkpoint": part}
    intervals["audit"] = images
    lengths = [f"{section}.every_images={count}" for section, count in intervals.items()]
    started = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):
        resolved = resolve([*settings, f"training.total_images={images}", *lengths])
        trainer = Trainer(resolved, runtime)
        if trainer.run() != 0:
            raise RuntimeError("the run was stopped")
    return TimedRun(trainer, images, time.perf_counter() - started)


def _images_per_cycle(config: Config) -> int:
    return config.objective.n_critic * config.training.global_batch_size
