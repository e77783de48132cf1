"""Doubling and halving of maps with the kernel [1, 2, 1] in both directions.

With zeros outside of the map x, per direction:

    downsample(x)[i] = (x[2i - 1] + 2 x[2i] + x[2i + 1]) / 4
    upsample(x)[2i] = x[i],  upsample(x)[2i + 1] = (x[i] + x[i + 1]) / 2

These are each other's transposes but for a factor, so each takes its gradient with the other. The
gradient of a depthwise convolution of 32x32 maps in bfloat16 takes 25 times as long as that on a
CPU.
"""

from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import Function

from ganscale.runtime import has_cheap_launches


class BilinearUpsample(nn.Module):
    def forward(
        self, maps: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels 2*height 2*width"]:
        return _upsample(maps, 1.0) if _is_transformed() else _Upsample.apply(maps, 1.0)


class BilinearDownsample(nn.Module):
    """For maps with an even height and width."""

    def forward(
        self, maps: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height//2 width//2"]:
        if maps.shape[-2] % 2 or maps.shape[-1] % 2:
            raise ValueError(f"maps of {tuple(maps.shape[-2:])} pixels cannot be halved")
        return _downsample(maps, 1.0) if _is_transformed() else _Downsample.apply(maps, 1.0)


class _Upsample(Function):
    """`scale` times an up-sampling. Linear, so its backward needs nothing of its forward."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        ctx.set_materialize_grads(False)
        return _upsample(maps, scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None]:  # type: ignore[override]
        return None if grad is None else _Downsample.apply(grad, 4 * ctx.scale), None


class _Downsample(Function):
    """`scale` times a down-sampling, likewise."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        ctx.set_materialize_grads(False)
        return _downsample(maps, scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None]:  # type: ignore[override]
        return None if grad is None else _Upsample.apply(grad, ctx.scale / 4), None


def _upsample(maps: Tensor, scale: float) -> Tensor:
    if not has_cheap_launches(maps.device) or _is_transformed():
        return _depthwise(maps, scale / 4, is_transposed=True)
    maps = maps if scale == 1 else maps * scale
    if maps.is_contiguous(memory_format=torch.channels_last):
        pixels = maps.permute(0, 2, 3, 1)
        return _interleave(_interleave(pixels, 2), 1).permute(0, 3, 1, 2)
    return _interleave(_interleave(maps, 3), 2)


def _interleave(maps: Tensor, dim: int) -> Tensor:
    """Each entry along `dim`, followed by the mean of it and the next one. On a CPU, this takes a
    third of the time of a transposed convolution in float32, and a tenth in bfloat16."""
    length = maps.shape[dim]
    means = maps / 2
    means.narrow(dim, 0, length - 1).add_(maps.narrow(dim, 1, length - 1), alpha=0.5)
    return torch.stack([maps, means], dim + 1).flatten(dim, dim + 1)


def _downsample(maps: Tensor, scale: float) -> Tensor:
    return _depthwise(maps, scale / 16, is_transposed=False)


def _depthwise(maps: Tensor, scale: float, *, is_transposed: bool) -> Tensor:
    """The convolution with `scale` times the kernel, with stride 2; or the transposed one."""
    channels = maps.shape[1]
    kernel = _kernel if _is_transformed() else _cached_kernel
    weight = kernel(channels, scale, maps.dtype, maps.device)
    output_padding = [int(is_transposed)] * 2
    settings = [2, 2], [1, 1], [1, 1], is_transposed, output_padding, channels
    return torch.ops.aten.convolution(maps, weight, None, *settings)


def _kernel(channels: int, scale: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(channels, 1, 3, 3); exact in every precision, as all its entries are powers of two."""
    line = torch.tensor([1.0, 2.0, 1.0], dtype=dtype, device=device)
    return (scale * torch.outer(line, line)).expand(channels, 1, 3, 3).contiguous()


@lru_cache(maxsize=256)
def _cached_kernel(*arguments: Any) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return _kernel(*arguments)


def _is_transformed() -> bool:
    """Whether torch.compile or torch.func looks at what is computed, and finds the gradients."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
