"""The peak of device memory that `ganscale plan` predicts is that of cycles on a GPU."""

import gc
from collections.abc import Callable

import pytest
import torch

from benchmarks.invariance import untried_networks
from benchmarks.ours import config_of
from ganscale.data.batch import Batch
from ganscale.objectives.objective import build_objective
from ganscale.plan.device_memory import MemoryPlanner
from ganscale.randomness import draw_together
from ganscale.runtime import Runtime
from ganscale.schema import Config
from ganscale.training.cycle import Cycle
from ganscale.training.data_flow import batches_per_cycle
from ganscale.training.device_batch import draws_ahead
from ganscale.training.state import TrainingState

BATCH = 1024  # of the 3 to 6 GB that it takes, the workspaces of libraries are a small part


def run_cycles(config: Config, runtime: Runtime) -> None:
    """Two logged cycles on noise, while the batches of the next are on the device already."""
    objective = build_objective(config.objective)
    networks = untried_networks(config, 0, runtime)
    state = TrainingState(config, objective, runtime, 0, networks)
    cycle = Cycle(config, objective, runtime, state)
    images, count = config.training.global_batch_size, batches_per_cycle(config)

    def batches(cycle: int) -> list[Batch]:
        made = []
        for step in range(cycle * count, (cycle + 1) * count):
            slots = step * images + torch.arange(images)
            size = images, *config.data.size, config.data.channels
            pixels = torch.randint(0, 256, size, dtype=torch.uint8)
            draws = draw_together(draws_ahead(config, objective), config.seed, slots)
            pixels, labels, slots, draws = (
                each.to(runtime.device) for each in (pixels, torch.zeros_like(slots), slots, draws)
            )
            made.append(Batch(pixels, labels, slots, draws=draws))
        return made

    following = batches(0)
    for number in range(2):
        current, following = following, batches(number + 1)
        cycle.run(current, is_logged=True)
        state.meters.read()


def allocated_peak(run: Callable[[], object]) -> int:
    """By how many bytes torch's allocator grows within `run`."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("network", ["dcgan64", "resnet64"])
@pytest.mark.usefixtures("gpu")
def test_the_planned_peak_is_within_a_tenth_of_what_two_cycles_allocate(
    record_property: Callable[[str, object], None], network: str, precision: str
) -> None:
    config = config_of("wgan_gp", network, BATCH, f"training.precision={precision}")
    planned = MemoryPlanner(config, build_objective(config.objective), 0, 1).peak(BATCH)
    runtime = Runtime.start()
    peak = allocated_peak(lambda: run_cycles(config, runtime))
    record_property("planned peak of memory / allocated", f"{planned / peak:.3f}")
    assert planned == pytest.approx(peak, rel=0.1)
