"""Losses and penalties of the papers, as training loops without ganscale write them.

The rivals train with them, and tests hold ganscale's own against them.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss, relu

Score = Callable[[Tensor], Tensor]  # images -> logits


class Loss(NamedTuple):
    """critic: (real_logits, fake_logits) -> terms, each differentiable without the others
    generator: (fake_logits, real_logits or None) -> scalar
    """

    critic: Callable[[Tensor, Tensor], list[Tensor]]
    generator: Callable[[Tensor, Tensor | None], Tensor]
    generator_needs_real: bool = False


def cross_entropy(label: float, logits: Tensor) -> Tensor:
    """-E[label log D + (1 - label) log(1 - D)], with D = sigmoid(logits)."""
    return binary_cross_entropy_with_logits(logits, torch.full_like(logits, label))


def squared_error(label: float, logits: Tensor) -> Tensor:
    return 0.5 * mse_loss(logits, torch.full_like(logits, label))


def _relative_to_means(better: Tensor, worse: Tensor) -> Tensor:
    return cross_entropy(1, better - worse.mean()) + cross_entropy(0, worse - better.mean())


def _required(logits: Tensor | None) -> Tensor:
    assert logits is not None
    return logits


LOSSES = {
    # Goodfellow et al. 2014 (arXiv:1406.2661), equation 1
    "minimax": Loss(
        lambda real, fake: [cross_entropy(1, real), cross_entropy(0, fake)],
        lambda fake, _: -cross_entropy(0, fake),
    ),
    # Goodfellow et al. 2014, section 3
    "non_saturating": Loss(
        lambda real, fake: [cross_entropy(1, real), cross_entropy(0, fake)],
        lambda fake, _: cross_entropy(1, fake),
    ),
    # Mao et al. 2017 (arXiv:1611.04076), equation 9
    "lsgan": Loss(
        lambda real, fake: [squared_error(1, real), squared_error(0, fake)],
        lambda fake, _: squared_error(1, fake),
    ),
    # Arjovsky et al. 2017 (arXiv:1701.07875), equations 2 and 3
    "wgan": Loss(lambda real, fake: [-real.mean(), fake.mean()], lambda fake, _: -fake.mean()),
    # Miyato et al. 2018 (arXiv:1802.05957), equations 16 and 17
    "hinge": Loss(
        lambda real, fake: [relu(1 - real).mean(), relu(1 + fake).mean()],
        lambda fake, _: -fake.mean(),
    ),
    # Jolicoeur-Martineau 2018 (arXiv:1807.00734), section 4.1
    "relativistic": Loss(
        lambda real, fake: [cross_entropy(1, real - fake)],
        lambda fake, real: cross_entropy(1, fake - _required(real)),
        generator_needs_real=True,
    ),
    # Jolicoeur-Martineau 2018, equations 9 to 11
    "relativistic_average": Loss(
        lambda real, fake: [_relative_to_means(real, fake)],
        lambda fake, real: _relative_to_means(fake, _required(real)),
        generator_needs_real=True,
    ),
}


def penalty(name: str, score: Score, real: Tensor, fake: Tensor) -> Tensor:
    """The penalty called `name`, from a forward of its own; fakes carry no graph."""
    at = real
    if name in ("wgan_gp", "wgan_lp"):
        share = torch.rand(len(real), 1, 1, 1, device=real.device)
        at = share * real + (1 - share) * fake
    elif name == "dragan":
        share = torch.rand(len(real), 1, 1, 1, device=real.device)
        noise = torch.rand_like(real)
        at = real + share * 0.5 * real.std(correction=0) * noise
    elif name == "r2":
        at = fake
    at = at.detach().requires_grad_()
    return penalty_of(name, score(at), at)


def penalty_of(name: str, logits: Tensor, images: Tensor) -> Tensor:
    """The penalty called `name`, from the logits of these images."""
    (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    if name in ("r1", "r2"):
        return 0.5 * gradient.flatten(1).square().sum(1).mean()
    deviation = gradient.flatten(1).norm(dim=1) - 1
    return (relu(deviation) if name == "wgan_lp" else deviation).square().mean()


def path_length(images: Tensor, styles: Tensor, average: Tensor, decay: float) -> Tensor:
    """Karras et al. 2020 (arXiv:1912.04958), equation 4, as in their code; moves `average`."""
    noise = torch.randn_like(images) / (images.shape[2] * images.shape[3]) ** 0.5
    (gradient,) = torch.autograd.grad((images * noise).sum(), styles, create_graph=True)
    lengths = gradient.square().sum(2).mean(1).sqrt()
    average.lerp_(lengths.detach().mean().to(average.dtype), decay)
    return (lengths - average).square().mean()


@torch.no_grad()
def clip(parameters: Sequence[nn.Parameter], value: float) -> None:
    for parameter in parameters:
        parameter.clamp_(-value, value)
