"""Prints the largest error of gradients of a critic that has a compiled block."""

import torch
from torch import nn

from ganscale.objectives.fast_derivatives import FastDerivatives


def main() -> None:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 3, 3, padding=1), nn.LeakyReLU(0.2), nn.AvgPool2d(2)
    # Traced only, which needs no compiler.
    block = torch.compile(nn.Sequential(*layers), backend="eager")
    critic = nn.Sequential(block, nn.Conv2d(3, 2, 3)).double()  # type: ignore[arg-type]
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    largest = 0.0
    for order in (1, 2):
        results = []
        for context in (FastDerivatives(order), torch.enable_grad()):
            leaf = images.clone().requires_grad_()
            with context:
                value = critic(leaf).tanh().sum()
            results.append(torch.autograd.grad(value, [leaf, *critic.parameters()]))
        pairs = zip(*results, strict=True)
        largest = max(largest, *((fast - plain).abs().max().item() for fast, plain in pairs))
    print(largest)


if __name__ == "__main__":
    main()
