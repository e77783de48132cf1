"""Draws and a critic in float64, small enough for closed forms."""

import torch
from torch import Tensor, nn

from ganscale.networks.r3gan import R3GANCritic


def draw(*shape: int, seed: int = 0) -> Tensor:
    """`shape` float64, normally distributed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@torch.no_grad()
def without_zeros(network: nn.Module) -> nn.Module:
    """With noise in the weights and biases that start at zero and would hide other layers."""
    for index, parameter in enumerate(network.parameters()):
        if not parameter.any():
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 0 else 1.0
            parameter.copy_(scale * draw(*parameter.shape, seed=index))
    return network


def small_r3gan_critic(sample_shape: tuple[int, ...], num_classes: int = 0) -> nn.Module:
    """With a group of every size and a change of width; all its layers matter."""
    return without_zeros(R3GANCritic(sample_shape, num_classes, widths=[8, 4, 4], group_width=4))


class SmoothCritic(nn.Module):
    """D(x) = v . tanh(W x + b) + c, whose input gradient is W^T (v * (1 - tanh^2))."""

    def __init__(self, inputs: int = 12, width: int = 5) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(width, inputs, generator=draws).double() / 2)
        self.bias = nn.Parameter(torch.randn(width, generator=draws).double())
        self.last = nn.Parameter(torch.randn(width, generator=draws).double())
        self.last_bias = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        hidden = torch.tanh(images.flatten(1) @ self.weight.T + self.bias)
        return hidden @ self.last + self.last_bias

    def gradient_norms(self, images: Tensor) -> Tensor:
        hidden = torch.tanh(images.flatten(1) @ self.weight.T + self.bias)
        return (((1 - hidden**2) * self.last) @ self.weight).square().sum(1).sqrt()
