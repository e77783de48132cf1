"""What a step returns: its loss, the terms of it, and the meters that show them."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ganscale.metrics.meters import Meter, Scaled
from ganscale.objectives.global_batch_loss import LogitGradients, logit_gradients, surrogate_loss
from ganscale.objectives.losses import Logits, Terms, total
from ganscale.objectives.objective import WeightedGeneratorPenalty, WeightedPenalty
from ganscale.runtime import get_world_size
from ganscale.schedules import Schedule

Meters = dict[str, Meter]


class StepOutput(NamedTuple):
    """What the forward of a step returns; all but the loss is detached."""

    loss: Tensor  # the scalar to differentiate
    meters: Meters  # means over this rank's images
    norms: dict[str, Tensor]  # of each of this rank's images
    logits: Logits


def with_penalty(
    loss: Tensor,
    value: Tensor,
    penalty: WeightedPenalty | WeightedGeneratorPenalty,
    factor: float | Tensor | None,
) -> tuple[Tensor, Meter]:
    """(the loss with the weighted penalty, the meter of that term).

    factor: of the penalty in this step, if its weight has a schedule. The meter is a tensor then,
        since meters of different factors are not reduced together
    """
    if not isinstance(penalty.weight, Schedule):
        factor = penalty.weight * penalty.interval
        return torch.add(loss, value, alpha=factor), Scaled(value.detach(), factor)
    assert factor is not None
    if isinstance(factor, Tensor):  # in a captured step
        return torch.addcmul(loss, value, factor.to(value.dtype)), value.detach() * factor
    return torch.add(loss, value, alpha=factor), value.detach() * factor


def terms_and_loss(
    loss_terms: Callable[..., Terms],
    needs_global_batch: bool,
    logits: Logits,
    gradients: LogitGradients | None,
    micro_batches: int,
) -> tuple[Terms, Tensor]:
    scale = get_world_size() * micro_batches
    if scale == 1 or not needs_global_batch:
        terms = loss_terms(*logits.values())
        return terms, total(terms)
    gradients = gradients or logit_gradients(loss_terms, logits)
    return gradients.terms, surrogate_loss(logits, gradients, scale)


def term_meters(network: str, terms: Terms) -> Meters:
    """The real and the fake term; a term of pairs is the whole loss."""
    return {
        f"loss/{network}_{kind}": terms[kind].detach() for kind in ("real", "fake") if kind in terms
    }
