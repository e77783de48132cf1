"""A critic that hangs or fails on one rank after some steps, set by the environment variable
MISBEHAVE=RANK:hang or RANK:fail."""

import os
import time
from typing import Any

from torch import Tensor

from ganscale.networks.dcgan import DCGANCritic

_FORWARDS_BEFORE = 20


class Critic(DCGANCritic):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._forwards = 0
        rank, _, self._how = os.environ.get("MISBEHAVE", "-1:").partition(":")
        self._misbehaves = rank == os.environ.get("RANK", "0")

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        self._forwards += 1
        if self._misbehaves and self._forwards > _FORWARDS_BEFORE:
            print("misbehaves now", flush=True)
            if self._how == "hang":
                time.sleep(1e6)
            raise RuntimeError("the weights of this rank are tired")
        return super().forward(images, labels)
