"""How a feature network is checked and built: the interface of all of them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch

from ganscale.evaluation.feature_networks.feature_network import FeatureNetwork


@dataclass(frozen=True)
class Place:
    """What building a feature network depends on besides its options.

    sample_shape: (channels, height, width) of the images
    cache: the folder of this machine for files that are fetched
    retry_seconds: how long a network may fail meanwhile
    """

    sample_shape: tuple[int, int, int]
    cache: Path
    retry_seconds: float


@runtime_checkable
class Recipe(Protocol):
    """Constructed with the network's options."""

    @property
    def name(self) -> str:
        """The network's name in the names of its figures."""
        ...

    def check(self, place: Place) -> None:
        """Raises UserError if a package or file is missing; fetches what is not on this machine."""
        ...

    def build(self, place: Place, device: torch.device) -> FeatureNetwork: ...
