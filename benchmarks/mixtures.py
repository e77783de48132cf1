"""Two mixtures of Gaussians, how samples of them are judged, and published results.

The mixtures are from VEEGAN (Srivastava et al. 2017, arXiv:1705.07761), the protocol is from
PacGAN's experiments on them (Lin et al. 2018, arXiv:1712.04086).
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ganscale.randomness import normal, random_words

JUDGED_SAMPLES = 2_500


@dataclass(frozen=True)
class Mixture:
    """Equally likely spherical Gaussians.

    modes: (modes, 2) their centres
    scale: networks see points divided by it, which have about unit variance
    """

    modes: Float[Tensor, "modes 2"]
    deviation: float
    scale: float

    def draw(self, seed: int, slots: Int64[Tensor, " batch"]) -> Float[Tensor, "batch 2"]:
        """The sample of each slot."""
        chosen = random_words(seed, "mode", slots, 1)[:, 0] % len(self.modes)
        return self.modes.to(slots.device)[chosen] + self.deviation * normal(
            seed, "point", slots, 2
        )


def ring8() -> Mixture:
    angles = torch.arange(8) * (2 * math.pi / 8)
    return Mixture(torch.stack([angles.cos(), angles.sin()], dim=1), deviation=0.01, scale=0.7)


def grid25() -> Mixture:
    line = torch.arange(-4.0, 5.0, 2.0)
    return Mixture(torch.cartesian_prod(line, line), deviation=0.05, scale=2.8)


MIXTURES = {"ring8": ring8, "grid25": grid25}


@dataclass(frozen=True)
class Score:
    """modes: the number covered; high_quality: the fraction of samples that have it"""

    modes: int
    high_quality: float


def judge(samples: Float[Tensor, "samples 2"], mixture: Mixture) -> Score:
    """PacGAN's protocol: a sample is of high quality within three deviations of its nearest mode,
    and one such sample covers a mode. For the mixture itself that is 1 - exp(-9/2) = 98.9 %."""
    distances, nearest = torch.cdist(samples, mixture.modes).min(dim=1)
    is_high_quality = distances <= 3 * mixture.deviation
    covered = nearest[is_high_quality].unique()
    return Score(len(covered), float(is_high_quality.float().mean()))


@dataclass(frozen=True)
class Published:
    """A published result: method and paper, modes, and high quality in percent."""

    method: str
    modes: float
    high_quality: float


PUBLISHED = {
    "ring8": [
        Published("GAN (VEEGAN paper)", 1, 99.3),
        Published("ALI (VEEGAN paper)", 2.8, 0.13),
        Published("Unrolled GAN (VEEGAN paper)", 7.6, 35.6),
        Published("VEEGAN (VEEGAN paper)", 8, 52.9),
        Published("GAN (PacGAN paper)", 6.3, 98.2),
        Published("PacGAN2 (PacGAN paper)", 7.9, 95.6),
        Published("PacGAN4 (PacGAN paper)", 7.8, 95.9),
    ],
    "grid25": [
        Published("GAN (VEEGAN paper)", 3.3, 0.5),
        Published("ALI (VEEGAN paper)", 15.8, 1.6),
        Published("Unrolled GAN (VEEGAN paper)", 23.6, 16),
        Published("VEEGAN (VEEGAN paper)", 24.6, 40),
        Published("GAN (PacGAN paper)", 17.3, 94.8),
        Published("PacGAN2 (PacGAN paper)", 23.8, 91.3),
        Published("PacGAN4 (PacGAN paper)", 24.8, 93.6),
    ],
}
