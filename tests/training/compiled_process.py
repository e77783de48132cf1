"""A compiled cycle: `run_rank` on any number of ranks, `main` where there is no compiler.

In processes of their own, since type checks of tests are no more than obstacles to a compiler.
"""

from pathlib import Path

import torch
from torch import Tensor

from ganscale.config import resolve
from ganscale.data.batch import Batch
from ganscale.errors import UserError
from ganscale.objectives.objective import build_objective
from ganscale.runtime import Runtime
from ganscale.training.cycle import Cycle
from ganscale.training.state import TrainingState
from tests.helpers.processes import REPOSITORY

SETTINGS = (
    str(REPOSITORY / "configs" / "resnet32.yaml"),
    "generator.target=resnet",
    "critic.target=resnet",
    "generator.options.width=4",
    "critic.options.width=4",
    "data.resolution=16",
    "objective.n_critic=1",
    "training.global_batch_size=4",
    "training.precision=float64",
    "optimizer.critic.eps=1e-3",
    "optimizer.generator.eps=1e-3",
)


def after_a_cycle(*settings: str, runtime: Runtime | None = None) -> dict[str, Tensor]:
    """With this rank's share of four images."""
    config, runtime = resolve([*SETTINGS, *settings]).config, runtime or Runtime.start()
    objective = build_objective(config.objective)
    state = TrainingState(config, objective, runtime, num_classes=0)
    cycle = Cycle(config, objective, runtime, state)
    images = torch.arange(4 * 16 * 16 * 3).view(4, 16, 16, 3).remainder(251).byte()
    share = torch.arange(4).chunk(runtime.world_size)[runtime.rank]
    cycle.run([Batch(images[share], torch.zeros_like(share), share)], is_logged=False)
    return {**state.critic.state_dict(), **state.generator.state_dict(prefix="generator.")}


def run_rank(folder: Path) -> None:
    runtime = Runtime.start()
    weights = after_a_cycle("training.compile=true", runtime=runtime)
    torch.save(weights, folder / f"weights{runtime.rank}.pt")
    runtime.barrier()
    runtime.close()


def main() -> None:
    try:
        after_a_cycle("training.compile=true")
    except UserError as error:
        print(error)


if __name__ == "__main__":
    main()
