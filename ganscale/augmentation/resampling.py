"""Resamples images under affine maps, at the nearest pixels or through a wavelet's filters.

Sampling is linear in the images, so its gradient is its transpose, whose gradient is sampling
again. All derivatives exist in every supported torch (`grid_sample` got its second late), and none
are computed for the points.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function

from ganscale.tensor_cache import cached_tensors

# Daubechies: "Ten Lectures on Wavelets" (1992), table 6.3: least asymmetric, of 6 vanishing moments
SYM6 = (
    0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633,
    0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263752278646252,
    -0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148,
)  # fmt: skip
_HALF = len(SYM6) // 2 - 1
# The filter is not symmetric: the center of an old pixel is this far, in new pixels, from the new
# one at twice its index. Without it, an image that is turned by 180 degrees would move.
_PHASE = sum(n * h for n, h in enumerate(SYM6)) / sum(SYM6) - _HALF

Affine = tuple[Float[Tensor, "batch 2 2"], Float[Tensor, "batch 2"]]
"""source = matrix @ target + offset, of points (x, y) in pixels from the center of the image."""


class _Sampling(NamedTuple):
    """Numbers as torch's operator takes them."""

    interpolation: int  # 0: bilinear, 1: nearest
    padding: int  # 0: zeros, 2: reflection about the outermost pixels
    align_corners: bool = True


_NEAREST_OR_ZERO, _NEAREST_REFLECTED = _Sampling(1, 0), _Sampling(1, 2)
_BILINEAR_REFLECTED = _Sampling(0, 2)


def sample_nearest(
    images: Float[Tensor, "batch channels height width"], affine: Affine, *, is_reflected: bool
) -> Float[Tensor, "batch channels height width"]:
    """The nearest pixels; outside, the image reflected about its outermost pixels, or zeros."""
    grid = _grid(affine, *images.shape[-2:])
    return _Sample.apply(images, grid, _NEAREST_REFLECTED if is_reflected else _NEAREST_OR_ZERO)


def sample_smoothly(
    images: Float[Tensor, "batch channels height width"], affine: Affine
) -> Float[Tensor, "batch channels height width"]:
    """Up-sampled by 2 with the filter sym6, sampled bilinearly, reflected about the outermost
    pixels, and down-sampled by 2 again (Karras et al. 2020, arXiv:2006.06676, appendix B)."""
    height, width = images.shape[-2:]
    up_rows, down_rows = _filters(height, images.dtype, images.device)
    up_columns, down_columns = _filters(width, images.dtype, images.device)
    finer = up_rows @ (images @ up_columns.mT)
    sampled = _Sample.apply(finer, _grid(affine, height, width, is_finer=True), _BILINEAR_REFLECTED)
    return down_rows @ (sampled @ down_columns.mT)


def _grid(
    affine: Affine, height: int, width: int, *, is_finer: bool = False
) -> Float[Tensor, "batch rows columns 2"]:
    """Where to sample, in torch's units, where the outermost pixels are at -1 and 1: for each
    pixel, or for what is down-sampled to the pixels.

    Without matrix products, which TF32 would round.
    """
    matrix, offset = affine
    xs, ys, units = _points(height, width, is_finer, matrix.dtype, matrix.device)
    if is_finer:
        offset = offset + _PHASE / 2
    matrix, offset = matrix * units[:, None], (offset * units)[:, None, None]
    along_x = torch.addcmul(offset, xs, matrix[:, None, None, :, 0])
    return torch.addcmul(along_x, ys, matrix[:, None, None, :, 1])


@cached_tensors(maxsize=32)
def _points(
    height: int, width: int, is_finer: bool, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """x (1, columns, 1) and y (rows, 1, 1) in pixels from the center, and torch's units in one."""

    def positions(size: int) -> Tensor:
        indices = torch.arange(size, dtype=dtype)
        if is_finer:
            indices = torch.arange(-_HALF, 2 * size + _HALF, dtype=dtype) / 2 - _PHASE / 2
        return (indices - (size - 1) / 2).to(device)

    units = torch.tensor([2 / max(size - 1, 1) for size in (width, height)], dtype=dtype)
    return positions(width)[None, :, None], positions(height)[:, None, None], units.to(device)


@cached_tensors(maxsize=32)
def _filters(size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Up-sampling (2 size - 1, size) and down-sampling (size, 2 size + 10) as matrices, which are
    faster than convolutions of single channels. Down-sampling undoes up-sampling but for the
    border: what is up-sampled ends at the outermost pixels, where sampling reflects it.
    """
    taps = np.array(SYM6)
    up, down = np.zeros((2 * size - 1, size)), np.zeros((size, 2 * size + 2 * _HALF))
    for pixel in range(-_HALF - 1, size + _HALF):
        for tap, value in enumerate(taps):
            row = 2 * pixel - _HALF + tap
            if 0 <= row < 2 * size - 1:
                up[row, reflected(pixel, size)] += value * np.sqrt(2)
    for pixel in range(size):
        down[pixel, 2 * pixel : 2 * pixel + len(taps)] = taps / np.sqrt(2)
    return tuple(torch.from_numpy(each).to(device, dtype) for each in (up, down))  # type: ignore[return-value]


def reflected(position: int, size: int) -> int:
    """The pixel at a position outside of an image that is reflected about its outermost pixels."""
    period = max(2 * size - 2, 1)
    position = abs(position) % period
    return min(position, period - position)


class _Sample(Function):
    """Sampling at given points; its gradient is the transpose."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, grid: Tensor, how: _Sampling) -> Tensor:
        ctx.save_for_backward(grid)
        ctx.shape, ctx.how = images.shape, how
        return torch.grid_sampler(images, grid, *how)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (grid,) = ctx.saved_tensors
        return _SampleTransposed.apply(gradient, grid, ctx.how, ctx.shape), None, None


class _SampleTransposed(Function):
    @staticmethod
    def forward(
        ctx: Any, gradient: Tensor, grid: Tensor, how: _Sampling, shape: torch.Size
    ) -> Tensor:
        ctx.save_for_backward(grid)
        ctx.how = how
        # The images themselves matter to the points' gradient only.
        images = gradient.new_zeros(()).expand(shape)
        return torch.ops.aten.grid_sampler_2d_backward(
            gradient.contiguous(), images, grid, *how, [True, False]
        )[0]

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, gradient: Tensor
    ) -> tuple[Tensor, None, None, None]:
        (grid,) = ctx.saved_tensors
        return _Sample.apply(gradient, grid, ctx.how), None, None, None
