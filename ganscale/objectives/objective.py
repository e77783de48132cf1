"""The objective of a run, from its config: one loss, any penalties, optional weight clipping."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ganscale.errors import UserError
from ganscale.importing import call, find
from ganscale.objectives.generator_penalties import GENERATOR_PENALTIES, GeneratorPenalty
from ganscale.objectives.losses import LOSSES, Logits, Loss, build_loss, total
from ganscale.objectives.penalties import PENALTIES, Draws, Penalty
from ganscale.runtime import all_gather_batch
from ganscale.schedules import Schedule, ends
from ganscale.schema import ClipConfig, ObjectiveConfig


@dataclass(frozen=True)
class WeightedPenalty:
    penalty: Penalty
    weight: float | Schedule
    interval: int  # taken every `interval` critic updates, at `interval` times the weight
    patch_score: str = "sum"  # or "mean": what makes one score of a patch map


@dataclass(frozen=True)
class WeightedGeneratorPenalty:
    penalty: GeneratorPenalty
    weight: float | Schedule
    interval: int  # in updates of the generator, likewise
    decay: float  # of the moving average of the lengths, in each update in which it is taken


WeightedPenalties = Mapping[str, WeightedPenalty] | Mapping[str, WeightedGeneratorPenalty]


def due(penalties: WeightedPenalties, update: int) -> tuple[str, ...]:
    """The names of those that are taken at this update of their network."""
    return tuple(name for name, each in penalties.items() if update % each.interval == 0)


def scheduled_weights(penalties: WeightedPenalties, images_seen: int) -> dict[str, float]:
    """The weights at this update of the penalties whose weight has a schedule."""
    return {
        name: each.weight.at(images_seen)
        for name, each in penalties.items()
        if isinstance(each.weight, Schedule)
    }


def scheduled_factors(penalties: WeightedPenalties, images_seen: int) -> dict[str, float]:
    """What these weights come to in the loss: a lazy penalty stands for a whole interval."""
    weights = scheduled_weights(penalties, images_seen)
    return {name: weight * penalties[name].interval for name, weight in weights.items()}


@dataclass(frozen=True)
class Objective:
    """loss: the trained one; panel: losses by name that are evaluated but not trained."""

    loss: Loss
    penalties: dict[str, WeightedPenalty]
    generator_penalties: dict[str, WeightedGeneratorPenalty]
    clip: ClipConfig | None
    panel: dict[str, Loss]

    def penalty_points(
        self, real_images: Tensor, fake_images: Tensor, draws: Draws, update: int
    ) -> dict[str, Tensor]:
        """For each penalty that is due at this critic update, the images at which its gradient is
        taken."""
        return {
            name: self.penalties[name].penalty.points(real_images, fake_images, draws)
            for name in due(self.penalties, update)
        }


def build_objective(config: ObjectiveConfig) -> Objective:
    """Raises UserError, with the nearest known name, for a loss or penalty that does not exist."""
    penalties = {
        name: WeightedPenalty(
            call(find(name, PENALTIES, "penalty", Penalty), {}, f"penalty {name}"),
            penalty.weight,
            penalty.interval,
            penalty.patch_score,
        )
        for name, penalty in config.penalties.items()
        if max(ends(penalty.weight)) > 0
    }
    generator_penalties = {
        name: WeightedGeneratorPenalty(
            call(
                find(name, GENERATOR_PENALTIES, "penalty of the generator", GeneratorPenalty),
                {},
                f"penalty {name}",
            ),
            penalty.weight,
            penalty.interval,
            penalty.decay,
        )
        for name, penalty in config.generator_penalties.items()
        if max(ends(penalty.weight)) > 0
    }
    loss = build_loss(config.loss.name, config.loss.options)
    panel = {name: build_loss(name, {}) for name in LOSSES}
    users_losses = [(target, build_loss(target, {})) for target in config.panel]
    if config.loss.name not in (*LOSSES, *config.panel):
        users_losses.append((config.loss.name, loss))
    for target, users_loss in users_losses:
        name = target.rpartition(":")[2]
        if name in panel:
            raise UserError(f"loss {target}: the panel has a {name} already; rename the function")
        panel[name] = users_loss
    return Objective(loss, penalties, generator_penalties, config.clip, panel)


@torch.no_grad()
def panel_meters(network: str, losses: Mapping[str, Loss], logits: Logits) -> dict[str, Tensor]:
    """`panel/<network>/<loss>`: each loss of the "critic" or the "generator" on the logits that a
    step already has, to compare variants within one run."""
    meters = {}
    for name, loss in losses.items():
        terms_of = loss.critic if network == "critic" else loss.generator_terms
        values = logits.values()
        gathered = map(all_gather_batch, values) if loss.needs_global_batch else values
        meters[f"panel/{network}/{name}"] = total(terms_of(*gathered))
    return meters
