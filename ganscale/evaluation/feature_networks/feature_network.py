"""What an evaluation asks of a feature network."""

from typing import NamedTuple, Protocol, runtime_checkable

from jaxtyping import Float, UInt8
from torch import Tensor


class Features(NamedTuple):
    """Of a batch of images."""

    features: Float[Tensor, "batch dim"]
    probabilities: Float[Tensor, "batch classes"] | None = None


@runtime_checkable
class FeatureNetwork(Protocol):
    """Features, and class probabilities where it classifies, of uint8 images on one device.

    name: as in the settings and in the names of the figures
    checksum: SHA-256 of its weights; a figure from other weights is another figure
    resize: how images reach the network's size, in words
    num_classes: 0 if it does not classify
    """

    name: str
    checksum: str
    resize: str
    dim: int
    num_classes: int

    def __call__(self, images: UInt8[Tensor, "batch channels height width"]) -> Features: ...
