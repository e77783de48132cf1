"""Every known loss on the logits that a step already has: variants compared within one run."""

import torch
from torch import Tensor

from ganscale.objectives.losses import LOSSES


@torch.no_grad()
def critic_panel(real_logits: Tensor, fake_logits: Tensor) -> dict[str, Tensor]:
    """`panel/critic/<loss>`: what each loss would say to the critic, with its default labels."""
    return {
        f"panel/critic/{name}": build().critic(real_logits, fake_logits)
        for name, build in LOSSES.items()
    }


@torch.no_grad()
def generator_panel(fake_logits: Tensor, real_logits: Tensor) -> dict[str, Tensor]:
    """`panel/generator/<loss>`: what each loss would say to the generator."""
    return {
        f"panel/generator/{name}": build().generator(fake_logits, real_logits)
        for name, build in LOSSES.items()
    }
