"""A rank's share of a global batch on its device, and the random numbers that come with it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from jaxtyping import Float, Int64
from torch import Tensor

from ganscale.data.images.preprocessing import FLIP
from ganscale.objectives.objective import Objective
from ganscale.randomness import Draw
from ganscale.schema import Config
from ganscale.training.augmentation import augmentation_draws

CRITIC_LATENTS, GENERATOR_LATENTS = "latents/critic", "latents/generator"


@dataclass(frozen=True)
class DeviceBatch:
    """This rank's share of a global batch, ready for the networks."""

    images: Float[Tensor, "batch channels height width"]  # in [-1, 1]
    labels: Int64[Tensor, " batch"] | None  # None in unconditional training
    slots: Int64[Tensor, " batch"]
    draws: Mapping[str, Float[Tensor, "batch columns"]] = field(default_factory=dict[str, Tensor])
    """Random numbers that were made ahead, by purpose; others are made when they are needed."""


def draws_ahead(config: Config, objective: Objective) -> tuple[Draw, ...]:
    """The random numbers of a batch that a loader makes while the device trains: there, a single
    draw takes a hundred launches. Noise per element is not among them: a device makes it faster."""
    latent_dim = config.generator.latent_dim
    draws = [Draw(CRITIC_LATENTS, latent_dim, is_normal=True)]
    if not config.training.reuse_fakes:
        draws.append(Draw(GENERATOR_LATENTS, latent_dim, is_normal=True))
    if config.data.flip:
        draws.append(FLIP)
    purposes = [p for each in objective.penalties.values() for p in each.penalty.draws]
    of_penalties = map(Draw, dict.fromkeys(purposes))
    return (*draws, *of_penalties, *augmentation_draws(config, objective))
