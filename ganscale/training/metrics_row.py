"""The metrics of a row that follow from the seed and the images seen, on any cluster.

docs/metrics.md explains every name.
"""

from typing import Any

from torch import Tensor

from ganscale.metrics.rows import derived_metrics, logit_histograms, weight_meters
from ganscale.runtime import Runtime
from ganscale.training.state import TrainingState


def metrics_row(
    state: TrainingState, runtime: Runtime, total_images: int, logits: dict[str, Tensor]
) -> dict[str, Any]:
    """Everything metered since the last row: numbers and histograms.

    logits: this rank's in the last critic step, for histograms; {} for none

    Collective: sums over the ranks. Waits for the device.
    """
    updaters = state.critic_updater, state.generator_updater
    trained = {updater.name: updater.parameters for updater in updaters}
    state.meters.add(weight_meters(trained, state.generator, state.ema))
    row: dict[str, Any] = derived_metrics(state.meters.read())
    for updater in updaters:
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
    histograms = logit_histograms(logits, runtime)
    return row | {f"logits/{kind}_histogram": each for kind, each in histograms.items()}
