"""The rows of a run's curve: what follows from the seed and the images seen, on any cluster.

Every name is explained in docs/metrics.md.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from ganscale.runtime import Runtime
from ganscale.training.state import TrainingState

_BINS = 32

Histogram = dict[str, list[float]]
"""`counts`, and their `edges`: one more."""


def metrics_row(state: TrainingState, runtime: Runtime, total_images: int) -> dict[str, Any]:
    """Everything that was metered since the last row: numbers and histograms.

    On every rank: it sums over the ranks. Waits for the device.
    """
    state.meters.add(weight_meters(state))
    row: dict[str, Any] = derived(state.meters.read())
    for updater in (state.critic_updater, state.generator_updater):
        row[f"optim/{updater.name}_learning_rate"] = updater.learning_rate(state.images_seen)
    if (nearest := row.get("collapse/nearest")) is not None:
        is_collapsed = state.health.update_collapse(nearest, state.images_seen, total_images)
        row["collapse/alarm"] = float(is_collapsed)
    row["audit/passed"] = float(state.health.audits_passed)
    row["audit/non_finite"] = float(state.health.non_finite_events)
    row["data/bad_samples"] = float(state.bad_samples.total())
    for (_, reason), count in state.bad_samples.items():
        name = f"data/bad_{reason.replace(' ', '_')}"
        row[name] = row.get(name, 0.0) + count
    logits, state.meters.logits = state.meters.logits, {}  # a step that was logged is told once
    histograms = logit_histograms(logits, runtime)
    return row | {f"logits/{kind}_histogram": each for kind, each in histograms.items()}


@torch.no_grad()
def weight_meters(state: TrainingState) -> dict[str, Tensor]:
    """The 2-norm of each network's trained weights, and how far the average is from the generator:
    |average - weights| / |weights|."""
    meters = {
        f"optim/{updater.name}_weight_norm": get_total_norm(updater.parameters)
        for updater in (state.critic_updater, state.generator_updater)
    }
    weights = _weights(state.generator)
    between = torch._foreach_sub(_weights(state.ema), weights)
    meters["optim/ema_distance"] = get_total_norm(between) / get_total_norm(weights)
    return meters


def derived(means: dict[str, float]) -> dict[str, float]:
    """A row of them: means of squares become standard deviations (over all images of the interval),
    and the difference of the logits' means estimates the Wasserstein distance.

    E[D(real)] - E[D(fake)]: Arjovsky et al. 2017 (arXiv:1701.07875), equation 2, up to the critic's
    Lipschitz constant.
    """
    row = dict(means)
    for name, square in means.items():
        if name.endswith("_square"):
            of = name.removesuffix("_square")
            mean = means[f"{of}_mean"] if f"{of}_mean" in means else means[of]
            del row[name]
            row[f"{of}_std"] = max(square - mean * mean, 0.0) ** 0.5
    row["logits/wasserstein"] = row["logits/real_mean"] - row["logits/fake_mean"]
    return row


@torch.no_grad()
def logit_histograms(logits: dict[str, Tensor], runtime: Runtime) -> dict[str, Histogram]:
    """Of the logits of all ranks, by kind; all have the same edges. Two small collectives."""
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
    of_kinds = zip(logits, runtime.all_reduce_sum(counts).tolist(), strict=True)
    return {kind: {"counts": each, "edges": edges} for kind, each in of_kinds}


def _weights(network: nn.Module) -> list[Tensor]:
    return [parameter.detach() for parameter in network.parameters()]
