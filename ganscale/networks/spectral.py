"""Spectral normalization whose power iteration goes on once per update, not once per forward."""

import torch
from torch import nn
from torch.nn.utils.parametrizations import _SpectralNorm


@torch.no_grad()
def advance_power_iterations(network: nn.Module) -> None:
    """One power iteration for every spectrally normalized weight, which forwards then leave alone.

    In training mode torch takes one at every forward. Then penalties, micro-batches and generator
    steps would each see other weights, and a run would depend on how its batch is split.
    """
    for layer in network.modules():
        for name, chain in getattr(layer, "parametrizations", {}).items():
            for parametrization in chain:
                if isinstance(parametrization, _SpectralNorm):
                    parametrization.train()
                    getattr(layer, name)
                    parametrization.eval()
