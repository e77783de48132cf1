"""Faster ways to compute the convolutions and pools of a GAN.

They add the same products in another order, so results differ in their last bits only. Libraries
tune convolutions for many channels on large maps, which neither end of a GAN has. Times are those
on a CPU, relative to torch:

- Matrix product, 0.25: a kernel that covers its whole input, or an input of one pixel, as in the
  last layer of DCGAN's critic and the first of its generator.
- Sub-pixel convolution, 0.6: a strided convolution's gradient with respect to an image of a few
  channels, and the transposed convolution that makes an image. With stride s, output pixels fall
  into s^2 phases, each of which sees its own s-th of the kernel's rows and columns. One dense
  convolution computes all phases as channels (Shi et al. 2016, https://arxiv.org/abs/1609.07009).
- Resampling, 0.35 to 0.95: a convolution and a mean over 2x2 pixels, or a nearest up-sampling and
  a convolution (`networks.resampling`), as one convolution with stride 2, which takes 4/9 of the
  operations for a 3x3 kernel.
- im2col, 0.35 to 0.85: the weight gradient of a strided convolution to a small map in bfloat16, as
  the product of that map with the patches that it was computed from.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

aten = torch.ops.aten

_FEW_CHANNELS, _MANY_CHANNELS = 4, 64
_SMALL_MAP = 64  # pixels


class ConvolutionSettings(NamedTuple):
    """The last arguments of `aten.convolution`; lists have one number per spatial dimension."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    is_transposed: bool
    output_padding: list[int]
    groups: int


def convolve(
    input: Tensor, weight: Tensor, bias: Tensor | None, settings: ConvolutionSettings
) -> Tensor:
    """`aten.convolution`, not to be differentiated by autograd."""
    if settings.is_transposed and is_subpixel_faster(weight, settings):
        paddings = zip(settings.padding, settings.output_padding, strict=True)
        sizes = zip(input.shape[2:], settings.stride, weight.shape[2:], paddings, strict=True)
        size = [(n - 1) * s - 2 * p + k + extra for n, s, k, (p, extra) in sizes]
        output = _subpixel_convolution(input, weight, size, settings)
        if output is not None:
            return output if bias is None else _add_bias(output, bias)
    return aten.convolution(input, weight, bias, *settings)


def convolution_gradients(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    bias_shape: list[int] | None,
    settings: ConvolutionSettings,
    output_mask: Sequence[bool],
) -> list[Tensor | None]:
    """`aten.convolution_backward`: gradients of input, weight and bias, where the mask is True."""
    gradients: list[Tensor | None] = [None, None, None]
    if output_mask[0] and not settings.is_transposed and is_subpixel_faster(weight, settings):
        gradients[0] = _subpixel_convolution(grad, weight, list(input.shape[2:]), settings)
    coarse, fine = (input, grad) if settings.is_transposed else (grad, input)
    is_small = coarse.shape[2:].numel() <= _SMALL_MAP
    if output_mask[1] and is_small and is_im2col_faster(weight, weight.dtype, settings):
        gradients[1] = _im2col_weight_gradient(coarse, fine, weight, settings)
        if output_mask[2]:  # oneDNN would compute the weight gradient again along with it
            gradients[2] = grad.sum((0, 2, 3))
    missing = [needed and have is None for needed, have in zip(output_mask, gradients, strict=True)]
    if any(missing):
        others = aten.convolution_backward(grad, input, weight, bias_shape, *settings, missing)
        pairs = zip(gradients, others, strict=True)
        gradients = [ours if torchs is None else torchs for ours, torchs in pairs]
    return gradients


def is_subpixel_faster(weight: Tensor, settings: ConvolutionSettings) -> bool:
    """Whether the transposed convolution with `weight` is strided and leads to a few channels. Only
    on CPUs: no GPU has tried it (benchmarks.forms does)."""
    return (
        weight.device.type == "cpu"
        and weight.ndim == 4
        and weight.shape[1] <= _FEW_CHANNELS
        and settings.stride[0] == settings.stride[1] > 1
        and min(weight.shape[2:]) >= settings.stride[0]
        and min(settings.padding) >= 0
        and settings.dilation == [1, 1]
        and settings.groups == 1
    )


def _subpixel_convolution(
    input: Tensor, weight: Tensor, size: Sequence[int], settings: ConvolutionSettings
) -> Tensor | None:
    """The transposed convolution of `input` to a map of `size`.

    Output o is the sum over taps k of input i weight k with i s + k = o + p. Let o + p = s q + a:
    then k = a + s t and i = q - t, so phase a is a convolution with every s-th tap from a on.
    None where the padding is too large for that.
    """
    (stride, _), paddings = settings.stride, settings.padding
    out_channels = weight.shape[1]
    kernel = F.pad(weight, [n for k in weight.shape[:1:-1] for n in (0, -k % stride)])
    taps = [k // stride for k in kernel.shape[2:]]
    firsts = [p // stride for p in paddings]  # q of the first output
    lasts = [(p + n - 1) // stride for p, n in zip(paddings, size, strict=True)]
    margins = [t - 1 - first for t, first in zip(taps, firsts, strict=True)]
    lengths = [
        n + 2 * m - t + 1 for n, m, t in zip(input.shape[2:], margins, taps, strict=True)
    ]  # how many q, from the first on, a convolution with these margins computes
    if min(margins) < 0 or any(f + n <= q for f, n, q in zip(firsts, lengths, lasts, strict=True)):
        return None
    # (inputs, outputs, taps, phases, taps, phases) -> (outputs and phases, inputs, taps, taps)
    phases = kernel.view(-1, out_channels, taps[0], stride, taps[1], stride).flip(2, 4)
    dense = phases.permute(1, 3, 5, 0, 2, 4).reshape(out_channels * stride**2, -1, *taps)
    is_last = _is_channels_last(weight) or not input.is_contiguous()
    layout = torch.channels_last if is_last else torch.contiguous_format
    dense = dense.contiguous(memory_format=layout)
    # F.conv2d would cast under autocast.
    plain = ConvolutionSettings([1, 1], margins, [1, 1], False, [0, 0], 1)
    shuffled = F.pixel_shuffle(aten.convolution(input, dense, None, *plain), stride)
    top, left = (p - stride * first for p, first in zip(paddings, firsts, strict=True))
    height, width = size
    return shuffled[:, :, top : top + height, left : left + width].contiguous(memory_format=layout)


def is_im2col_faster(
    weight: Tensor, compute_dtype: torch.dtype, settings: ConvolutionSettings
) -> bool:
    """Whether im2col is the faster way to the weight gradient, provided that the map is small. Only
    on CPUs: no GPU has tried it (benchmarks.forms does)."""
    return (
        compute_dtype == torch.bfloat16
        and weight.device.type == "cpu"
        and weight.ndim == 4
        and min(weight.shape[:2]) >= _MANY_CHANNELS
        and min(settings.stride) > 1
        and settings.dilation == [1, 1]
        and settings.groups == 1
        and not any(settings.output_padding)
    )


def _im2col_weight_gradient(
    coarse: Tensor, fine: Tensor, weight: Tensor, settings: ConvolutionSettings
) -> Tensor:
    """The gradient of the weight between a map and one that is `stride` times finer."""
    (down, right), (vertical, horizontal) = settings.stride, settings.padding
    padded = F.pad(fine.permute(0, 2, 3, 1), (0, 0, horizontal, horizontal, vertical, vertical))
    padded = padded.contiguous()
    image, row, column, channel = padded.stride()
    channels, height, width = weight.shape[1:]
    patches = padded.as_strided(
        (len(coarse), *coarse.shape[2:], height, width, channels),
        (image, down * row, right * column, row, column, channel),
    )
    columns = patches.reshape(-1, height * width * channels)
    product = coarse.permute(0, 2, 3, 1).flatten(0, 2).t() @ columns
    gradient = product.view(-1, height, width, channels).permute(0, 3, 1, 2)
    return gradient if _is_channels_last(weight) else gradient.contiguous()


def as_matrix_product(
    input: Tensor, weight: Tensor, bias: Tensor | None, settings: ConvolutionSettings
) -> Tensor | None:
    """The convolution as a differentiable matrix product; None where it does not amount to one."""
    is_dense = (
        settings.groups == 1
        and not any(settings.padding)
        and not any(settings.output_padding)
        and all(dilation == 1 for dilation in settings.dilation)
    )
    if not is_dense or weight.shape[2:].numel() == 1:  # torch has good 1x1 convolutions
        return None
    if settings.is_transposed:
        if input.shape[2:].numel() != 1:
            return None
        rows = input.flatten(1) @ _flatten(weight, like=weight)
        output = _unflatten(rows, like=weight)
        return output if bias is None else _add_bias(output, bias)
    if input.shape[2:] != weight.shape[2:]:
        return None
    output = F.linear(_flatten(input, like=weight), _flatten(weight, like=weight), bias)
    return output.view(*output.shape, *[1] * (weight.ndim - 2))


def _add_bias(output: Tensor, bias: Tensor) -> Tensor:
    return output + bias.to(output.dtype).view(-1, *[1] * (output.ndim - 2))


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)


def _flatten(tensor: Tensor, like: Tensor) -> Tensor:
    """(n, c, height, width) to (n, elements), in the order of `like`'s memory format."""
    return (tensor.permute(0, 2, 3, 1) if _is_channels_last(like) else tensor).flatten(1)


def _unflatten(rows: Tensor, like: Tensor) -> Tensor:
    """(n, elements), in the order of `like`'s memory format, to (n, *like.shape[1:])."""
    if not _is_channels_last(like):
        return rows.view(len(rows), *like.shape[1:])
    channels, height, width = like.shape[1:]
    return rows.view(len(rows), height, width, channels).permute(0, 3, 1, 2)
