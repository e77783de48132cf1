"""The metrics of a row that follow from the seed and the images seen, on any cluster.

docs/metrics.md explains every name.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from ganscale.metrics.meters import SQUARE
from ganscale.runtime import Runtime
from ganscale.training.state import TrainingState

_BINS = 32


def metrics_row(
    state: TrainingState, runtime: Runtime, total_images: int, logits: dict[str, Tensor]
) -> dict[str, Any]:
    """Everything metered since the last row: numbers and histograms. Collective; waits for the
    device.

    logits: this rank's in the last critic step, for histograms; {} for none
    """
    trained = {updater.name: updater.parameters for updater in state.updaters}
    state.meters.add(weight_meters(trained, state.generator, state.ema))
    row: dict[str, Any] = derived_metrics(state.meters.read())
    row |= state.scheduled()
    row |= state.augmentation.metrics(state.images_seen)
    row |= state.mean_lengths.metrics()
    if (nearest := row.get("collapse/nearest")) is not None:
        is_collapsed = state.health.update_collapse(nearest, state.images_seen, total_images)
        row["collapse/alarm"] = float(is_collapsed)
    row["audit/passed"] = float(state.health.audits_passed)
    row["audit/non_finite"] = float(state.health.non_finite_events)
    row["data/bad_samples"] = float(state.bad_samples.total())
    for (_, reason), count in state.bad_samples.items():
        name = f"data/bad_{reason.replace(' ', '_')}"
        row[name] = row.get(name, 0.0) + count
    histograms = logit_histograms(logits, runtime)
    return row | {f"logits/{kind}_histogram": each for kind, each in histograms.items()}


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
        if name.endswith(SQUARE):
            stem = name.removesuffix(SQUARE)
            mean = means[f"{stem}_mean"] if f"{stem}_mean" in means else means[stem]
            del row[name]
            row[f"{stem}_std"] = max(square - mean * mean, 0.0) ** 0.5
    row["logits/wasserstein"] = row["logits/real_mean"] - row["logits/fake_mean"]
    return row


@torch.no_grad()
def logit_histograms(
    logits: dict[str, Tensor], runtime: Runtime
) -> dict[str, dict[str, list[float]]]:
    """Histograms of the logits of all ranks by kind: `counts`, and their `edges`, one more, which
    all kinds share. Two small collectives."""
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
