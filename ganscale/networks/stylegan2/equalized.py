"""Layers with equalized learning rates: weights start from N(0, 1) and are scaled in every forward,
so that Adam moves all layers at the same relative speed (Karras et al. 2018,
https://arxiv.org/abs/1710.10196, section 4.1)."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

ACTIVATION_GAIN = math.sqrt(2)


def activate(maps: Float[Tensor, "batch *shape"]) -> Float[Tensor, "batch *shape"]:
    """The leaky ReLU of StyleGAN2 in place, without its gain."""
    return F.leaky_relu(maps, 0.2, inplace=True)


class EqualizedLinear(nn.Module):
    """y = gain (c W x + m b) with c = m / sqrt(inputs), W from N(0, 1 / m^2), and m a factor of the
    learning rate. All of it is one operation."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        gain: float = 1.0,
        input_gain: float = 1.0,
        rate_multiplier: float = 1.0,
        bias: float = 0.0,
    ) -> None:
        """input_gain: a gain that the layer before has left out"""
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / rate_multiplier)
        self.bias = nn.Parameter(torch.full((outputs,), bias))
        self._bias_gain = gain * rate_multiplier
        self._weight_gain = self._bias_gain * input_gain / math.sqrt(inputs)

    def forward(self, input: Float[Tensor, "batch inputs"]) -> Float[Tensor, "batch outputs"]:
        return torch.addmm(
            self.bias, input, self.weight.t(), beta=self._bias_gain, alpha=self._weight_gain
        )


class EqualizedConv2d(nn.Module):
    """A convolution with gain / sqrt(fan-in) times its weights, and with its bias as it is."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel_size: int,
        *,
        gain: float = 1.0,
        bias: bool = True,
        stride: int = 1,
        padding: int = 0,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self._gain = gain / math.sqrt(self.weight[0].numel())
        self._stride, self._padding = stride, padding

    def forward(
        self, input: Float[Tensor, "batch inputs _ _"]
    ) -> Float[Tensor, "batch outputs _ _"]:
        weight = self.weight * self._gain
        return F.conv2d(input, weight, self.bias, self._stride, self._padding)
