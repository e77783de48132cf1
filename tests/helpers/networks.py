"""Draws and a critic in float64, small enough for closed forms."""

import torch
from torch import Tensor, nn


def draw(*shape: int, seed: int = 0) -> Tensor:
    """`shape` float64, normally distributed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


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
