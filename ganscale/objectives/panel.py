"""Every known loss on the logits that a step already has: variants compared within one run."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ganscale.objectives.losses import Loss
from ganscale.runtime import all_gather_batch


@torch.no_grad()
def critic_panel(
    losses: Mapping[str, Loss], real_logits: Tensor, fake_logits: Tensor
) -> dict[str, Tensor]:
    """`panel/critic/<loss>`: what each loss, with its default options, would say to the critic."""
    return {
        f"panel/critic/{name}": _value(loss, loss.critic, real_logits, fake_logits)
        for name, loss in losses.items()
    }


@torch.no_grad()
def generator_panel(
    losses: Mapping[str, Loss], fake_logits: Tensor, real_logits: Tensor
) -> dict[str, Tensor]:
    """`panel/generator/<loss>`: what each loss would say to the generator."""
    return {
        f"panel/generator/{name}": _value(loss, loss.generator, fake_logits, real_logits)
        for name, loss in losses.items()
    }


def _value(loss: Loss, part: Callable[..., Tensor], *logits: Tensor) -> Tensor:
    if loss.needs_global_batch:
        logits = tuple(all_gather_batch(each) for each in logits)
    return part(*logits)
