"""How many of StackedMNIST's 1,000 modes each objective finds, and how evenly.

    python -m benchmarks.stacked_mnist [--quick] [--json FILE] [--objective NAME] [--minutes N]

Every objective trains for the same time, as `ganscale train` does, in one process with torch's
default number of threads, which are all cores. The number of images follows from the speed of its
cycles, measured just before, since learning rates decay over the whole run. Then 26,000 samples of
the EMA generator are judged, as any run's are with `evaluation.network`: by a classifier of digits
that this benchmark trains. `benchmarks.stacked_digits` has the data, the classifier and the
published results.

- modes: classes that one sample or more is classified as
- KL: of the classes of the samples from those of the training images, in nats. Counting alone makes
  it (1,000 - 1) / 2 * (1 / 26,000 + 1 / 64,000) = 0.027 for a perfect generator.
"""

import contextlib
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.ours import CONFIGS
from benchmarks.report import Row, argument_parser, table, write
from benchmarks.stacked_digits import (
    CLASSES,
    NETWORK,
    PUBLISHED,
    SAMPLES,
    train_classifier,
    write_stacked,
)
from benchmarks.timed_runs import images_within, train_for
from ganscale.evaluation.figures import figure_name
from ganscale.runtime import Runtime

# Networks of 297,000 and 168,000 weights, small enough for minutes on two cores.
_SETTINGS = (
    "data.resolution=32",
    "data.channels=3",
    "data.block_samples=16",
    "generator.target=dcgan",
    "generator.latent_dim=64",
    "generator.options.width=32",
    "critic.target=dcgan",
    "critic.options.width=32",
    "training.global_batch_size=32",
    "training.precision=bfloat16",
    "training.penalty_precision=autocast",
    "evaluation.metrics=[modes,class_kl]",
    "evaluation.batch_size=250",
    f"evaluation.network={NETWORK}",
    "log.wandb=disabled",
)


def _adam(rate: float) -> tuple[str, ...]:
    """Rates that fall to zero along half a cosine."""
    schedule = f"{{from: {rate}, to: 0}}"
    return tuple(f"optimizer.{role}.learning_rate={schedule}" for role in ("critic", "generator"))


# Penalties of weight 1: with 0.3, RpGAN's KL was 0.45 after 60,000 images, and not 0.36.
OBJECTIVES = {
    "non_saturating": ("non_saturating", *_adam(2e-4)),
    "non_saturating+r1": ("r1", "objective.penalties.r1.weight=1", *_adam(1e-3)),
    "wgan_gp": ("wgan_gp", "objective.n_critic=2", *_adam(5e-4)),
    "relativistic+r1+r2": ("r3gan", *_adam(1e-3)),
}
"""A file of configs/objective, and what is changed in it."""


@dataclass(frozen=True)
class Size:
    """stacks: training images; samples: judged ones; seconds: of training"""

    stacks: int
    samples: int
    seconds: float


QUICK_OBJECTIVES, QUICK = ["relativistic+r1+r2"], Size(stacks=16_000, samples=2_000, seconds=10)


@dataclass(frozen=True)
class Result:
    """modes: of 1,000; divergence: KL(generated || data), in nats
    seconds: of the whole run, with its start and evaluation
    """

    objective: str
    modes: float
    divergence: float
    images: int
    seconds: float


def train(objective: str, folder: Path, weights: Path, size: Size, runtime: Runtime) -> Result:
    """Trains on `folder`/data and judges the result."""
    config_file, *changes = OBJECTIVES[objective]
    settings = [
        str(CONFIGS / "objective" / f"{config_file}.yaml"),
        *_SETTINGS,
        *changes,
        f"data.path={folder / 'data'}",
        f"data.cache={folder / 'cache'}",
        f"run.folder={folder / 'runs'}",
        f"evaluation.options.weights={weights}",
        f"evaluation.samples={size.samples}",
    ]
    run = train_for(images_within(size.seconds, settings, runtime), settings, runtime)
    modes, divergence = (
        run.trainer.newest_metrics[figure_name(metric, NETWORK)] for metric in ("modes", "class_kl")
    )
    return Result(objective, modes, divergence, run.images, run.seconds)


def rows_of(results: Sequence[Result], accuracy: float) -> list[Row]:
    """Ours beside the published ones: by modes, then by KL."""
    published = [(f"published: {each.method}", each) for each in PUBLISHED]
    found = [*((each.objective, each) for each in results), *published]
    share = f"% of {CLASSES:,}"
    return [
        *(Row(f"{name}/modes", "", 100 * x.modes / CLASSES, unit=share) for name, x in found),
        *(Row(f"{name}/KL", "", x.divergence, unit="nats") for name, x in found),
        *(
            Row(
                f"{x.objective}/minutes",
                "",
                x.seconds / 60,
                unit="min",
                note=f"{x.images:,} images",
            )
            for x in results
        ),
        Row("classifier", "", 100 * accuracy, unit="% of held-out digits"),
    ]


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--objective", choices=OBJECTIVES, action="append", help="only these")
    parser.add_argument("--minutes", type=float, default=12.0, help="of training, each (12)")
    options = parser.parse_args()
    size = QUICK if options.quick else Size(64_000, SAMPLES, 60 * options.minutes)
    objectives = options.objective or (QUICK_OBJECTIVES if options.quick else [*OBJECTIVES])
    runtime = Runtime.start()
    with tempfile.TemporaryDirectory() as name:
        folder, weights = Path(name), Path(name) / "digits.pt"
        with contextlib.redirect_stdout(sys.stderr):
            write_stacked(folder / "data", size.stacks)
        accuracy = train_classifier(weights)
        print(f"classifier: {accuracy:.1%} of the held-out digits", file=sys.stderr)
        results: list[Result] = []
        for objective in objectives:
            results.append(train(objective, folder, weights, size, runtime))
            print(results[-1], file=sys.stderr)
            write(rows_of(results, accuracy), options.json)
    print(table(rows_of(results, accuracy)))


if __name__ == "__main__":
    main()
