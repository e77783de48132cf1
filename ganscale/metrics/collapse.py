"""Does the generator still make different images? Two ratios, measured in logged steps.

Both compare distances among fakes with distances among the real images of the same global batch.
Every k-th image is used, so that at most `_IMAGES` remain, downsampled to `_PIXELS` pixels a side:
images that differ only in noise count as the same.

    diversity   E |x - x'|^2 among fakes / the same among real images
    nearest     E min_x' |x - x'|^2 among fakes / the same among real images

for x, x' different images of a batch. A generator with one image has 0 in both. One with a few
images has a diversity near 1, but a `nearest` near 0. A healthy one comes near 1 in both.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from ganscale.runtime import Runtime

_IMAGES, _PIXELS = 256, 16


@torch.no_grad()
def collapse_meters(
    real_images: Float[Tensor, "batch *sample"],
    fake_images: Float[Tensor, "batch *sample"],
    positions: Int64[Tensor, " batch"],
    global_batch_size: int,
    runtime: Runtime,
) -> dict[str, Tensor]:
    """`collapse/`, the same on every rank; one collective of at most a few megabytes.

    positions: of this rank's images in the global batch
    """
    if global_batch_size == 1:
        return {}
    stride = -(-global_batch_size // _IMAGES)
    count = -(-global_batch_size // stride)
    both = torch.stack([_downsample(real_images), _downsample(fake_images)], dim=1).double()
    # Unused images go to an extra row: selecting the others would wait for the device.
    rows = both.new_zeros(count + 1, *both.shape[1:])
    rows[torch.where(positions % stride == 0, positions // stride, count)] = both
    images = runtime.all_reduce_sum(rows[:count]).transpose(0, 1)
    images = images - images.mean(1, keepdim=True)  # same distances, less rounding error
    squares = images.square().sum(2)
    distances = squares[:, :, None] + squares[:, None, :] - 2 * images @ images.mT
    distances.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    nearest = distances.amin(2).clamp_min(0).mean(1)
    spread = squares.mean(1)  # half the mean squared distance, up to n / (n - 1)
    tiny = torch.finfo(torch.float32).tiny
    return {
        "collapse/diversity": spread[1] / spread[0].clamp_min(tiny),
        "collapse/nearest": nearest[1] / nearest[0].clamp_min(tiny),
    }


def _downsample(images: Tensor) -> Tensor:
    """(batch, values)"""
    if images.ndim == 4:
        height, width = images.shape[2:]
        images = adaptive_avg_pool2d(images, (min(height, _PIXELS), min(width, _PIXELS)))
    return images.flatten(1)
