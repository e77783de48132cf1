"""The objective of a run: one loss, any penalties, perhaps clipping, as the config names them."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from ganscale.errors import UserError
from ganscale.objectives.losses import Loss, build_loss
from ganscale.objectives.penalties import PENALTIES
from ganscale.schema import ClipConfig, ObjectiveConfig


@dataclass(frozen=True)
class Objective:
    loss: Loss
    penalties: dict[str, tuple[float, Callable[[Tensor], Tensor]]]  # name -> weight, of norms
    clip: ClipConfig | None


def build_objective(config: ObjectiveConfig) -> Objective:
    """Raises UserError, with the nearest known name, for what does not exist."""
    for name in config.penalties:
        if name not in PENALTIES:
            close = difflib.get_close_matches(name, PENALTIES, n=1)
            hint = f"did you mean {close[0]}" if close else f"known: {', '.join(PENALTIES)}"
            raise UserError(f"`objective.penalties.{name}`: unknown penalty; {hint}")
    return Objective(
        loss=build_loss(config.loss.name, config.loss.options),
        penalties={
            name: (penalty.weight, PENALTIES[name])
            for name, penalty in config.penalties.items()
            if penalty.weight > 0
        },
        clip=config.clip,
    )


def refuse_batch_statistics(critic: nn.Module) -> None:
    """Raises UserError for a critic whose logits depend on the other samples of the batch.

    A per-sample penalty is ill-defined through batch norm, and its statistics differ by rank.
    """
    for name, module in critic.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise UserError(
                f"the critic's layer `{name}` is a batch norm, which ties the samples of a batch "
                "together and differs between ranks: use layer, group or instance norm, or none"
            )
