"""Convolutions and pooling in the form in which a processor does them fastest.

The sums are those of the definition, in another order, so results differ in their last bits only.
Libraries tune convolutions for many channels on large maps. A GAN has others at its ends:

- A kernel that covers its whole input, or an input of one pixel, makes a matrix product: the last
  layer of DCGAN's critic and the first of its generator. In a quarter of the time on a CPU.
- A strided convolution's gradient with respect to an image of a few channels, and the transposed
  convolution that makes an image. With stride s, output pixels fall into s^2 phases, each of which
  sees its own s-th of the kernel's rows and columns. Taken as further channels of one dense
  convolution (a sub-pixel convolution: Shi et al. 2016, https://arxiv.org/abs/1609.07009), they are
  done in 0.6 of the time on a CPU.
- A convolution and the mean over 2x2 pixels behind it, or the nearest up-sampling before it, as one
  convolution with stride 2 (`networks.resampling`), with 4/9 of the operations for a 3x3 kernel:
  in 0.35 to 0.95 of the time on a CPU.
- The weights' gradient of a strided convolution to a small map, in bfloat16 on a CPU: as the
  product of the map with the patches that it was made of, in 0.35 to 0.85 of the time.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

aten = torch.ops.aten

_FEW_CHANNELS, _MANY_CHANNELS = 4, 64
_SMALL_MAP = 64  # pixels


class Settings(NamedTuple):
    """Of a convolution, as `aten.convolution` takes them; a number for each spatial dimension."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    is_transposed: bool
    output_padding: list[int]
    groups: int


def convolve(input: Tensor, weight: Tensor, bias: Tensor | None, settings: Settings) -> Tensor:
    """`aten.convolution`; without derivatives of its own."""
    if settings.is_transposed and has_phases(weight, settings):
        paddings = zip(settings.padding, settings.output_padding, strict=True)
        sizes = zip(input.shape[2:], settings.stride, weight.shape[2:], paddings, strict=True)
        size = [(n - 1) * s - 2 * p + k + more for n, s, k, (p, more) in sizes]
        output = _by_phases(input, weight, size, settings)
        if output is not None:
            return output if bias is None else _shifted(output, bias)
    return aten.convolution(input, weight, bias, *settings)


def gradients(
    gradient: Tensor,
    input: Tensor,
    weight: Tensor,
    bias_shape: list[int] | None,
    settings: Settings,
    asked: Sequence[bool],
) -> list[Tensor | None]:
    """`aten.convolution_backward`: with respect to input, weight and bias, as far as asked for."""
    found: list[Tensor | None] = [None, None, None]
    if asked[0] and not settings.is_transposed and has_phases(weight, settings):
        found[0] = _by_phases(gradient, weight, list(input.shape[2:]), settings)
    maps = (input, gradient) if settings.is_transposed else (gradient, input)
    is_small = maps[0].shape[2:].numel() <= _SMALL_MAP
    if asked[1] and is_small and has_patches(weight, weight.dtype, settings):
        found[1] = _by_patches(*maps, weight, settings)
        if asked[2]:  # oneDNN would take the weights' with it
            found[2] = gradient.sum((0, 2, 3))
    rest = [is_asked and found[i] is None for i, is_asked in enumerate(asked)]
    if any(rest):
        others = aten.convolution_backward(gradient, input, weight, bias_shape, *settings, rest)
        found = [
            mine if other is None else other for mine, other in zip(found, others, strict=True)
        ]
    return found


def has_phases(weight: Tensor, settings: Settings) -> bool:
    """Whether the way from `weight`'s first channels to its second ones, transposed, is one to a
    few channels with a stride. A GPU has kernels of its own for that."""
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


def _by_phases(
    input: Tensor, weight: Tensor, size: Sequence[int], settings: Settings
) -> Tensor | None:
    """The transposed convolution of `input` to a map of `size`.

    Output o is the sum over taps k of input i weight k with i s + k = o + p. Let o + p = s q + a:
    then k = a + s t and i = q - t, so phase a is a convolution with every s-th tap from a on.
    None where the padding leaves no place for it.
    """
    (stride, _), paddings = settings.stride, settings.padding
    outputs = weight.shape[1]
    kernel = F.pad(weight, [n for k in weight.shape[:1:-1] for n in (0, -k % stride)])
    taps = [k // stride for k in kernel.shape[2:]]
    firsts = [p // stride for p in paddings]  # q of the first output
    lasts = [(p + n - 1) // stride for p, n in zip(paddings, size, strict=True)]
    margins = [t - 1 - first for t, first in zip(taps, firsts, strict=True)]
    lengths = [
        n + 2 * m - t + 1 for n, m, t in zip(input.shape[2:], margins, taps, strict=True)
    ]  # what a convolution with these margins gives: q from the first on
    if min(margins) < 0 or any(f + n <= q for f, n, q in zip(firsts, lengths, lasts, strict=True)):
        return None
    # (inputs, outputs, taps, phases, taps, phases) -> (outputs and phases, inputs, taps, taps)
    phases = kernel.view(-1, outputs, taps[0], stride, taps[1], stride).flip(2, 4)
    dense = phases.permute(1, 3, 5, 0, 2, 4).reshape(outputs * stride**2, -1, *taps)
    is_last = _is_channels_last(weight) or not input.is_contiguous()
    layout = torch.channels_last if is_last else torch.contiguous_format
    dense = dense.contiguous(memory_format=layout)
    # Not by F.conv2d: autocast would cast
    plain = Settings([1, 1], margins, [1, 1], False, [0, 0], 1)
    mixed = F.pixel_shuffle(aten.convolution(input, dense, None, *plain), stride)
    starts = [p - stride * first for p, first in zip(paddings, firsts, strict=True)]
    (top, left), (height, width) = starts, size
    return mixed[:, :, top : top + height, left : left + width].contiguous(memory_format=layout)


def has_patches(weight: Tensor, computed_in: torch.dtype, settings: Settings) -> bool:
    """Whether the weights' gradient, where the map is small, is better taken by patches."""
    return (
        computed_in == torch.bfloat16
        and weight.device.type == "cpu"
        and weight.ndim == 4
        and min(weight.shape[:2]) >= _MANY_CHANNELS
        and min(settings.stride) > 1
        and settings.dilation == [1, 1]
        and settings.groups == 1
        and not any(settings.output_padding)
    )


def _by_patches(coarse: Tensor, fine: Tensor, weight: Tensor, settings: Settings) -> Tensor:
    """The gradient of the weights between a map and the `stride` times finer one below it."""
    (down, right), (vertical, horizontal) = settings.stride, settings.padding
    below = F.pad(fine.permute(0, 2, 3, 1), (0, 0, horizontal, horizontal, vertical, vertical))
    below = below.contiguous()
    image, row, column, channel = below.stride()
    channels, height, width = weight.shape[1:]
    patches = below.as_strided(
        (*coarse.shape[0:1], *coarse.shape[2:], height, width, channels),
        (image, down * row, right * column, row, column, channel),
    )
    flat = patches.reshape(-1, height * width * channels)
    product = coarse.permute(0, 2, 3, 1).flatten(0, 2).t() @ flat
    found = product.view(-1, height, width, channels).permute(0, 3, 1, 2)
    is_last = _is_channels_last(weight)
    return found if is_last else found.contiguous()


def as_matrix_product(
    input: Tensor, weight: Tensor, bias: Tensor | None, settings: Settings
) -> Tensor | None:
    """The convolution as a matrix product, differentiable as that is; None where it is none."""
    is_dense = (
        settings.groups == 1
        and not any(settings.padding)
        and not any(settings.output_padding)
        and all(dilation == 1 for dilation in settings.dilation)
    )
    if not is_dense or weight.shape[2:].numel() == 1:  # a kernel of one pixel is one already
        return None
    if settings.is_transposed:
        if input.shape[2:].numel() != 1:
            return None
        spread = input.flatten(1) @ _rows(weight, like=weight)
        output = _from_rows(spread, weight)
        return output if bias is None else _shifted(output, bias)
    if input.shape[2:] != weight.shape[2:]:
        return None
    output = F.linear(_rows(input, like=weight), _rows(weight, like=weight), bias)
    return output.view(*output.shape, *[1] * (weight.ndim - 2))


def _shifted(output: Tensor, bias: Tensor) -> Tensor:
    return output + bias.to(output.dtype).view(-1, *[1] * (output.ndim - 2))


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)


def _rows(tensor: Tensor, like: Tensor) -> Tensor:
    """(n, c, height, width) as (n, elements), in the order in which `like` lies in memory."""
    return (tensor.permute(0, 2, 3, 1) if _is_channels_last(like) else tensor).flatten(1)


def _from_rows(rows: Tensor, like: Tensor) -> Tensor:
    """(n, elements) in the order of `like`'s memory as (n, *like.shape[1:])."""
    if not _is_channels_last(like):
        return rows.view(len(rows), *like.shape[1:])
    channels, height, width = like.shape[1:]
    return rows.view(len(rows), height, width, channels).permute(0, 3, 1, 2)


def pooled_kernel(weight: Tensor) -> Tensor:
    """Of the convolution with stride 2 that is one with `weight` and a mean over 2x2 pixels.

    Each of the four pixels sees the kernel elsewhere: their mean sees the mean of the four.
    (outputs, inputs, k, k) to (outputs, inputs, k + 1, k + 1), in the same memory layout.
    """
    return F.avg_pool2d(F.pad(weight, [1] * 4), 2, stride=1)


def upsampled_kernel(weight: Tensor) -> Tensor:
    """Of the transposed convolution with stride 2 that is one with `weight` behind a nearest
    up-sampling: pooling the other way round, and a sum.

    (outputs, inputs, k, k) to (inputs, outputs, k + 1, k + 1), in the same memory layout.
    """
    layout = torch.channels_last if _is_channels_last(weight) else torch.contiguous_format
    turned = weight.transpose(0, 1).contiguous(memory_format=layout).flip(2, 3)
    return 4 * pooled_kernel(turned)


def unpool(gradient: Tensor, window: int) -> Tensor:
    """The gradient of an average over windows side by side: each pixel's share, all over its
    window. (batch, channels, height, width) to `window` times the height and width."""
    return F.interpolate(gradient / window**2, scale_factor=window, mode="nearest")
