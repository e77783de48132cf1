"""Losses of the whole global batch, differentiated exactly on every rank and in micro-batches.

Such a loss (relativistic average) is not a mean over ranks and micro-batches. But its derivative
with respect to each logit is a number, known as soon as all logits are, and the gradient of the sum
of logits, each times its derivative, is the gradient of the loss. So the logits are gathered over
the ranks without a graph, a few bytes per image, and every rank differentiates its own share.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ganscale.objectives.losses import Terms, total
from ganscale.runtime import all_gather_batch, get_rank


@torch.no_grad()
def logit_gradients(
    loss: Callable[..., Terms], *logits: Tensor
) -> tuple[Terms, tuple[Tensor, ...]]:
    """(the detached terms on the global batch, the loss's gradient with respect to this rank's
    share of each of `logits`).

    `logits`: (batch, ...) each, of equal batch on all ranks.
    """
    gathered = [all_gather_batch(local).requires_grad_() for local in logits]
    with torch.enable_grad():
        terms = loss(*gathered)
        gradients = torch.autograd.grad(
            total(terms), gathered, allow_unused=True, materialize_grads=True
        )
    batch = len(logits[0])
    share = slice(get_rank() * batch, (get_rank() + 1) * batch)
    detached = {name: term.detach() for name, term in terms.items()}
    return detached, tuple(gradient[share] for gradient in gradients)


def surrogate_loss(
    value: Tensor, logits: tuple[Tensor, ...], gradients: tuple[Tensor, ...], scale: int
) -> Tensor:
    """A scalar equal to `value` whose backward gives `scale * gradients` to `logits`.

    `scale` undoes the averaging that follows: over ranks by DDP, over micro-batches by the updater.
    """
    weighted = sum((each * grad).sum() for each, grad in zip(logits, gradients, strict=True))
    surrogate = scale * torch.as_tensor(weighted)
    return value + (surrogate - surrogate.detach())  # adds exactly zero, however large the logits
