"""How good emoji of 32 pixels a recipe makes after a given time, from 3,786 images.

    python -m benchmarks.emoji [--quick] [--json FILE] [--recipe NAME] [--seeds N] [--minutes N]
        [--images N] [--folder FOLDER] [--sheets FOLDER] [--set SETTING=VALUE]

Every recipe trains for the same time, as `ganscale train` does, in one process with torch's default
number of threads (OMP_NUM_THREADS=1 for one core). The time gives a number of images, by the speed
of the recipe's cycles just before; `--images` gives it directly, so that it does not matter what
else the machine is doing. With `--folder` as well, a run that was stopped continues. At a sixth,
two sixths, ... of its images, 3,786 samples of the EMA generator are compared with all images by
the features of EfficientNet-lite0:

- KID, which does not depend on the number of samples: 0.007 between halves of the images
- fd64: the Frechet distance on the 64 main components of the images' features
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.ours import CONFIGS
from benchmarks.report import Row, argument_parser, table, write
from benchmarks.timed_runs import images_within, train_for
from ganscale.cli.main import main as ganscale
from ganscale.evaluation.figures import figure_name
from ganscale.run_folder import RunFolder, read_json_lines
from ganscale.runtime import Runtime

IMAGES = 3786
METRICS = "kid", "fd64"
EVALUATIONS = 6
_NETWORK = "efficientnet_lite0"


def _wgan_gp(network: str, rate: float) -> tuple[str, ...]:
    """The settings of configs/demo.yaml, which learn faster than the paper's."""
    options = [f"{role}.target={network}" for role in ("generator", "critic")]
    options += [f"{role}.options.width=32" for role in ("generator", "critic")]
    options += [f"optimizer.{role}.learning_rate={rate}" for role in ("generator", "critic")]
    batch = "training.global_batch_size=32", "generator.latent_dim=64", "objective.n_critic=2"
    precision = "training.precision=bfloat16", "training.penalty_precision=autocast"
    return "resnet32", *options, *batch, *precision


RECIPES: dict[str, tuple[str, ...]] = {
    "r3gan": ("r3gan_emoji32", "augmentation.pipeline=none"),
    "r3gan+augmentation": ("r3gan_emoji32",),
    "stylegan2+augmentation": ("stylegan2_emoji32",),
    "dcgan, wgan_gp": _wgan_gp("dcgan", 5e-4),
    "resnet, wgan_gp": _wgan_gp("resnet", 3e-4),
}
"""A file of configs/, and what is changed in it."""


@dataclass(frozen=True)
class Result:
    """figures: by metric, of the evaluations in their order
    seconds: of the whole run, with its start and evaluations
    """

    recipe: str
    seed: int
    figures: dict[str, list[float]]
    images: int
    seconds: float


def train(recipe: str, seed: int, folder: Path, options: argparse.Namespace) -> Result:
    """Trains on `folder`/data; copies the sample grids to the folder of sheets."""
    config, *changes = RECIPES[recipe]
    settings = [
        str(CONFIGS / f"{config}.yaml"),
        *changes,
        f"seed={seed}",
        f"data.path={folder / 'data'}",
        f"data.cache={folder / 'cache'}",
        f"run.folder={folder / 'runs'}",
        f"run.name={recipe.replace(', ', '-')}-{seed}",
        f"evaluation.samples={IMAGES}",
        f"evaluation.network={_NETWORK}",
        f"evaluation.metrics=[{','.join(METRICS)}]",
        "checkpoint.best=''",
        "log.wandb=disabled",
        *options.set,
    ]
    evaluations = EVALUATIONS
    if options.quick:
        settings += ["evaluation.samples=200", "evaluation.reference_images=200"]
        evaluations = 1
    runtime = Runtime.start()
    images = options.images or images_within(60 * options.minutes, settings, runtime)
    run = train_for(images, settings, runtime, evaluations)
    run_folder: RunFolder = run.trainer.folder
    rows = [*read_json_lines(run_folder.record)]
    names = {metric: figure_name(metric, _NETWORK) for metric in METRICS}
    figures = {m: [row[name] for row in rows if name in row] for m, name in names.items()}
    if any(len(each) != evaluations for each in figures.values()):
        raise RuntimeError(f"an evaluation of {recipe} failed: see {run_folder.path / 'log.txt'}")
    if options.sheets is not None:
        for name, images_seen, file in run_folder.sample_files():
            if name == "ema":
                sheet = options.sheets / f"{run_folder.path.name}-{images_seen}.png"
                sheet.parent.mkdir(parents=True, exist_ok=True)
                sheet.write_bytes(file.read_bytes())
    return Result(recipe, seed, figures, run.images, run.seconds)


def rows_of(results: Sequence[Result]) -> list[Row]:
    """For each recipe and evaluation, the mean over the seeds and the range."""
    rows = []
    for recipe in dict.fromkeys(each.recipe for each in results):
        runs = [each for each in results if each.recipe == recipe]
        for metric in METRICS:
            for part, values in enumerate(zip(*(run.figures[metric] for run in runs), strict=True)):
                share = f"{part + 1}/{len(runs[0].figures[metric])}"
                numbers = statistics.fmean(values), min(values), max(values)
                rows.append(Row(f"{recipe}/{metric}/{share}", "", *numbers, unit=""))
        seconds = statistics.fmean(run.seconds for run in runs)
        note = f"{runs[0].images:,} images, {len(runs)} seeds"
        rows.append(Row(f"{recipe}/minutes", "", seconds / 60, unit="min", note=note))
    return rows


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--recipe", choices=RECIPES, action="append", help="only these")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each recipe (3)")
    parser.add_argument("--minutes", type=float, default=8.0, help="of training, each (8)")
    parser.add_argument("--images", type=int, help="of training, each, instead of a time")
    parser.add_argument("--folder", type=Path, help="for the data and the runs (a temporary one)")
    parser.add_argument("--sheets", type=Path, metavar="FOLDER", help="copy sample grids there")
    parser.add_argument("--set", action="append", default=[], metavar="SETTING=VALUE")
    options = parser.parse_args()
    if options.quick:
        options.minutes, options.seeds = 0.1, 1
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder: Path = options.folder or Path(temporary)
        if ganscale(["shards", "write", "bundled:emoji", str(folder / "data")]) != 0:
            raise RuntimeError("the emoji could not be written")
        recipes = options.recipe or ([*RECIPES][:1] if options.quick else [*RECIPES])
        for seed in range(options.seeds):
            for recipe in recipes:
                results.append(train(recipe, seed, folder, options))
                print(results[-1], file=sys.stderr)
                write(rows_of(results), options.json)
    print(table(rows_of(results)))


if __name__ == "__main__":
    main()
