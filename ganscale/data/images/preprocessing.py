"""From the loader's bytes to the networks' floats, on the device."""

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from ganscale.randomness import Draw

FLIP = Draw("flip")


def to_network_range(
    images: UInt8[Tensor, "batch height width channels"],
) -> Float[Tensor, "batch channels height width"]:
    """float32 in [-1, 1]; channels last in memory, as the bytes were."""
    return images.permute(0, 3, 1, 2).float() * (2 / 255) - 1


def to_bytes(
    images: Float[Tensor, "batch channels height width"],
) -> UInt8[Tensor, "batch height width channels"]:
    """The inverse, rounded; values outside [-1, 1] saturate."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1)


def random_flip(
    images: Float[Tensor, "batch channels height width"],
    seed: int,
    slots: Int64[Tensor, " batch"],
    drawn: Float[Tensor, "batch 1"] | None = None,
) -> Float[Tensor, "batch channels height width"]:
    """Mirrors each image with probability 1/2, decided by its slot.

    drawn: `FLIP` at these slots, if it was made ahead
    """
    drawn = FLIP.at(seed, slots) if drawn is None else drawn
    mirrored = drawn.view(-1, 1, 1, 1) < 0.5
    return torch.where(mirrored, images.flip(3), images)
