"""The fastest exact form of a network's forward that is differentiated at most once."""

from collections.abc import Callable
from inspect import signature

import torch
from torch import Tensor, nn

from ganscale.errors import UserError
from ganscale.networks.forward import run_network
from ganscale.objectives.fast_derivatives import first_derivatives


def fast_forward(
    network: nn.Module, compiles: bool, is_frozen: bool = False
) -> Callable[..., Tensor]:
    """`run_network` of `network` under `first_derivatives`, or compiled.

    compiles: by torch.compile, which has no second derivatives. The result raises UserError for a
        network that cannot be compiled.
    is_frozen: whether its weights need no gradient. Autograd finds that out in the backward;
        compiled code has to know it beforehand.
    """
    if compiles:
        return _compiled(network, is_frozen)

    def run(inputs: Tensor, labels: Tensor | None) -> Tensor:
        with first_derivatives(inputs.device):
            return run_network(network, inputs, labels)

    return run


def _compiled(network: nn.Module, is_frozen: bool) -> Callable[..., Tensor]:
    from torch._dynamo.exc import TorchDynamoException  # takes a second to import

    def forward(inputs: Tensor, labels: Tensor | None) -> Tensor:
        return network(inputs) if labels is None else network(inputs, labels)

    # Each network may compile a form per batch size; none of them counts against the others.
    options = {}
    if "isolate_recompiles" in signature(torch.compile).parameters:
        options["isolate_recompiles"] = True
    else:  # older torch counts per code object
        forward.__code__ = forward.__code__.replace()
    compiled: Callable[..., Tensor] = torch.compile(forward, dynamic=False, **options)
    trained = [p for p in network.parameters() if is_frozen and p.requires_grad]

    def run(*inputs: Tensor | None) -> Tensor:
        try:
            for parameter in trained:
                parameter.requires_grad_(False)
            return compiled(*inputs)
        except TorchDynamoException as error:
            reason = str(error).strip().partition("\n")[0]
            message = f"`training.compile`: a network cannot be compiled: {reason}"
            raise UserError(message) from error
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)

    return run
