"""Filtering, doubling and halving of maps with the kernel [1, 3, 3, 1] in both directions, as in
StyleGAN2 (Karras et al. 2020, https://arxiv.org/abs/1912.04958, section 4.1) and R3GAN.

Per direction, and with zeros outside of a map x, the kernel f, a stride s and a padding p make the
map

    y[i] = f[0] x[s i - p] + f[1] x[s i - p + 1] + f[2] x[s i - p + 2] + f[3] x[s i - p + 3]

That is halving with s = 2 and p = 1, and blurring with s = 1. Doubling is the transpose of halving,
times 4: it puts zeros between the pixels and filters them, which is bilinear but for the edges.

These operations are linear, so each computes its gradient by its transpose, whose forward is fast
on every device. torch's own gradient of a depthwise convolution is slow: with 32x32 maps in
bfloat16 on a CPU, it takes 25 times as long.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import Function

from ganscale.runtime import has_cheap_launches, without_autocast
from ganscale.tensor_cache import cached_tensors

KERNEL = 1, 3, 3, 1


class FIRUpsample(nn.Module):
    """Doubles maps; a constant map stays the same but for its edges."""

    def forward(
        self, maps: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels 2*height 2*width"]:
        return _apply(maps, _DOUBLING, is_transposed=True)


class FIRDownsample(nn.Module):
    """Halves maps with an even height and width. Raises ValueError for others."""

    def forward(
        self, maps: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height//2 width//2"]:
        if maps.shape[-2] % 2 or maps.shape[-1] % 2:
            raise ValueError(f"maps of {tuple(maps.shape[-2:])} pixels cannot be halved")
        return _apply(maps, _HALVING)


class Blur(nn.Module):
    """Filters maps, of which a side grows by `2 * padding - 3` pixels."""

    def __init__(self, padding: int, *, gain: float = 1.0) -> None:
        super().__init__()
        self._filter = _Filter(gain, stride=1, padding=padding)

    def forward(
        self, maps: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels new_height new_width"]:
        return _apply(maps, self._filter)


class _Filter(NamedTuple):
    """The filter of the module's docstring; in two directions, its numbers sum to `gain`."""

    gain: float
    stride: int
    padding: int

    @property
    def scale(self) -> float:
        return self.gain / sum(KERNEL) ** 2


_HALVING = _Filter(gain=1.0, stride=2, padding=1)
_DOUBLING = _Filter(gain=4.0, stride=2, padding=1)


def _apply(maps: Tensor, filter: _Filter, *, is_transposed: bool = False) -> Tensor:
    function = _depthwise if _is_transformed() else _LinearMap.apply
    return function(maps, filter, is_transposed)


class _LinearMap(Function):
    """A filter or its transpose. Linear, so its backward needs nothing of its forward."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, filter: _Filter, is_transposed: bool) -> Tensor:
        ctx.transpose = filter, not is_transposed
        ctx.set_materialize_grads(False)
        is_slow = maps.dtype == torch.bfloat16 and has_cheap_launches(maps.device)
        if is_transposed and filter.stride == 2 and is_slow:
            # `data`, since autograd forbids changes in place of a view that a Function returns.
            return _interleaved(maps, filter).data
        return _depthwise(maps, filter, is_transposed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return None if grad is None else _LinearMap.apply(grad, *ctx.transpose), None, None


def _depthwise(maps: Tensor, filter: _Filter, is_transposed: bool) -> Tensor:
    channels = maps.shape[1]
    make = _weight if _is_transformed() else _cached_weight
    weight = make(channels, filter.scale, maps.dtype, maps.device)
    stride, padding = [filter.stride] * 2, [filter.padding] * 2
    settings = stride, padding, [1, 1], is_transposed, [0, 0], channels
    with without_autocast(maps.device):
        return torch.ops.aten.convolution(maps, weight, None, *settings)


def _weight(channels: int, scale: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(channels, 1, 4, 4); exact in every precision, as the numbers have a few bits."""
    line = torch.tensor(KERNEL, dtype=dtype, device=device)
    return (scale * torch.outer(line, line)).expand(channels, 1, 4, 4).contiguous()


@cached_tensors(maxsize=256)
def _cached_weight(*arguments: Any) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return _weight(*arguments)


def _interleaved(maps: Tensor, filter: _Filter) -> Tensor:
    """The transpose of a halving. In bfloat16 on a CPU, a transposed convolution takes 10 to 30
    times as long."""
    scale = filter.scale**0.5
    if maps.is_contiguous(memory_format=torch.channels_last):
        pixels = maps.permute(0, 2, 3, 1)
        return _interleave(_interleave(pixels, 2, scale), 1, scale).permute(0, 3, 1, 2)
    return _interleave(_interleave(maps, 3, scale), 2, scale)


def _interleave(maps: Tensor, dim: int, scale: float) -> Tensor:
    """Along `dim`, y[2 i] = s (3 x[i] + x[i - 1]) and y[2 i + 1] = s (3 x[i] + x[i + 1])."""
    others = maps.shape[dim] - 1
    even, odd = maps * (3 * scale), maps * (3 * scale)
    even.narrow(dim, 1, others).add_(maps.narrow(dim, 0, others), alpha=scale)
    odd.narrow(dim, 0, others).add_(maps.narrow(dim, 1, others), alpha=scale)
    return torch.stack([even, odd], dim + 1).flatten(dim, dim + 1)


def _is_transformed() -> bool:
    """Whether torch.compile or torch.func traces the computation and derives its gradients."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
