"""Tries a generator whose penalties are taken from its styles."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from ganscale.errors import UserError
from ganscale.networks.styles import (
    check_has_own_gradients,
    check_has_styles,
    run_styles,
    run_synthesis,
)
from ganscale.random import drawing
from ganscale.runtime import autocast
from ganscale.schedules import ends
from ganscale.schema import ObjectiveConfig
from ganscale.training.network_function import Subject, check_second_derivatives, is_close


def check_penalized_layers(generator: nn.Module, config: ObjectiveConfig) -> None:
    """Raises UserError for a generator with which a penalty of `config` cannot be taken."""
    for name, penalty in config.generator_penalties.items():
        if max(ends(penalty.weight)) > 0:
            what = f"`objective.generator_penalties.{name}`"
            check_has_styles(generator, what)
            check_has_own_gradients(generator, what)


@torch.no_grad()
def check_forward_is_synthesis(subject: Subject) -> None:
    """Raises UserError for a generator whose forward makes other images than its two methods."""
    draws = drawing(0, ("trial",), subject.slots)
    with draws, autocast(subject.inputs.device, subject.precision):
        styles = run_styles(subject.network, subject.inputs, subject.labels)
        images = run_synthesis(subject.network, styles)
    expected = subject.run()
    is_image = isinstance(images, Tensor) and images.shape == expected.shape
    if not is_image or not is_close(subject, images, expected):
        raise UserError(
            f"{subject.name} makes other images in its forward than in "
            "synthesis(styles(latents, labels)): make forward return that"
        )


def check_second_derivatives_by_styles(subject: Subject) -> None:
    """Raises UserError where those of a generator's images are wrong."""
    with torch.no_grad(), drawing(0, ("trial",), subject.slots):
        styles = run_styles(subject.network, subject.inputs, subject.labels)
    network = _Synthesis(subject.network)
    check_second_derivatives(replace(subject, network=network, inputs=styles, labels=None, order=2))


class _Synthesis(nn.Module):
    """Styles to images."""

    def __init__(self, generator: nn.Module) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, styles: Tensor) -> Tensor:
        return run_synthesis(self.generator, styles)
