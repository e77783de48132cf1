"""Convolutions with a pool or an up-sampling, as residual networks have them.

A convolution and a mean over 2x2 pixels are together a convolution with stride 2 and a kernel
larger by one. So are, transposed, a nearest up-sampling and a convolution. That takes 4/9 of the
multiplications of a 3x3 kernel. The two convolutions here are the definition; in a training step
`objectives.fast_derivatives.FastDerivatives` replaces them with the faster form, whose kernels
`pooled_kernel` and `upsampled_kernel` make.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import wrap_torch_function


def _tensors(images: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor | None, ...]:
    return images, weight, bias


@wrap_torch_function(_tensors)
def convolve_and_pool(images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The mean over 2x2 pixels of a convolution that keeps the resolution.

    (batch, inputs, height, width) to (batch, outputs, height // 2, width // 2)
    weight: (outputs, inputs, kernel, kernel) with an odd kernel
    """
    return F.avg_pool2d(F.conv2d(images, weight, bias, padding=weight.shape[-1] // 2), 2)


@wrap_torch_function(_tensors)
def upsample_and_convolve(images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A convolution of the images doubled in size, each pixel repeated 2x2 times.

    (batch, inputs, height, width) to (batch, outputs, 2 height, 2 width); weight as above
    """
    larger = F.interpolate(images, scale_factor=2.0, mode="nearest")
    return F.conv2d(larger, weight, bias, padding=weight.shape[-1] // 2)


def pooled_kernel(weight: Tensor, images: Tensor) -> Tensor:
    """The kernel that, with stride 2, does the work of `weight` and a mean over 2x2 pixels.

    The mean of the convolution at four neighbouring pixels is one convolution with the mean of the
    kernel at four neighbouring positions.
    (outputs, inputs, k, k) to (outputs, inputs, k + 1, k + 1), in the memory format that torch
    would choose for the convolution of these images.
    """
    return F.avg_pool2d(_in_layout_of(weight, weight, images), 2, stride=1, padding=1)


def upsampled_kernel(weight: Tensor, images: Tensor) -> Tensor:
    """The kernel of the transposed convolution with stride 2 that does the work of a nearest
    up-sampling and `weight`: `pooled_kernel` transposed, with a sum for the mean.

    (outputs, inputs, k, k) to (inputs, outputs, k + 1, k + 1), in that memory format.
    """
    flipped = weight.flip(2, 3) if weight.shape[-1] > 1 else weight
    transposed = _in_layout_of(flipped.transpose(0, 1), weight, images)
    return F.avg_pool2d(transposed, 2, stride=1, padding=1, divisor_override=1)


def _in_layout_of(tensor: Tensor, weight: Tensor, images: Tensor) -> Tensor:
    """In the memory format that torch chooses for a convolution of these images: channels last if
    one of the two has it."""
    is_last = _is_channels_last(weight) or _is_channels_last(images)
    layout = torch.channels_last if is_last else torch.contiguous_format
    return tensor.contiguous(memory_format=layout)


def _is_channels_last(tensor: Tensor) -> bool:
    """For a map of one pixel, `is_contiguous` is true of both formats: there, strides tell."""
    _, channel, _, column = tensor.stride()
    is_contiguous = tensor.is_contiguous(memory_format=torch.channels_last)
    return is_contiguous and channel == 1 and column >= tensor.shape[1]


class _SameConv2d(nn.Conv2d):
    def __init__(self, inputs: int, outputs: int, kernel_size: int, *, bias: bool = True) -> None:
        """Raises ValueError for an even kernel_size, which cannot keep the resolution."""
        if kernel_size % 2 == 0:
            raise ValueError(f"a kernel of even size, {kernel_size}, cannot keep the resolution")
        super().__init__(inputs, outputs, kernel_size, padding=kernel_size // 2, bias=bias)


class PooledConv2d(_SameConv2d):
    """`convolve_and_pool` with the parameters of a Conv2d."""

    def forward(self, input: Tensor) -> Tensor:
        return convolve_and_pool(input, self.weight, self.bias)


class UpsampledConv2d(_SameConv2d):
    """`upsample_and_convolve` with the parameters of a Conv2d."""

    def forward(self, input: Tensor) -> Tensor:
        return upsample_and_convolve(input, self.weight, self.bias)
