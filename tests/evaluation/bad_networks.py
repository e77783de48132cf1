"""Networks of runs whose evaluations fail, or take long."""

import time

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ganscale.networks.dcgan import DCGANGenerator
from tests.helpers.feature_networks import Projection


class NaNWhenEvaluated(DCGANGenerator):
    """As if its batch norms' statistics had overflowed: trains, but samples are not finite."""

    def forward(
        self,
        latents: Float[Tensor, "batch latent_dim"],
        labels: Int64[Tensor, "batch"] | None = None,
    ) -> Float[Tensor, "batch channels height width"]:
        images = super().forward(latents, labels)
        return images if self.training else torch.full_like(images, torch.nan)


class Slow(Projection):
    """seconds: that it takes for a batch"""

    def __init__(self, sample_shape: tuple[int, int, int], seconds: float) -> None:
        super().__init__(sample_shape)
        self._seconds = seconds

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        time.sleep(self._seconds)
        return super().features(images)
