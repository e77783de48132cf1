"""How steps call networks: the critic on augmented images, and both within `drawing`."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from ganscale.augmentation.transformations import Drawn, Pipeline
from ganscale.random import drawing
from ganscale.runtime import has_cheap_launches
from ganscale.schema import TrainingConfig

Critic = Callable[[Tensor, Tensor | None], Tensor]
Forward = Callable[[Critic, Tensor, Tensor | None], Tensor]
"""Of a critic, images and labels."""

CRITIC_STEP, GENERATOR_STEP = "critic step", "generator step"

_FEW_PIXELS = 1 << 18  # 64 images of 64x64 pixels; no other number was tried on a GPU


def generator_draws(seed: int, step: str, slots: Tensor | None) -> AbstractContextManager[None]:
    """Around a forward of the generator in `CRITIC_STEP` or `GENERATOR_STEP`."""
    return drawing(seed, (f"{step}/generator",), slots)


@dataclass(frozen=True)
class CriticForwards:
    """step: `CRITIC_STEP` or `GENERATOR_STEP`, which draw other numbers
    seed: of what the critic draws
    pipeline: what augments images in front of the critic
    """

    step: str
    seed: int
    pipeline: Pipeline | None

    def of(
        self,
        kinds: tuple[str, ...],
        augmentation: dict[str, Drawn] | None,
        slots: Tensor | None,
        drawn_as: tuple[str, ...] | None = None,
    ) -> Forward:
        """For a batch of images of these kinds, one after the other.

        augmentation: what was drawn for each kind
        slots: of the images of each kind; None for a critic that does not draw
        drawn_as: in place of the kinds, for what the critic draws
        """
        pipeline, drawn = self.pipeline, dict[str, Tensor]()
        if pipeline is not None and augmentation is not None:
            parts = [augmentation[kind] for kind in kinds]
            drawn = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        purposes = tuple(f"{self.step}/{kind}" for kind in drawn_as or kinds)

        def forward(critic: Critic, images: Tensor, labels: Tensor | None) -> Tensor:
            if pipeline is not None and augmentation is not None:
                images = pipeline(images, drawn)
            with drawing(self.seed, purposes, slots):
                return critic(images, labels)

        return forward


def precisions(training: TrainingConfig) -> tuple[str, str]:
    """(of the steps, of their penalties)"""
    is_autocast = training.penalty_precision == "autocast"
    return training.precision, training.precision if is_autocast else "float32"


def has_one_precision(precision: str, penalty_precision: str) -> bool:
    """Whether losses and penalties are computed in the same precision."""
    return (precision == "bfloat16") == (penalty_precision == "bfloat16")


def saves_launches(images: Tensor) -> bool:
    """Whether launching another forward of this many images would take longer than computing it.

    This depends on the ranks and micro-batches over which a batch is split, so that it must not
    decide on the precision of anything.
    """
    is_small = images.shape[0] * images.shape[2:].numel() <= _FEW_PIXELS
    return is_small and not has_cheap_launches(images.device)


def twice(labels: Tensor | None) -> Tensor | None:
    return None if labels is None else torch.cat([labels, labels])
