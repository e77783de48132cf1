"""Every known loss on the logits that a step already has: variants compared within one run."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ganscale.objectives.losses import Loss, Terms, total
from ganscale.runtime import all_gather_batch


@torch.no_grad()
def critic_panel(
    losses: Mapping[str, Loss], real_logits: Tensor, fake_logits: Tensor
) -> dict[str, Tensor]:
    """`panel/critic/<loss>`: the value of each critic loss, with its default options."""
    return {
        f"panel/critic/{name}": _value(loss, loss.critic, real_logits, fake_logits)
        for name, loss in losses.items()
    }


@torch.no_grad()
def generator_panel(
    losses: Mapping[str, Loss], fake_logits: Tensor, real_logits: Tensor
) -> dict[str, Tensor]:
    """`panel/generator/<loss>`: the value of each generator loss."""
    return {
        f"panel/generator/{name}": _value(loss, loss.generator_terms, fake_logits, real_logits)
        for name, loss in losses.items()
    }


def _value(loss: Loss, terms_of: Callable[..., Terms], *logits: Tensor) -> Tensor:
    if loss.needs_global_batch:
        logits = tuple(all_gather_batch(local) for local in logits)
    return total(terms_of(*logits))
