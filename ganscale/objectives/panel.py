"""Every known loss on the logits that a step already has: variants compared within one run."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ganscale.objectives.losses import Loss, total
from ganscale.runtime import all_gather_batch


@torch.no_grad()
def panel_meters(network: str, losses: Mapping[str, Loss], *logits: Tensor) -> dict[str, Tensor]:
    """`panel/<network>/<loss>`: the value of each critic or generator loss.

    logits: (real, fake) for the critic, (fake, real) for the generator
    """
    meters = {}
    for name, loss in losses.items():
        terms_of = loss.critic if network == "critic" else loss.generator_terms
        gathered = map(all_gather_batch, logits) if loss.needs_global_batch else logits
        meters[f"panel/{network}/{name}"] = total(terms_of(*gathered))
    return meters
