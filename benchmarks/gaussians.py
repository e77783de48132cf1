"""Which modes of a mixture of Gaussians each objective finds, by the protocol of PacGAN.

    python -m benchmarks.gaussians [--quick] [--json FILE] [--figure FILE] [--trials N]
        [--objective NAME] [--data ring8|grid25] [--images N]

`benchmarks.mixtures` has the protocol and the published results. The networks differ from the
papers'; the training uses ganscale's own steps, updaters, EMA and random numbers. With one thread
sums have a fixed order, so on one machine the seed and the images determine the result.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from benchmarks.mixtures import JUDGED_SAMPLES, MIXTURES, PUBLISHED, Mixture, judge
from benchmarks.report import Row, report
from ganscale.networks.mlp import MLPCritic, MLPGenerator
from ganscale.objectives.clipping import clip_weights, clipped_parameters
from ganscale.objectives.objective import build_objective
from ganscale.objectives.penalties import Draws
from ganscale.randomness import normal
from ganscale.runtime import Runtime
from ganscale.schedules import Schedule
from ganscale.schema import (
    ClipConfig,
    LossConfig,
    ObjectiveConfig,
    OptimizerConfig,
    PenaltyConfig,
    TrainingConfig,
)
from ganscale.training.critic_step import CriticStep
from ganscale.training.ema import ema_copy, ema_decay, update_ema
from ganscale.training.generator_step import GeneratorStep
from ganscale.training.network_setup import seeded
from ganscale.training.network_updater import NetworkUpdater, NonFiniteGuard

BATCH = 128
LATENT_DIM = 2
WIDTH = 128
HALF_LIFE_IMAGES = 200_000  # of the EMA generator, which is judged
TRIALS = 5
QUICK_OBJECTIVES, QUICK_IMAGES = ["non_saturating+r1", "wgan_gp"], 40_000
CYCLES_DRAWN_AT_ONCE = 64  # a draw costs as much for 10,000 slots as for 100


@dataclass(frozen=True)
class Recipe:
    """An objective and its hyper-parameters.

    rate: the learning rate of both networks, which decays linearly to zero
    width: of the layers of both networks
    images: points that the critic sees in training on the grid; on the ring, half as many
    """

    loss: str
    penalties: dict[str, float] = field(default_factory=dict)
    clip: float | None = None
    n_critic: int = 1
    optimizer: str = "adam"
    rate: float = 1e-3
    betas: tuple[float, float] = (0.5, 0.999)
    width: int = WIDTH
    images: int = 800_000

    def images_of(self, data: str) -> int:
        return self.images if data == "grid25" else self.images // 2

    def objective(self) -> ObjectiveConfig:
        return ObjectiveConfig(
            loss=LossConfig(self.loss),
            penalties={name: PenaltyConfig(weight) for name, weight in self.penalties.items()},
            clip=None if self.clip is None else ClipConfig(self.clip, scope="all"),
            n_critic=self.n_critic,
        )

    def optimizer_config(self, images: int) -> OptimizerConfig:
        rate = Schedule(self.rate, 0.0, images, "linear")
        return OptimizerConfig(self.optimizer, rate, list(self.betas))


# Penalties have weight 0.1, as in the WGAN-GP authors' code for this mixture. They take five critic
# steps; with two, the generator gets more steps in the same time. Learning rates are many times
# those for images: on the grid, RpGAN's high quality is 6 % at 1e-3 and 18 % at 3e-3 after 200,000.
# In five minutes, wide networks pay, and with them a penalty of a fifth, with which a critic can be
# sharper; and two critic steps, without which one seed in five ends below 90 %.
RECIPES = {
    "minimax": Recipe("minimax"),
    "non_saturating": Recipe("non_saturating"),
    "non_saturating+r1": Recipe("non_saturating", {"r1": 0.1}, rate=2e-3, betas=(0.0, 0.99)),
    "lsgan": Recipe("lsgan"),
    "wgan": Recipe("wgan", clip=0.1, n_critic=5, optimizer="rmsprop", rate=2e-3, images=3_000_000),
    "wgan_gp": Recipe(
        "wgan", {"wgan_gp": 0.1}, n_critic=2, rate=2e-3, betas=(0.5, 0.9), images=2_500_000
    ),
    "wgan_lp": Recipe(
        "wgan", {"wgan_lp": 0.1}, n_critic=2, rate=2e-3, betas=(0.5, 0.9), images=1_500_000
    ),
    "dragan": Recipe("non_saturating", {"dragan": 0.1}),
    "hinge+wgan_gp": Recipe("hinge", {"wgan_gp": 0.1}, rate=2e-3, betas=(0.0, 0.9)),
    "relativistic+r1+r2": Recipe(
        "relativistic", {"r1": 0.1, "r2": 0.1}, rate=2e-3, betas=(0.0, 0.99), images=1_000_000
    ),
    "relativistic+r1+r2_5min": Recipe(
        "relativistic",
        {"r1": 0.02, "r2": 0.02},
        n_critic=2,
        rate=8e-3,
        betas=(0.0, 0.99),
        width=256,
        images=4_200_000,
    ),
    "relativistic_average+r1": Recipe(
        "relativistic_average", {"r1": 0.1}, rate=2e-3, betas=(0.0, 0.99)
    ),
}


@dataclass(frozen=True)
class Drawn:
    """The random numbers of one cycle: critic steps, then a generator step."""

    slots: Int64[Tensor, " images"]
    real: Float[Tensor, "images 2"]
    critic_latents: Float[Tensor, "images latent_dim"]
    generator_latents: Float[Tensor, "batch latent_dim"]


def cycles(
    mixture: Mixture, seed: int, images: int, cycle_images: int, device: torch.device
) -> Iterator[Drawn]:
    """The random numbers of every cycle of the run, as functions of its slots."""
    for start in range(0, images, cycle_images * CYCLES_DRAWN_AT_ONCE):
        stop = min(start + cycle_images * CYCLES_DRAWN_AT_ONCE, images)
        slots = torch.arange(start, stop // cycle_images * cycle_images, device=device)
        last = slots.view(-1, cycle_images)[:, -BATCH:]  # of the generator step, as in the trainer
        yield from map(
            Drawn,
            slots.split(cycle_images),
            (mixture.draw(seed, slots) / mixture.scale).split(cycle_images),
            normal(seed, "latents/critic", slots, LATENT_DIM).split(cycle_images),
            normal(seed, "latents/generator", last.flatten(), LATENT_DIM).split(BATCH),
        )


@dataclass(frozen=True)
class Trained:
    """samples: of the EMA generator
    seconds: processor time
    is_finite: False if training stopped at a gradient that was not finite"""

    samples: Float[Tensor, "samples 2"]
    seconds: float
    is_finite: bool


def train(recipe: Recipe, mixture: Mixture, seed: int, images: int, runtime: Runtime) -> Trained:
    """One run of `images` images."""
    started = time.process_time()
    with seeded(seed, "initial weights"):
        generator = MLPGenerator(LATENT_DIM, (2,), width=recipe.width).to(runtime.device)
        critic = MLPCritic((2,), width=recipe.width).to(runtime.device)
    ema = ema_copy(generator)
    objective = build_objective(recipe.objective())
    training = TrainingConfig(images, BATCH)
    optimizer = recipe.optimizer_config(images)
    non_finite_guard = NonFiniteGuard(runtime.device)

    def updater(name: str, step: CriticStep | GeneratorStep, network: nn.Module) -> NetworkUpdater:
        return NetworkUpdater(name, step, network, optimizer, training, runtime, non_finite_guard)

    critic_updater = updater("critic", CriticStep(critic, objective, "float32"), critic)
    generator_updater = updater(
        "generator", GeneratorStep(generator, critic, objective, "float32"), generator
    )
    clipped = clipped_parameters(critic, objective.clip.scope) if objective.clip else []

    cycle_images = recipe.n_critic * BATCH
    seen = 0
    for drawn in cycles(mixture, seed, images, cycle_images, runtime.device):
        # Fakes and points of all critic steps at once: the generator does not change meanwhile.
        with torch.no_grad():
            fake = generator(drawn.critic_latents)
        draws = Draws(seed, drawn.slots)
        points = objective.penalty_points(drawn.real, fake, draws, update=0)
        for step in range(recipe.n_critic):
            rows = slice(step * BATCH, (step + 1) * BATCH)
            inputs = {
                "real_images": drawn.real[rows],
                "fake_images": fake[rows],
                "labels": None,
                "points": {name: images[rows] for name, images in points.items()},
            }
            critic_updater.update(inputs, seen)
            if objective.clip:
                clip_weights(clipped, objective.clip.value)
            seen += BATCH
        inputs = {
            "latents": drawn.generator_latents,
            "real_images": drawn.real[-BATCH:],
            "labels": None,
        }
        generator_updater.update(inputs, seen)
        decay = ema_decay(cycle_images, seen - cycle_images, HALF_LIFE_IMAGES, ramp_up=0.05)
        update_ema(ema, generator, decay)
    judged = torch.arange(JUDGED_SAMPLES, device=runtime.device)
    with torch.no_grad():
        samples = ema(normal(seed, "latents/judged", judged, LATENT_DIM)) * mixture.scale
    return Trained(samples.cpu(), time.process_time() - started, not non_finite_guard.has_tripped())


def rows_of(objective: str, data: str, runs: list[Trained]) -> list[Row]:
    """Modes and quality as ratios of ours to the best published ones, and the seconds: means over
    the seeds, from the lowest to the highest.

    The rival in quality is the best one that covers nine tenths of the modes, because high quality
    is easy on few modes.
    """
    mixture = MIXTURES[data]()
    scores = [judge(run.samples, mixture) for run in runs]
    most = max(PUBLISHED[data], key=lambda p: p.modes)
    covering = [p for p in PUBLISHED[data] if p.modes >= 0.9 * len(mixture.modes)]
    finest = max(covering, key=lambda p: p.high_quality)
    non_finite = "" if all(run.is_finite for run in runs) else "; a gradient was not finite"

    def row(what: str, rival: str, ours: list[float], theirs: float, unit: str, note: str) -> Row:
        ratios = [own / theirs for own in ours]
        spread = (min(ratios), max(ratios)) if len(runs) > 1 else (None, None)
        return Row(f"{objective}/{data}/{what}", rival, fmean(ratios), *spread, unit, note)

    modes = [float(score.modes) for score in scores]
    quality = [100 * score.high_quality for score in scores]
    return [
        row("modes", most.method, modes, most.modes, "ours / theirs",
            f"{_mean(modes)} of {len(mixture.modes)}, published {most.modes:g}{non_finite}"),
        row("high_quality", finest.method, quality, finest.high_quality, "ours / theirs",
            f"{_mean(quality)} %, published {finest.high_quality:g} %"),
        row("seconds", "", [run.seconds for run in runs], 1, "s of processor time", ""),
    ]  # fmt: skip


def _mean(values: list[float]) -> str:
    """With the standard deviation over the seeds, if there are several."""
    deviation = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
    return f"{fmean(values):.1f}{deviation}"


def draw_figure(samples: dict[str, dict[str, Tensor]], file: Path) -> None:
    """A panel for each data set and objective, and one for the mixture itself."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(6, 1 + max(map(len, samples.values())))
    panels: list[tuple[str, str, Tensor]] = []
    for data, by_objective in samples.items():
        mixture = MIXTURES[data]()
        real = mixture.draw(0, torch.arange(JUDGED_SAMPLES))
        of_data = [(data, "the mixture", real)]
        for name, points in by_objective.items():
            score = judge(points, mixture)
            share = f"{100 * score.high_quality:.0f} %"
            of_data.append((data, f"{name}\n{score.modes} modes, {share}", points))
        panels += of_data + [(data, "", torch.empty(0, 2))] * (-len(of_data) % columns)
    rows = len(panels) // columns
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(2 * columns, 2.3 * rows), squeeze=False, layout="constrained"
    )
    for axis, (data, title, points) in zip(axes.flat, panels, strict=True):
        limit = float(MIXTURES[data]().modes.abs().max()) * 1.3
        axis.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xticks=[], yticks=[])
        axis.set_title(title, fontsize=8)
        axis.axis("on" if title else "off")
        axis.scatter(*points.T.numpy(), s=1.5, linewidths=0, alpha=0.5, color="#1f4e79")
    figure.savefig(file, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gaussians",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="a smaller run, within a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw all samples (PNG)")
    parser.add_argument("--trials", type=int, help="seeds 0, 1, ... of each (5; --quick: 1)")
    parser.add_argument("--objective", choices=RECIPES, action="append", help="only these")
    parser.add_argument("--data", choices=MIXTURES, action="append", help="only these")
    parser.add_argument("--images", type=int, help="in each run, instead of its default")
    options = parser.parse_args()
    torch.set_num_threads(1)
    runtime = Runtime.start()
    objectives = options.objective or (QUICK_OBJECTIVES if options.quick else list(RECIPES))
    datasets = options.data or list(MIXTURES)
    trials = options.trials or (1 if options.quick else TRIALS)

    rows: list[Row] = []
    samples: dict[str, dict[str, Tensor]] = {data: {} for data in datasets}
    for data, objective in itertools.product(datasets, objectives):
        recipe = RECIPES[objective]
        images = options.images or (QUICK_IMAGES if options.quick else recipe.images_of(data))
        runs = []
        for seed in range(trials):
            runs.append(train(recipe, MIXTURES[data](), seed, images, runtime))
            score = judge(runs[-1].samples, MIXTURES[data]())
            print(f"{objective}/{data}, seed {seed}: {score}", file=sys.stderr)
        rows += rows_of(objective, data, runs)
        samples[data][objective] = runs[0].samples
    report(rows, options.json)
    if options.figure:
        draw_figure(samples, options.figure)


if __name__ == "__main__":
    main()
