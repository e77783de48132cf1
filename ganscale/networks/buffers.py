"""Forwards that leave no trace in a network's buffers (running means, power iterations)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def buffers_restored(*networks: nn.Module) -> Iterator[None]:
    """Puts all buffers of `networks` back to their values of before when the block ends."""
    buffers = [buffer for network in networks for buffer in network.buffers()]
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
