"""The layers of StyleGAN2's generator: convolutions whose weights a style scales.

The weights of an image are w'_ijk = s_i w_ijk, divided by their norm per output: Karras et al. 2020
(https://arxiv.org/abs/1912.04958), equations 1 and 3. A convolution with w' is one with w between
two scalings of its maps: of input i by s_i, and of output j by the inverse norm, which is a matrix
product of squares. So there is one convolution for all images of a batch.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ganscale.networks.fir_resampling import Blur
from ganscale.networks.random_layers import noise_like
from ganscale.networks.stylegan2.equalized import EqualizedLinear, activate

_EPSILON = 1e-8


class LayerSettings(NamedTuple):
    """Of the convolutions at one resolution.

    size: of their outputs, (height, width)
    evaluation_noise: one of `random_layers.EVALUATION_NOISES`
    """

    style_dim: int
    size: tuple[int, int]
    evaluation_noise: str


class Scales(NamedTuple):
    """The factors that a style gives a layer's channels, in float32 or better."""

    of_inputs: Float[Tensor, "batch inputs"]
    of_outputs: Float[Tensor, "batch outputs"]


class StyledConv2d(nn.Module):
    """A modulated and demodulated 3x3 convolution, noise of a learned strength, a bias and an
    activation, whose gain is left to the next layer.

    Up-sampling is a transposed convolution of stride 2 and then a blur, which is the same function
    as a convolution of larger maps with a quarter of the multiplications.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        layers: LayerSettings,
        *,
        gain: float = 1.0,
        is_upsampling: bool = False,
    ) -> None:
        """gain: the one that the previous layer left out"""
        super().__init__()
        self.affine = EqualizedLinear(layers.style_dim, inputs, bias=1.0)
        channels = (inputs, outputs) if is_upsampling else (outputs, inputs)
        self.weight = nn.Parameter(torch.randn(*channels, 3, 3))
        self.blur = Blur(1, gain=4.0) if is_upsampling else None
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.noise_strength = nn.Parameter(torch.zeros(()))
        self._gain, self._evaluation_noise = gain, layers.evaluation_noise
        height, width = layers.size
        self._noise_name = f"noise/{height}x{width}{'/up' if is_upsampling else ''}"

    def scales(self, style: Float[Tensor, "batch style_dim"]) -> Scales:
        of_inputs = self.affine(style)
        squares = self.weight.square().sum((2, 3))
        squares = squares if self.blur is not None else squares.t()
        of_outputs = (of_inputs.square() @ squares + _EPSILON).rsqrt()
        return Scales(of_inputs, of_outputs if self._gain == 1 else of_outputs * self._gain)

    def forward(
        self, maps: Float[Tensor, "batch inputs _ _"], scales: Scales
    ) -> Float[Tensor, "batch outputs height width"]:
        maps = maps * _per_channel(scales.of_inputs, maps)
        if self.blur is None:
            maps = F.conv2d(maps, self.weight, padding=1)
        else:
            maps = self.blur(F.conv_transpose2d(maps, self.weight, stride=2))
        bias = _per_channel(self.bias, maps)
        maps = torch.addcmul(bias, maps, _per_channel(scales.of_outputs, maps))
        noise = noise_like(maps, self._noise_name, self.training, self._evaluation_noise)
        if noise is not None:
            maps.add_(noise * self.noise_strength)
        return activate(maps)


class ToRGB(nn.Module):
    """A modulated 1x1 convolution without demodulation, from maps to images."""

    def __init__(self, inputs: int, channels: int, style_dim: int, *, gain: float = 1.0) -> None:
        super().__init__()
        self.affine = EqualizedLinear(style_dim, inputs, gain=gain / math.sqrt(inputs), bias=1.0)
        self.weight = nn.Parameter(torch.randn(channels, inputs))
        self.bias = nn.Parameter(torch.zeros(channels))

    def weights(
        self, style: Float[Tensor, "batch style_dim"]
    ) -> Float[Tensor, "batch channels inputs"]:
        return self.affine(style)[:, None] * self.weight

    def forward(
        self,
        maps: Float[Tensor, "batch inputs height width"],
        weights: Float[Tensor, "batch channels inputs"],
    ) -> Float[Tensor, "batch channels height width"]:
        size, weights, bias = maps.shape[2:], weights.to(maps.dtype), self.bias.to(maps.dtype)
        if maps.is_contiguous(memory_format=torch.channels_last):
            images = torch.baddbmm(bias, maps.flatten(2).mT, weights.mT).mT
        else:
            images = torch.baddbmm(bias[:, None], weights, maps.flatten(2))
        return images.unflatten(2, size)


def _per_channel(
    values: Float[Tensor, "*batch channels"], maps: Tensor
) -> Float[Tensor, "*batch channels 1 1"]:
    return values.to(maps.dtype)[..., None, None]
