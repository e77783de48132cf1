"""Losses and penalties as they are written in loops without ganscale."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss, relu

Score = Callable[[Tensor], Tensor]  # images -> logits


class Loss(NamedTuple):
    """critic: (real_logits, fake_logits) -> terms, each differentiable on its own
    generator: (fake_logits, real_logits or None) -> scalar
    """

    critic: Callable[[Tensor, Tensor], list[Tensor]]
    generator: Callable[[Tensor, Tensor | None], Tensor]
    generator_needs_real: bool = False


def _bce(label: float, logits: Tensor) -> Tensor:
    return binary_cross_entropy_with_logits(logits, torch.full_like(logits, label))


def _mse(label: float, logits: Tensor) -> Tensor:
    return 0.5 * mse_loss(logits, torch.full_like(logits, label))


def _relativistic_average(higher: Tensor, lower: Tensor) -> Tensor:
    return _bce(1, higher - lower.mean()) + _bce(0, lower - higher.mean())


def _required(logits: Tensor | None) -> Tensor:
    assert logits is not None
    return logits


LOSSES = {
    "minimax": Loss(
        lambda real, fake: [_bce(1, real), _bce(0, fake)], lambda fake, _: -_bce(0, fake)
    ),
    "non_saturating": Loss(
        lambda real, fake: [_bce(1, real), _bce(0, fake)], lambda fake, _: _bce(1, fake)
    ),
    "lsgan": Loss(
        lambda real, fake: [_mse(1, real), _mse(0, fake)],
        lambda fake, _: _mse(1, fake),
    ),
    "wgan": Loss(lambda real, fake: [-real.mean(), fake.mean()], lambda fake, _: -fake.mean()),
    "hinge": Loss(
        lambda real, fake: [relu(1 - real).mean(), relu(1 + fake).mean()],
        lambda fake, _: -fake.mean(),
    ),
    "relativistic": Loss(
        lambda real, fake: [_bce(1, real - fake)],
        lambda fake, real: _bce(1, fake - _required(real)),
        generator_needs_real=True,
    ),
    "relativistic_average": Loss(
        lambda real, fake: [_relativistic_average(real, fake)],
        lambda fake, real: _relativistic_average(fake, _required(real)),
        generator_needs_real=True,
    ),
}


def penalty(name: str, score: Score, real: Tensor, fake: Tensor) -> Tensor:
    """The penalty named `name`; `fake` has no graph."""
    points = real
    if name in ("wgan_gp", "wgan_lp"):
        epsilon = torch.rand(len(real), 1, 1, 1, device=real.device)
        points = epsilon * real + (1 - epsilon) * fake
    elif name == "dragan":
        epsilon = torch.rand(len(real), 1, 1, 1, device=real.device)
        noise = torch.rand_like(real)
        points = real + epsilon * 0.5 * real.std(correction=0) * noise
    elif name == "r2":
        points = fake
    points = points.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(score(points).sum(), points, create_graph=True)
    norm = gradient.flatten(1).norm(dim=1)
    if name == "wgan_lp":
        return relu(norm - 1).square().mean()
    if name in ("r1", "r2"):
        return 0.5 * gradient.flatten(1).square().sum(1).mean()
    return (norm - 1).square().mean()


@torch.no_grad()
def clip(parameters: Sequence[nn.Parameter], value: float) -> None:
    for parameter in parameters:
        parameter.clamp_(-value, value)
