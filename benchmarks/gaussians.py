"""Which modes of a mixture of Gaussians each objective finds, by the protocol of PacGAN.

    python -m benchmarks.gaussians [--quick] [--json FILE] [--figure FILE] [--trials N]
        [--objective NAME] [--data ring8|grid25] [--images N]

The mixtures and the score are those of VEEGAN (Srivastava et al. 2017, arXiv:1705.07761) as PacGAN
states them (Lin et al. 2018, arXiv:1712.04086, section 4.1). The networks are smaller than PacGAN's
and have no batch norm; what trains them is the package's own steps, players, average and draws. One
thread, so that sums have one order: on one machine the seed and the images decide the result.
"""

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from ganscale.networks.mlp import MLPCritic, MLPGenerator
from ganscale.objectives.clipping import clip_weights, clipped_parameters
from ganscale.objectives.objective import build_objective
from ganscale.objectives.penalties import Draws
from ganscale.randomness import normal, random_words
from ganscale.runtime import Runtime
from ganscale.schema import (
    ClipConfig,
    LossConfig,
    ObjectiveConfig,
    OptimizerConfig,
    PenaltyConfig,
    TrainingConfig,
)
from ganscale.training.ema import average_of, decay, update_average
from ganscale.training.player import Player, Tripwire
from ganscale.training.state import seeded
from ganscale.training.step import CriticStep, GeneratorStep

JUDGED_SAMPLES = 2_500
BATCH = 256
LATENT_DIM = 2
WIDTH = 128
HALF_LIFE_IMAGES = 200_000  # of the averaged generator, which is the one that is judged
CYCLES_DRAWN_AT_ONCE = 64  # a draw costs as much for 10,000 slots as for 100


@dataclass(frozen=True)
class Mixture:
    """Equally likely spherical Gaussians.

    modes: (modes, 2) their centres
    scale: what the networks see is divided by it, so that it has about unit variance
    """

    modes: Float[Tensor, "modes 2"]
    deviation: float
    scale: float

    def draw(self, seed: int, slots: Int64[Tensor, " batch"]) -> Float[Tensor, "batch 2"]:
        """The sample of each slot."""
        chosen = random_words(seed, "mode", slots, 1)[:, 0] % len(self.modes)
        return self.modes[chosen] + self.deviation * normal(seed, "point", slots, 2)


def ring8() -> Mixture:
    angles = torch.arange(8) * (2 * math.pi / 8)
    return Mixture(torch.stack([angles.cos(), angles.sin()], dim=1), deviation=0.01, scale=0.7)


def grid25() -> Mixture:
    line = torch.arange(-4.0, 5.0, 2.0)
    return Mixture(torch.cartesian_prod(line, line), deviation=0.05, scale=2.8)


MIXTURES = {"ring8": ring8, "grid25": grid25}


@dataclass(frozen=True)
class Score:
    """modes: how many have a high-quality sample; high_quality: the share of such samples, 0 to 1"""

    modes: int
    high_quality: float


def judge(samples: Float[Tensor, "samples 2"], mixture: Mixture) -> Score:
    """PacGAN, section 4.1: a sample is of high quality within three deviations of its nearest mode;
    a mode is covered by one such sample. Of the mixture itself 98.9 % are: 1 - exp(-9/2)."""
    distances, nearest = torch.cdist(samples, mixture.modes).min(dim=1)
    is_high_quality = distances <= 3 * mixture.deviation
    covered = nearest[is_high_quality].unique()
    return Score(len(covered), float(is_high_quality.float().mean()))


@dataclass(frozen=True)
class Recipe:
    """An objective and what trains it. `images` are those that the critic sees."""

    loss: str
    penalties: dict[str, float] = field(default_factory=dict)
    clip: float | None = None
    n_critic: int = 1
    optimizer: str = "adam"
    learning_rate: float = 5e-4
    betas: tuple[float, float] = (0.5, 0.99)
    images: int = 8_000_000

    def objective(self) -> ObjectiveConfig:
        return ObjectiveConfig(
            loss=LossConfig(self.loss),
            penalties={name: PenaltyConfig(weight) for name, weight in self.penalties.items()},
            clip=None if self.clip is None else ClipConfig(self.clip, scope="all"),
            n_critic=self.n_critic,
        )

    def optimizer_config(self) -> OptimizerConfig:
        return OptimizerConfig(self.optimizer, self.learning_rate, list(self.betas))


RECIPES = {
    "minimax": Recipe("minimax"),
    "non_saturating": Recipe("non_saturating"),
    "non_saturating+r1": Recipe("non_saturating", {"r1": 0.1}, betas=(0.0, 0.99)),
    "lsgan": Recipe("lsgan"),
    "wgan": Recipe("wgan", clip=0.1, n_critic=5, optimizer="rmsprop", learning_rate=2e-4),
    "wgan_gp": Recipe("wgan", {"wgan_gp": 0.1}, n_critic=5, betas=(0.5, 0.9)),
    "wgan_lp": Recipe("wgan", {"wgan_lp": 0.1}, n_critic=5, betas=(0.5, 0.9)),
    "dragan": Recipe("non_saturating", {"dragan": 0.1}),
    "hinge+wgan_gp": Recipe("hinge", {"wgan_gp": 0.1}, betas=(0.0, 0.9)),
    "relativistic+r1+r2": Recipe("relativistic", {"r1": 0.1, "r2": 0.1}, betas=(0.0, 0.99)),
    "relativistic_average+r1": Recipe("relativistic_average", {"r1": 0.1}, betas=(0.0, 0.99)),
}  # fmt: skip


@dataclass(frozen=True)
class Drawn:
    """The random numbers of one cycle: critic steps, then a generator step."""

    slots: Int64[Tensor, " images"]
    real: Float[Tensor, "images 2"]
    critic_latents: Float[Tensor, "images latent_dim"]
    generator_latents: Float[Tensor, "batch latent_dim"]


def cycles(mixture: Mixture, seed: int, images: int, cycle_images: int) -> Iterator[Drawn]:
    """What every cycle of the run draws, a function of its slots."""
    for start in range(0, images, cycle_images * CYCLES_DRAWN_AT_ONCE):
        stop = min(start + cycle_images * CYCLES_DRAWN_AT_ONCE, images)
        slots = torch.arange(start, stop // cycle_images * cycle_images)
        last = slots.view(-1, cycle_images)[:, -BATCH:]  # the generator's, as the trainer has it
        yield from map(
            Drawn,
            slots.split(cycle_images),
            (mixture.draw(seed, slots) / mixture.scale).split(cycle_images),
            normal(seed, "latents/critic", slots, LATENT_DIM).split(cycle_images),
            normal(seed, "latents/generator", last.flatten(), LATENT_DIM).split(BATCH),
        )


def train(
    recipe: Recipe, mixture: Mixture, seed: int, images: int, runtime: Runtime
) -> Float[Tensor, "samples 2"]:
    """Samples of the averaged generator after `images` images."""
    with seeded(seed, "initial weights"):
        generator = MLPGenerator(LATENT_DIM, (2,), width=WIDTH)
        critic = MLPCritic((2,), width=WIDTH)
    average = average_of(generator)
    objective = build_objective(recipe.objective())
    training = TrainingConfig(images, BATCH, schedule="linear")
    tripwire = Tripwire(runtime.device)

    def player(name: str, step: CriticStep | GeneratorStep, network: nn.Module) -> Player:
        return Player(name, step, network, recipe.optimizer_config(), training, runtime, tripwire)

    critic_player = player("critic", CriticStep(critic, objective, "float32"), critic)
    generator_player = player(
        "generator", GeneratorStep(generator, critic, objective, "float32"), generator
    )
    clipped = clipped_parameters(critic, objective.clip.scope) if objective.clip else []

    cycle_images = recipe.n_critic * BATCH
    seen = 0
    for drawn in cycles(mixture, seed, images, cycle_images):
        # The generator stands still meanwhile: fakes and points of all critic steps at once.
        with torch.no_grad():
            fake = generator(drawn.critic_latents)
        draws = Draws(seed, drawn.slots, first_slot=seen)
        points = objective.penalty_points(drawn.real, fake, draws, update=0)
        for part in range(recipe.n_critic):
            rows = slice(part * BATCH, (part + 1) * BATCH)
            inputs = {
                "real_images": drawn.real[rows],
                "fake_images": fake[rows],
                "labels": None,
                "points": {name: each[rows] for name, each in points.items()},
            }
            critic_player.update(inputs, seen)
            if objective.clip:
                clip_weights(clipped, objective.clip.value)
            seen += BATCH
        inputs = {
            "latents": drawn.generator_latents,
            "real_images": drawn.real[-BATCH:],
            "labels": None,
        }
        generator_player.update(inputs, seen)
        kept = decay(cycle_images, seen - cycle_images, HALF_LIFE_IMAGES, ramp_up=0.05)
        update_average(average, generator, kept)
    if tripwire.is_tripped():
        raise SystemExit(f"a gradient of {recipe.loss} was not finite")
    latents = normal(seed, "latents/judged", torch.arange(JUDGED_SAMPLES), LATENT_DIM)
    with torch.no_grad():
        return average(latents) * mixture.scale
