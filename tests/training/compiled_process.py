"""A cycle as it is and a compiled one; prints how far their weights are apart.

In a process of its own, since type checks of tests are no more than obstacles to a compiler.
"""

import torch
from torch import Tensor

from ganscale.config import resolve
from ganscale.data.batch import Batch
from ganscale.errors import UserError
from ganscale.objectives.objective import build_objective
from ganscale.runtime import Runtime
from ganscale.training.cycle import Cycle
from ganscale.training.state import TrainingState
from tests.conftest import REPOSITORY

SETTINGS = (
    str(REPOSITORY / "configs" / "resnet32.yaml"),
    "generator.target=dcgan",
    "critic.target=dcgan",
    "generator.options.width=4",
    "critic.options.width=4",
    "data.resolution=16",
    "objective.n_critic=1",
    "training.global_batch_size=4",
    "training.precision=float64",
    "optimizer.critic.eps=1e-3",
    "optimizer.generator.eps=1e-3",
)


def after_a_cycle(*settings: str) -> dict[str, Tensor]:
    config, runtime = resolve([*SETTINGS, *settings]).config, Runtime.start()
    objective = build_objective(config.objective)
    state = TrainingState(config, objective, runtime, num_classes=0)
    cycle = Cycle(config, objective, runtime, state)
    images = torch.arange(4 * 16 * 16 * 3).view(4, 16, 16, 3).remainder(251).byte()
    batch = cycle.on_device(Batch(images, torch.zeros(4, dtype=torch.int64), torch.arange(4)))
    cycle.critic_step(batch, with_panel=False)
    cycle.generator_step(batch, with_panel=False)
    return {**state.critic.state_dict(), **state.generator.state_dict(prefix="generator.")}


def main() -> None:
    plain = after_a_cycle()
    try:
        compiled = after_a_cycle("training.compile=true")
    except UserError as error:
        print(error)
        return
    print(max((compiled[name] - value).abs().max().item() for name, value in plain.items()))


if __name__ == "__main__":
    main()
