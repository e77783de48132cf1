"""The fastest exact form of a network's forward that is differentiated at most once."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ganscale.errors import UserError
from ganscale.objectives.fast_derivatives import FastDerivatives

Forward = Callable[..., Tensor]


def fast_forward(forward: Forward, compiles: bool, frozen: nn.Module | None = None) -> Forward:
    """`forward` under `FastDerivatives`, or compiled.

    compiles: by torch.compile, which has no second derivatives. The result raises UserError for a
        network that cannot be compiled.
    frozen: a network whose weights need no gradient. Autograd finds that out in the backward;
        compiled code has to know it beforehand.
    """
    if compiles:
        return _compiled(forward, frozen)

    def run(*inputs: Tensor | None) -> Tensor:
        with FastDerivatives():
            return forward(*inputs)

    return run


def _compiled(forward: Forward, frozen: nn.Module | None) -> Forward:
    from torch._dynamo.exc import TorchDynamoException  # takes a second to import

    # Each network may compile a form per batch size; none of them counts against the others.
    compiled = torch.compile(  # pyright: ignore[reportCallIssue]
        lambda *inputs: forward(*inputs), dynamic=False, isolate_recompiles=True
    )
    trained = [] if frozen is None else [p for p in frozen.parameters() if p.requires_grad]

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
