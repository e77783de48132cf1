"""What a loader returns, and the memory that it fills."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from ganscale.data.bad_samples import BadSample

BatchAllocator = Callable[[tuple[int, ...]], Tensor]
"""Of a shape: the uint8 tensor that a batch's images are decoded into."""


@dataclass(frozen=True)
class Batch:
    """This rank's share of a global batch. `bad_samples` were replaced by others, in order of the
    rows."""

    images: UInt8[Tensor, "batch height width channels"]
    labels: Int64[Tensor, " batch"]  # -1 where the data set has none
    slots: Int64[Tensor, " batch"]  # for the random draws that belong to these images
    bad_samples: tuple[BadSample, ...] = ()
    draws: Float[Tensor, " values"] | None = None  # of `randomness.draw_together`, made ahead


def allocate_batch(shape: tuple[int, ...], is_pinned: bool = False) -> Tensor:
    """is_pinned: in page-locked memory, which a GPU copies from while the processor continues"""
    return torch.empty(shape, dtype=torch.uint8, pin_memory=is_pinned)
