"""Weight clipping of the critic (Arjovsky, Chintala, Bottou 2017, algorithm 1, line 7).

Every rank clips its own replica right after the same averaged update, so replicas stay equal, bit
for bit, without communication. Buffers are never clipped.
"""

import torch
from torch import Tensor, nn

from ganscale.errors import UserError


def clipped_parameters(critic: nn.Module, scope: str) -> list[Tensor]:
    """The critic's parameters in `scope`: "all" as in the paper's code, or "weights".

    "weights" have two or more dimensions. The gains of norm layers have one: clipped to +-0.01,
    they would extinguish the signal (measured: input gradients shrink a few hundred times). Frozen
    parameters stay as they are.

    Raises UserError if there are none.
    """
    trained: list[Tensor] = [p for p in critic.parameters() if p.requires_grad]
    found = [p for p in trained if scope == "all" or p.ndim > 1]
    if not found:
        raise UserError("`objective.clip`: the critic has no weights to clip in that scope")
    return found


@torch.no_grad()
def clip_weights(parameters: list[Tensor], value: float) -> None:
    """Clamps each parameter to [-value, value] in place."""
    torch._foreach_clamp_max_(parameters, value)
    torch._foreach_clamp_min_(parameters, -value)


@torch.no_grad()
def clipped_fraction(parameters: list[Tensor], value: float) -> Tensor:
    """The fraction of elements at a bound, a float32 scalar on the parameters' device."""
    at_bound = torch.stack([(tensor.abs() >= value).sum() for tensor in parameters]).sum()
    return at_bound / sum(tensor.numel() for tensor in parameters)
