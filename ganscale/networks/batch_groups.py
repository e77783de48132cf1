"""Networks that look at groups of images, and the minibatch standard deviation of StyleGAN.

Any module of a network may have an attribute `batch_group_size`, an int: then what the network
computes for an image may depend on the images of its group, and on no others. Groups are runs of
that many consecutive images of a batch. Every batch that a network gets is a whole number of
groups, and which images share one does not depend on how many ranks and micro-batches there are.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ganscale.errors import UserCodeError, UserError
from ganscale.importing import describe
from ganscale.runtime import at_least_float32


def batch_group_size(*networks: nn.Module) -> int:
    """The least common multiple of the group sizes that modules of these networks declare, 1 where
    none does. Raises UserError for a size that is not a positive int, or that cannot be read."""
    sizes = [1]
    for network in networks:
        for module in network.modules():
            try:
                size = getattr(module, "batch_group_size", 1)
            except Exception as error:
                message = f"`batch_group_size` of {type(module).__name__} fails: {describe(error)}"
                raise UserCodeError(message) from error
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                kind, shown = type(module).__name__, f"{size!r:.60}"
                raise UserError(f"`batch_group_size` of {kind} must be a positive int, not {shown}")
            sizes.append(size)
    return math.lcm(*sizes)


def up_to_whole_groups(images: int, network: nn.Module) -> int:
    """`images`, or the next larger whole number of the network's groups."""
    size = batch_group_size(network)
    return -(-images // size) * size


def check_whole_groups(network: nn.Module, name: str, images: int) -> None:
    """Raises UserError if `images` is not a whole number of the network's groups.

    name: of the setting or number that `images` is
    """
    if images % (size := batch_group_size(network)):
        below, above = images // size * size, -(-images // size) * size
        nearest = f"{below} or {above}" if below else f"{above}"
        raise UserError(
            f"{name} of {images} is not a whole number of the groups of {size} images that "
            f"{type(network).__name__} looks at: choose {nearest}"
        )


def every_nth_group(batch: Tensor, first: int, n: int, group_size: int) -> Tensor:
    """Every n-th group of a batch from group number `first` on: a copy in the batch's memory
    format, without gaps."""
    return batch.unflatten(0, (-1, group_size))[first::n].clone().flatten(0, 1)


class MinibatchStdDev(nn.Module):
    """Shows a critic how much the images of a group differ: for each feature, its standard
    deviation over a group of consecutive images; these averaged over channels and pixels, and
    appended as channels.

    Karras et al. 2018 (https://arxiv.org/abs/1710.10196), section 3; in groups, and in float32
    also under autocast, as in StyleGAN2's code (https://arxiv.org/abs/1912.04958). There, a group
    is made of images that are far apart in a batch, and so depends on the size of the batch.

    The deviation is sqrt(variance + 1e-8), whose derivatives of all orders are finite, also for
    images that are the same: the first one is zero there.
    """

    _EPSILON = 1e-8

    def __init__(self, group_size: int = 4, features: int = 1) -> None:
        """group_size: images in a group
        features: the appended channels, each for an equal part of the input's channels

        Raises ValueError for numbers below 1.
        """
        super().__init__()
        if min(group_size, features) < 1:
            raise ValueError(f"{group_size} images and {features} features: both must be positive")
        self.batch_group_size, self.features = group_size, features

    def extra_repr(self) -> str:
        return f"{self.batch_group_size}, features={self.features}"

    def forward(
        self, input: Float[Tensor, "batch channels *pixels"]
    ) -> Float[Tensor, "batch channels_and_features *pixels"]:
        """Raises UserError for a batch that is not a multiple of the group, or for channels
        that `features` does not divide."""
        size, (batch, channels, *pixels) = self.batch_group_size, input.shape
        if batch % size or channels % self.features:
            raise UserError(
                f"MinibatchStdDev of groups of {size} images and {self.features} features cannot "
                f"divide {batch} images of {channels} channels evenly"
            )
        parts = at_least_float32(input).unflatten(0, (-1, size)).unflatten(2, (self.features, -1))
        # `torch.var` takes five times as long on a CPU.
        variances = (parts - parts.mean(1, keepdim=True)).square().mean(1)
        deviations = (variances + self._EPSILON).sqrt()
        means = deviations.mean([*range(2, deviations.ndim)])  # (groups, features)
        of_images = means[:, None].expand(-1, size, -1).reshape(batch, -1, *[1] * len(pixels))
        maps = of_images.to(input.dtype).expand(-1, -1, *pixels)
        if input.ndim == 4 and input.is_contiguous(memory_format=torch.channels_last):
            maps = maps.contiguous(memory_format=torch.channels_last)  # the layout that `cat` keeps
        return torch.cat([input, maps], dim=1)
