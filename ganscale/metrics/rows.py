"""From meters to the metrics of a row: norms of weights, standard deviations, histograms."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from ganscale.runtime import Runtime

_BINS = 32

Histogram = dict[str, list[float]]
"""`counts`, and their `edges`, one more."""


@torch.no_grad()
def weight_meters(
    trained: Mapping[str, Sequence[Tensor]], generator: nn.Module, ema: nn.Module
) -> dict[str, Tensor]:
    """The 2-norm of each network's trained weights, and the relative distance of the EMA from the
    generator: |ema - weights| / |weights|."""
    meters = {f"optim/{name}_weight_norm": get_total_norm(trained[name]) for name in trained}
    weights = [parameter.detach() for parameter in generator.parameters()]
    difference = torch._foreach_sub([parameter.detach() for parameter in ema.parameters()], weights)
    meters["optim/ema_distance"] = get_total_norm(difference) / get_total_norm(weights)
    return meters


def derived_metrics(means: dict[str, float]) -> dict[str, float]:
    """Means of squares become standard deviations over all images of the interval; the difference
    of the logits' means is added as an estimate of the Wasserstein distance.

    E[D(real)] - E[D(fake)]: Arjovsky et al. 2017 (arXiv:1701.07875), equation 2, up to the critic's
    Lipschitz constant.
    """
    row = dict(means)
    for name, square in means.items():
        if name.endswith("_square"):
            stem = name.removesuffix("_square")
            mean = means[f"{stem}_mean"] if f"{stem}_mean" in means else means[stem]
            del row[name]
            row[f"{stem}_std"] = max(square - mean * mean, 0.0) ** 0.5
    row["logits/wasserstein"] = row["logits/real_mean"] - row["logits/fake_mean"]
    return row


@torch.no_grad()
def logit_histograms(logits: dict[str, Tensor], runtime: Runtime) -> dict[str, Histogram]:
    """Histograms of the logits of all ranks by kind, on shared edges. Two small collectives."""
    if not logits:
        return {}
    values = torch.stack([each.flatten() for each in logits.values()]).double()
    limit = torch.finfo(torch.float32).max  # beyond it, the edges would be infinite
    values = values.clamp(-limit, limit).nan_to_num()
    bounds = runtime.all_reduce_max(torch.stack([-values.amin(), values.amax()]))
    low, high = -bounds[0], bounds[1]
    width = ((high - low) / _BINS).clamp_min(torch.finfo(torch.float32).tiny)
    bins = ((values - low) / width).long().clamp_(0, _BINS - 1)
    counts = torch.zeros(len(values), _BINS, dtype=values.dtype, device=values.device)
    counts.scatter_add_(1, bins, torch.ones_like(values))
    edges = (low + width * torch.arange(_BINS + 1, device=low.device)).tolist()
    counts_by_kind = zip(logits, runtime.all_reduce_sum(counts).tolist(), strict=True)
    return {kind: {"counts": each, "edges": edges} for kind, each in counts_by_kind}
