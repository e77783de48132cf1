"""A critic that hangs or fails on one rank after some steps, set by the environment variable
MISBEHAVE=RANK:hang or RANK:fail."""

import os
import time
from itertools import count
from typing import Any

from torch import Tensor

from ganscale.networks.dcgan import DCGANCritic

# More than those of the trial before the first step, which would notice a counter in a layer.
_FORWARDS_BEFORE = 150
_FORWARDS = count()


class Critic(DCGANCritic):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        rank, _, self._how = os.environ.get("MISBEHAVE", "-1:").partition(":")
        self._misbehaves = rank == os.environ.get("RANK", "0")

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        if next(_FORWARDS) > _FORWARDS_BEFORE and self._misbehaves:
            print("misbehaves now", flush=True)
            if self._how == "hang":
                time.sleep(1e6)
            raise RuntimeError("the weights of this rank are tired")
        return super().forward(images, labels)
