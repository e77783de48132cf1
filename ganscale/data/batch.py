"""What a loader hands out."""

from dataclasses import dataclass

from jaxtyping import Int64, UInt8
from torch import Tensor

from ganscale.data.bad_samples import BadSample


@dataclass(frozen=True)
class Batch:
    """This rank's share of a global batch: from a loader on the host, in pinned memory if asked.

    broken: the samples that others took the place of, in the order of the rows
    """

    images: UInt8[Tensor, "batch height width channels"]
    labels: Int64[Tensor, " batch"]  # -1 where the data set has none
    slots: Int64[Tensor, " batch"]  # what random draws for these images go with
    bad_samples: tuple[BadSample, ...] = ()
