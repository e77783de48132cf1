"""The curve of the adaptive augmentation controller on 292 images, undisturbed and killed.

    python -m benchmarks.adaptive [--quick] [--json FILE] [--figure FILE]

A DCGAN of width 32 trains with R1 on every 13th of the bundled emoji, so few that the critic
memorizes them. Then the same run is killed with -9 between two checkpoints and started again.

- `sign_rate`: the mean and range of r_t in the second half of the run; the target is 0.6
- `probability`: that of augmentation at the end
- `killed`: the largest difference that the kill made to a tensor of the last checkpoint or to a
  point of the curve. The exit code is 1 unless it is 0
"""

import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.data_sets import emoji_pngs, write_loose
from benchmarks.faults.judging import largest_difference
from benchmarks.faults.session import Session
from benchmarks.ours import CONFIGS
from benchmarks.report import Row, argument_parser, report
from ganscale.checkpoints.checkpoint import checkpoint_folders
from ganscale.cli.main import main as ganscale
from ganscale.run_folder import read_json_lines

TARGET = 0.6
IMAGES = 120_000
CHECKPOINT = 20_000
LOG = 1280
SECONDS = 1200
"""After which a run that has not ended counts as hanging."""
_QUICK = 20
"""The short form has this fraction of the images; its controller is as much faster."""

Curve = list[tuple[int, float, float]]
"""Points of (images seen, r_t, probability)."""


def settings_of(data: Path, run: Path, fraction: int) -> list[str]:
    networks = [f"{role}.options.width=32" for role in ("generator", "critic")]
    rates = [f"optimizer.{role}.learning_rate=1e-3" for role in ("generator", "critic")]
    return [
        str(CONFIGS / "demo.yaml"),
        str(CONFIGS / "objective" / "r1.yaml"),
        *networks,
        *rates,
        f"run.folder={run.parent}",
        f"run.name={run.name}",
        f"data.path={data}",
        "data.channels=3",
        "data.resolution=32",
        "data.flip=false",
        "augmentation.pipeline=ada",
        f"augmentation.adaptive.target={TARGET}",
        "augmentation.adaptive.every_images=256",
        f"augmentation.adaptive.full_images={30_000 // fraction}",
        "objective.penalties.r1.weight=0.1",
        f"training.total_images={IMAGES // fraction}",
        "training.global_batch_size=32",
        "evaluation.every_images=0",
        f"log.every_images={LOG // fraction}",
        "log.wandb=disabled",
        f"checkpoint.every_images={CHECKPOINT // fraction}",
        "checkpoint.best=''",
    ]


def curve_of(run: Path) -> Curve:
    rows = read_json_lines(run / "metrics.jsonl")
    names = "progress/images_seen", "augment/sign_rate", "augment/probability"
    return [
        (int(row[names[0]]), row[names[1]], row[names[2]])
        for row in rows
        if all(name in row for name in names)
    ]


def checkpoints_of(run: Path) -> list[Path]:
    return checkpoint_folders(run / "checkpoints")


def train(folder: Path, settings: Sequence[str]) -> None:
    """folder: a new one, for the output"""
    Session(folder, settings, 1).expect_end(0, SECONDS)


def train_until_killed(folder: Path, settings: Sequence[str], run: Path) -> None:
    """Kills the run after its second checkpoint and a further row."""
    session = Session(folder, settings, 1)
    session.wait_for_start(lambda: len(checkpoints_of(run)) >= 2, SECONDS)
    saved = session.images_seen() or 0
    session.wait_for_start(lambda: (session.images_seen() or 0) > saved, SECONDS)
    session.kill()


def rows_of(undisturbed: Curve, difference: float) -> list[Row]:
    second_half = [rate for _, rate, _ in undisturbed[len(undisturbed) // 2 :]]
    rate, low, high = statistics.fmean(second_half), min(second_half), max(second_half)
    return [
        Row("adaptive/sign_rate", "", rate, low, high, unit="", note=f"target {TARGET}"),
        Row("adaptive/probability", "", undisturbed[-1][2], unit=""),
        Row("adaptive/killed", "", difference, unit="difference"),
    ]


def draw_figure(undisturbed: Curve, killed: Curve, file: Path) -> None:
    """Two panels: r_t and the probability over the images, the killed run's as dots."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    titles = f"r_t (target {TARGET})", "probability"
    sketch, axes = pyplot.subplots(1, 2, figsize=(9, 2.8), layout="constrained")
    for axis, title, column in zip(axes, titles, (1, 2), strict=True):
        for points, style, label in ((undisturbed, "-", "undisturbed"), (killed, ".", "killed")):
            values = [point[column] for point in points]
            images = [point[0] / 1000 for point in points]
            axis.plot(images, values, style, linewidth=1, markersize=3, label=label)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("thousand images", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].axhline(TARGET, color="#999999", linewidth=0.8, zorder=0)
    axes[0].legend(fontsize=8, frameon=False)
    sketch.savefig(file, dpi=100)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw both curves (PNG)")
    options = parser.parse_args()
    fraction = _QUICK if options.quick else 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images, data, runs = folder / "images", folder / "data", folder / "runs"
        images.mkdir()
        write_loose(images, emoji_pngs()[::13], "png")
        if ganscale(["shards", "write", str(images), str(data)]) != 0:
            raise RuntimeError("the images could not be written")
        whole_run, killed_run = runs / "undisturbed", runs / "killed"
        train(folder / "first", settings_of(data, whole_run, fraction))
        settings = settings_of(data, killed_run, fraction)
        train_until_killed(folder / "second", settings, killed_run)
        train(folder / "third", settings)
        undisturbed, killed = curve_of(whole_run), curve_of(killed_run)
        last, expected = checkpoints_of(killed_run)[-1], checkpoints_of(whole_run)[-1]
        difference, _ = largest_difference(last, expected)
    if len(undisturbed) != len(killed):
        raise RuntimeError("the killed run has other rows")
    for one, other in zip(undisturbed, killed, strict=True):
        difference = max(difference, *(abs(a - b) for a, b in zip(one, other, strict=True)))
    report(rows_of(undisturbed, difference), options.json)
    if options.figure is not None:
        draw_figure(undisturbed, killed, options.figure)
    sys.exit(difference != 0)


if __name__ == "__main__":
    main()
