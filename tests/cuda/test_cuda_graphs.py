"""Real CUDA graphs train as steps that run: equal bits, after rows and replays in turn."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from benchmarks.invariance import CHANNELS
from benchmarks.ours import config_of, narrow
from ganscale.schema import Config
from tests.training.test_captured_steps import CYCLES, trained

OBJECTIVES = {
    "WGAN-GP": ("wgan_gp",),
    "non-saturating": ("non_saturating",),
    "lazy R1": ("r1", "objective.penalties.r1.interval=3", "objective.n_critic=3"),
    "R3GAN": ("r3gan",),
}
RATES = ("optimizer.critic.learning_rate=2e-4", "optimizer.generator.learning_rate=2e-4")
LOG_EVERY = 5  # a row comes between the first replays and the last


@pytest.fixture(autouse=True)
def repeatable_convolutions() -> Iterator[None]:
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.deterministic = before


def small_config(objective: str, network: str, precision: str) -> Config:
    name, *settings = OBJECTIVES[objective]
    settings += [*narrow(network, 8), *RATES, f"training.precision={precision}"]
    config = config_of(name, network, 8, *settings)
    config.data.channels = CHANNELS
    images = config.objective.n_critic * config.training.global_batch_size
    config.training.total_images = CYCLES * images
    return config


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=0, atol=0, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("network", ["dcgan32", "resnet32"])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.usefixtures("gpu")
def test_cycles_with_cuda_graphs_are_the_same_bits_as_without(
    monkeypatch: pytest.MonkeyPatch, objective: str, network: str, precision: str
) -> None:
    replay, replays = torch.cuda.CUDAGraph.replay, 0

    def counted(graph: torch.cuda.CUDAGraph) -> None:
        nonlocal replays
        replays += 1
        replay(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", counted)
    config = small_config(objective, network, precision)
    plain, again = trained(config, None, LOG_EVERY), trained(config, None, LOG_EVERY)
    assert replays == 0
    assert_same_bits(again, plain)  # or the comparison below would mean nothing
    config.training.cuda_graphs = "true"
    captured = trained(config, None, LOG_EVERY)
    assert replays > 5
    assert_same_bits(captured, plain)
