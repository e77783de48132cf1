"""Nothing in a cycle waits for the device, and the device does not wait for data."""

import statistics
from collections.abc import Iterator, Mapping

import pytest
import torch

from benchmarks.launches import OBJECTIVES
from benchmarks.ours import Ours, config_of, random_images
from ganscale.runtime import Runtime
from tests.helpers.runs import Runs


@pytest.fixture
def allowing_sync_afterwards() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("objective", "network"),
    [*((each, "dcgan32") for each in OBJECTIVES), ("wgan_gp", "resnet32"), ("r3gan", "resnet32")],
)
@pytest.mark.usefixtures("allowing_sync_afterwards")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_a_cycle_never_waits_for_the_device(
    gpu: torch.device, objective: str, network: str
) -> None:
    small = ("generator.options.width=4", "critic.options.width=4", "training.gradient_clip=1")
    config = config_of(objective, network, 4, *small)
    ours = Ours(config, Runtime.start(), random_images(config, gpu))
    for _ in range(2):  # the first ones make the optimizers' state
        ours()
    batches = ours.batches()
    torch.cuda.set_sync_debug_mode("error")
    ours.run(batches)


def test_the_loader_keeps_up_with_a_network_of_some_size(
    device: torch.device, environment: Mapping[str, str], runs: Runs
) -> None:
    width = 128 if device.type == "cuda" else 8
    settings = (
        "generator.target=resnet",
        "critic.target=resnet",
        f"generator.options.width={width}",
        f"critic.options.width={width}",
        "objective.n_critic=5",
        "training.global_batch_size=64",
        "log.every_images=960",
        "training.total_images=9600",
        "data.workers=2",
        "samples.every_images=1M",
    )
    runs.finish("run", *settings, environment=environment)
    shares = [row["perf/data_wait_share"] for row in runs.rows("run")]
    assert statistics.median(shares[3:]) < 0.1
