"""How images reach a network: three channels, and its size."""

import torch.nn.functional as F
from torch import Tensor

from ganscale.errors import UserError


def check_channels(name: str, sample_shape: tuple[int, int, int]) -> None:
    """Raises UserError unless the images are grey or RGB."""
    if sample_shape[0] not in (1, 3):
        raise UserError(
            f"feature network {name} takes images of 1 or 3 channels, not of {sample_shape[0]}: "
            "use a network of your own (evaluation.network=package.module:Class)"
        )


def to_rgb(images: Tensor) -> Tensor:
    """(batch, 1 or 3, height, width) -> (batch, 3, height, width); grey is repeated."""
    return images.expand(-1, 3, -1, -1)


def squeezed(size: int, sample_shape: tuple[int, int, int]) -> str:
    """`size x size`, and that images that are not square are squeezed to it: for the identity of
    figures."""
    _, height, width = sample_shape
    square = f"{size} x {size}"
    return square if height == width else f"{square}, squeezed from {height} x {width}"


def resize(images: Tensor, size: int, mode: str) -> Tensor:
    """Float images at size x size, squeezed if they are not square; antialiased where that is
    smaller."""
    if images.shape[2:] == (size, size):
        return images
    return F.interpolate(images, (size, size), mode=mode, antialias=True)
