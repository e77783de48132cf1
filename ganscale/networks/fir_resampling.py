"""Filtering, doubling and halving of maps with a small symmetric kernel in both directions.

Per direction, and with zeros outside of a map x of n pixels, a kernel f of k taps, a stride s and a
padding p make the map

    y[i] = f[0] x[s i - p] + ... + f[k - 1] x[s i - p + k - 1]

That is halving with s = 2, and blurring with s = 1. Doubling is the transpose of halving, times 4:
it puts zeros between the pixels and filters them. [1, 3, 3, 1] is StyleGAN2's kernel (Karras et al.
2020, https://arxiv.org/abs/1912.04958, section 4.1), [1, 2, 1] that of R3GAN.

The maps are linear, so each takes its gradient with its transpose, of which the forward is fast on
every device. The gradient of a depthwise convolution is not: with 32x32 maps in bfloat16 on a CPU,
it takes 25 times as long.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import Function

from ganscale.runtime import has_cheap_launches

Kernel = tuple[int, ...]
STYLEGAN2_KERNEL: Kernel = (1, 3, 3, 1)


class FIRUpsample(nn.Module):
    """Doubles maps; a constant map stays the same but for its edges."""

    def __init__(self, kernel: Kernel = STYLEGAN2_KERNEL) -> None:
        super().__init__()
        self._filter = _halving(kernel, gain=4.0)

    def forward(
        self, maps: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels 2*height 2*width"]:
        return _apply(maps, self._filter, is_transposed=True)


class FIRDownsample(nn.Module):
    """Halves maps with an even height and width. Raises ValueError for others."""

    def __init__(self, kernel: Kernel = STYLEGAN2_KERNEL) -> None:
        super().__init__()
        self._filter = _halving(kernel)

    def forward(
        self, maps: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height//2 width//2"]:
        if maps.shape[-2] % 2 or maps.shape[-1] % 2:
            raise ValueError(f"maps of {tuple(maps.shape[-2:])} pixels cannot be halved")
        return _apply(maps, self._filter)


class Blur(nn.Module):
    """Filters maps, of which a side grows by `2 * padding - len(kernel) + 1` pixels."""

    def __init__(
        self, padding: int, kernel: Kernel = STYLEGAN2_KERNEL, *, gain: float = 1.0
    ) -> None:
        super().__init__()
        self._filter = _Filter(kernel, gain / sum(kernel) ** 2, 1, padding)

    def forward(
        self, maps: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels new_height new_width"]:
        return _apply(maps, self._filter)


class _Filter(NamedTuple):
    """The filter of the module's docstring; in two directions, f is `scale` times the products of
    the kernel's numbers."""

    kernel: Kernel
    scale: float
    stride: int
    padding: int

    @property
    def output_padding(self) -> int:
        """Of the transpose: how many of the last pixels of an even side are left out."""
        return (2 * self.padding - len(self.kernel)) % self.stride


def _halving(kernel: Kernel, gain: float = 1.0) -> _Filter:
    return _Filter(kernel, gain / sum(kernel) ** 2, 2, (len(kernel) - 1) // 2)


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
    weight = make(channels, filter.kernel, filter.scale, maps.dtype, maps.device)
    stride, padding = [filter.stride] * 2, [filter.padding] * 2
    output_padding = [filter.output_padding if is_transposed else 0] * 2
    settings = stride, padding, [1, 1], is_transposed, output_padding, channels
    return torch.ops.aten.convolution(maps, weight, None, *settings)


def _weight(
    channels: int, kernel: Kernel, scale: float, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """(channels, 1, taps, taps); exact in every precision, as the numbers have a few bits."""
    line = torch.tensor(kernel, dtype=dtype, device=device)
    weight = scale * torch.outer(line, line)
    return weight.expand(channels, 1, len(kernel), len(kernel)).contiguous()


@lru_cache(maxsize=256)
def _cached_weight(*arguments: Any) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return _weight(*arguments)


def _interleaved(maps: Tensor, filter: _Filter) -> Tensor:
    """The transpose of a halving. In bfloat16 on a CPU, a transposed convolution takes 10 to 30
    times as long."""
    if maps.is_contiguous(memory_format=torch.channels_last):
        pixels = maps.permute(0, 2, 3, 1)
        return _interleave(_interleave(pixels, 2, filter), 1, filter).permute(0, 3, 1, 2)
    return _interleave(_interleave(maps, 3, filter), 2, filter)


def _interleave(maps: Tensor, dim: int, filter: _Filter) -> Tensor:
    """Along `dim`, tap t adds f[t] x[i] to y[2 i - p + t]: half of the taps to the even places of
    y, half to the odd ones."""
    length = maps.shape[dim]
    places: list[Tensor | None] = [None, None]
    middle = filter.padding, filter.padding + 1  # the two taps that add x[i] to y[2 i], y[2 i + 1]
    for tap in sorted(range(len(filter.kernel)), key=lambda tap: tap not in middle):
        factor = filter.kernel[tap] * filter.scale**0.5
        shift, place = divmod(tap - filter.padding, 2)
        first = places[place]
        if first is None:
            assert shift == 0
            places[place] = maps * factor
        else:
            count = length - abs(shift)
            to, of = max(shift, 0), max(-shift, 0)
            first.narrow(dim, to, count).add_(maps.narrow(dim, of, count), alpha=factor)
    even, odd = places
    assert even is not None
    assert odd is not None
    return torch.stack([even, odd], dim + 1).flatten(dim, dim + 1)


def _is_transformed() -> bool:
    """Whether torch.compile or torch.func looks at what is computed, and finds the gradients."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
