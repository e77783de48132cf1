"""Networks that need more memory than there is. They take the options of any network."""

import os

import torch
from torch import Tensor, nn

from ganscale.evaluation.sampling import CHUNK_SIZE

_PEBIBYTE = 1 << 50


class HungryCritic(nn.Module):
    """`largest_batch` fits: by default what the trial before a run takes."""

    def __init__(
        self, sample_shape: tuple[int, int, int], *, largest_batch: int = 32, **_: object
    ) -> None:
        super().__init__()
        channels, height, width = sample_shape
        self.layer = nn.Linear(channels * height * width, 1)
        self.largest_batch = largest_batch

    def forward(self, images: Tensor) -> Tensor:
        if len(images) > self.largest_batch:
            torch.empty(_PEBIBYTE, dtype=torch.uint8, device=images.device)
        return self.layer(images.flatten(1)).squeeze(1)


class HungryGenerator(nn.Module):
    """With the environment variable IS_HUNGRY, it cannot make samples."""

    def __init__(self, latent_dim: int, sample_shape: tuple[int, int, int], **_: object) -> None:
        super().__init__()
        self.sample_shape = sample_shape
        channels, height, width = sample_shape
        self.layer = nn.Linear(latent_dim, channels * height * width)

    def forward(self, latents: Tensor) -> Tensor:
        is_sampling = not self.training and len(latents) == CHUNK_SIZE
        if is_sampling and "IS_HUNGRY" in os.environ:
            torch.empty(_PEBIBYTE, dtype=torch.uint8, device=latents.device)
        return self.layer(latents).tanh().view(-1, *self.sample_shape)
