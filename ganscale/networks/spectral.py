"""Spectral normalization with one power iteration per update instead of one per forward."""

import torch
from torch import nn
from torch.nn.utils.parametrizations import _SpectralNorm


@torch.no_grad()
def update_spectral_norms(network: nn.Module) -> None:
    """Does one power iteration per spectrally normalized weight; forwards no longer do any.

    torch does one in every training forward. Then penalties, micro-batches and generator steps
    would each see different weights, and a run would depend on how its batch is split.
    """
    for layer in network.modules():
        for name, parametrizations in getattr(layer, "parametrizations", {}).items():
            for parametrization in parametrizations:
                if isinstance(parametrization, _SpectralNorm):
                    parametrization.train()
                    getattr(layer, name)
                    parametrization.eval()
