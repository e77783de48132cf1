"""Losses that look at a whole batch at once, taken on the global batch exactly.

Such a loss (relativistic average) is no mean over ranks and micro-batches. But its gradient with
respect to each logit is a number, known as soon as all logits are; and the gradient of the sum of
logits, each times its number, is the gradient of the loss. So the logits are gathered over the
ranks without a graph, a few bytes an image, and every rank differentiates its own part.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ganscale.objectives.losses import Parts
from ganscale.runtime import all_gather_batch, get_rank


@torch.no_grad()
def logit_gradients(
    loss: Callable[..., Tensor], *logits: Tensor, parts: Callable[..., Parts] | None = None
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """(the loss on the global batch, its gradient with respect to this rank's part of each logits,
    its parts for real images and for fakes, if it has such).

    `logits`: (batch, ...) each, of equal batch on all ranks.
    """
    everywhere = [all_gather_batch(part.detach()).requires_grad_() for part in logits]
    with torch.enable_grad():
        value = loss(*everywhere)
        gradients = torch.autograd.grad(
            value, everywhere, allow_unused=True, materialize_grads=True
        )
    batch = len(logits[0])
    own = slice(get_rank() * batch, (get_rank() + 1) * batch)
    of_kinds = () if parts is None else parts(*(logit.detach() for logit in everywhere))
    return value.detach(), tuple(gradient[own] for gradient in gradients), of_kinds


def surrogate_loss(
    value: Tensor, logits: tuple[Tensor, ...], gradients: tuple[Tensor, ...], scale: int
) -> Tensor:
    """A scalar that reads `value` and whose backward gives `scale * gradients` to `logits`.

    `scale` undoes the averaging to come: over ranks by DDP, over micro-batches by the player.
    """
    weighted = sum((logit * part).sum() for logit, part in zip(logits, gradients, strict=True))
    surrogate = scale * torch.as_tensor(weighted)
    return value + (surrogate - surrogate.detach())  # exactly zero: large logits blur nothing
