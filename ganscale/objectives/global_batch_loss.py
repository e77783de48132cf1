"""Losses of the whole global batch, differentiated exactly on every rank and in micro-batches.

Such a loss (relativistic average) is not a mean over ranks and micro-batches. But its derivative
with respect to each logit is a number, known as soon as all logits are, and the gradient of the sum
of logits, each times its derivative, is the gradient of the loss. So the logits are gathered over
the ranks without a graph, a few bytes per image, and every rank differentiates its own share.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ganscale.objectives.losses import Logits, Terms, total
from ganscale.runtime import all_gather_batch, get_rank


class LogitGradients(NamedTuple):
    """The detached terms on the global batch, and the loss's gradient at this rank's logits."""

    terms: Terms
    gradients: dict[str, Float[Tensor, "batch *map"]]  # by kind of image: real, fake


@torch.no_grad()
def logit_gradients(loss: Callable[..., Terms], logits: Logits) -> LogitGradients:
    """`logits`: of equal batch on all ranks."""
    gathered = [all_gather_batch(local).requires_grad_() for local in logits.values()]
    with torch.enable_grad():
        terms = loss(*gathered)
        gradients = torch.autograd.grad(
            total(terms), gathered, allow_unused=True, materialize_grads=True
        )
    detached = {name: term.detach() for name, term in terms.items()}
    shares = {
        kind: gradient.unflatten(0, (-1, len(logits[kind])))[get_rank()]
        for kind, gradient in zip(logits, gradients, strict=True)
    }
    return LogitGradients(detached, shares)


def surrogate_loss(logits: Logits, gradients: LogitGradients, scale: int) -> Tensor:
    """A scalar equal to the loss whose backward gives `scale * gradients` to `logits`.

    `scale` undoes the averaging that follows: over ranks by DDP, over micro-batches by the updater.
    """
    differentiable = [kind for kind in logits if logits[kind].requires_grad]
    weighted = sum((logits[kind] * gradients.gradients[kind]).sum() for kind in differentiable)
    surrogate = scale * torch.as_tensor(weighted)
    # The difference is exactly zero, however large the logits.
    return total(gradients.terms) + (surrogate - surrogate.detach())
