"""How networks are called: with labels or without, and what their forwards may change."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.utils._python_dispatch import TorchDispatchMode

from ganscale.errors import GanscaleError, UserCodeError
from ganscale.importing import describe
from ganscale.runtime import is_of_machine


def run_network(
    network: nn.Module, inputs: Float[Tensor, "batch *input"], labels: Tensor | None = None
) -> Float[Tensor, "batch *output"]:
    """G(z) or D(x), or G(z, y) or D(x, y) for class-conditional networks.

    Raises UserCodeError for whatever the network raises, with the line of its code.
    """
    try:
        outputs = network(inputs) if labels is None else network(inputs, labels)
        # A critic that squeezes its output returns a scalar for a batch of one.
        is_scalar = isinstance(outputs, Tensor) and outputs.ndim == 0 and len(inputs) == 1
        return outputs[None] if is_scalar else outputs
    except GanscaleError:
        raise
    except Exception as error:
        if is_of_machine(error):
            raise
        message = f"{type(network).__name__} fails in its forward: {describe(error)}"
        raise UserCodeError(message) from error


class LowestPrecision(TorchDispatchMode):
    """Notes the lowest floating-point dtype in which anything is computed within. A network may
    cast its inputs and weights itself."""

    def __init__(self) -> None:
        super().__init__()
        self.dtype = torch.float64

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if isinstance(output, Tensor) and output.is_floating_point():
            self.dtype = min(self.dtype, output.dtype, key=lambda dtype: torch.finfo(dtype).bits)
        return output


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Sets the dtype of tensors that a forward makes without naming one."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def buffers_restored(*networks: nn.Module) -> Iterator[None]:
    """Restores all buffers of `networks` (running means, power iterations) when the block ends."""
    buffers = [buffer for network in networks for buffer in network.buffers()]
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)


@contextmanager
def in_evaluation(network: nn.Module) -> Iterator[None]:
    """Within, all modules are in evaluation mode; afterwards, each is in its mode before.

    `network.train()` would not do: power iterations, and what a user has frozen, stay in evaluation
    while the rest trains.
    """
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


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
